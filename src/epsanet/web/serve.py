"""The server: one process, on loopback unless told otherwise, that leaves nothing behind."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from epsanet._optional import require
from epsanet.network.shipped import shipped_folders

__all__ = ["serve"]

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_CONNECTIONS = 256
_SWEEP_SECONDS = 15.0
_UPLOAD_IDS = 1000
"""More than can be under way."""
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
_TERMINATED = 128 + signal.SIGTERM
_LOGGER = logging.getLogger(__name__)


def serve(
    models: Sequence[str] = (),
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    names: Sequence[str] = (),
    examples: str | None = None,
    note: Callable[[str], None] = print,
) -> None:
    """Show the page until Ctrl-C.

    Args:
        models: whatever ``load_model`` and ``load_detector`` take; the weights of this package when left out.
        host: name or address to listen at; 0.0.0.0 for all of this machine's.
        port: to listen at; 0 for any that is free.
        names: host names under which a web server before the page is reached. On loopback the page answers to them and
            to its own address only; elsewhere to any name, unless there are some.
        examples: folder of pictures to try; those that come with scikit-learn when left out.
        note: told what the user should know: the page's address.

    Raises:
        ValueError: for a model or folder that is not there, a port that is taken, a name that is none, or without
            Gradio.
    """
    hosts = _hosts(host, names)
    require("gradio", "web")
    require("captum", "insight")
    with (
        _listening(host, port) as listener,
        _ended_by_sigterm(),
        tempfile.TemporaryDirectory(prefix="epsanet-serve-") as folder,
    ):
        os.environ |= {"GRADIO_TEMP_DIR": str(Path(folder).resolve() / "files"), "GRADIO_ANALYTICS_ENABLED": "False"}
        app, served = _application(list(models) or list(shipped_folders()), Path(folder).resolve(), hosts, examples)
        address = f"[{host}]" if ":" in host else host
        note(f"http://{address}:{listener.getsockname()[1]}  {', '.join(served)}")
        note("Ctrl-C ends it" if host in _LOOPBACK else "whoever reaches this machine can use it; Ctrl-C ends it")
        _run(app, listener)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that it can clean up."""

    def end(*_: object) -> None:
        raise SystemExit(_TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _listening(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise ValueError(f"port={port} is none; use one from 1024 to 65535, or 0 for any that is free")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ValueError(f"host={host} is no address of this machine; use 127.0.0.1 or 0.0.0.0") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(place)
        listener.listen()  # whoever comes before the page is up waits, and is not refused
    except OSError as error:
        listener.close()
        reason = error.strerror or error
        raise ValueError(f"port {port} of {host} cannot be had ({reason}); choose another with --port") from error
    return listener


def _hosts(host: str, names: Sequence[str]) -> frozenset[str]:
    """Names that the page answers to; any when empty."""
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(f"names={name!r} is no host name; give it without https:// and port, such as example.org")
    if host not in _LOOPBACK and not names:
        return frozenset()
    return frozenset({*_LOOPBACK, host, *(name.lower() for name in names)})


def _application(
    sources: list[str], folder: Path, hosts: frozenset[str], examples: str | None
) -> tuple[Any, list[str]]:
    """The page behind its gate, and the names of its models."""
    from epsanet.tasks.predict import find_images
    from epsanet.web.examples import write_examples
    from epsanet.web.gate import Gate
    from epsanet.web.models import open_models
    from epsanet.web.uploads import MAX_BYTES, Room

    models = open_models(sources)
    if examples is not None:
        if not Path(examples).is_dir():
            raise ValueError(
                f"there is no folder {examples!r} of pictures to try; leave --examples out for included ones"
            )
        pictures = [Path(path) for path in find_images([examples])][:12]
    else:
        pictures = write_examples(folder / "examples", models.values())

    import gradio as gr
    from fastapi import FastAPI

    from epsanet.web.calls import Calls
    from epsanet.web.page import STYLE, THEME, build_page

    room = Room(folder / "files")
    room.folder.mkdir()
    page = build_page(models, pictures, room)
    page.has_launched = True  # Gradio looks at the paths of files only where it started the server itself
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page,
        path="/",
        show_error=False,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        blocked_paths=[],
        max_file_size=MAX_BYTES,
        theme=THEME,
        css=STYLE,
        footer_links=[],
    )
    room.permanent = frozenset(str(path) for path in room.folder.rglob("*"))
    threading.Thread(target=_sweep, args=(room.sweep, _forget_uploads), daemon=True).start()
    return Gate(app, room, hosts, Calls(page).mistake), list(models)


def _sweep(*jobs: Callable[[], None]) -> None:
    pause = threading.Event()
    while not pause.wait(_SWEEP_SECONDS):
        for job in jobs:
            try:
                job()
            except Exception:  # without this thread nothing would be deleted
                _LOGGER.exception("uploads could not be deleted; this is tried again")


def _forget_uploads() -> None:
    """Gradio keeps the id of each upload whose progress nobody follows to the end."""
    from gradio.routes import file_upload_statuses as uploads

    for ids in (uploads._statuses, uploads._signals):
        for old in list(ids)[:-_UPLOAD_IDS]:
            ids.pop(old, None)


def _run(app: Any, listener: socket.socket) -> None:
    import uvicorn

    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=0,
        ws="none",
        lifespan="on",
    )
    uvicorn.Server(config).run(sockets=[listener])
