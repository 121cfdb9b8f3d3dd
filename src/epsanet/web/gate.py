"""The gate before the page: what Gradio offers beyond what the page needs is not there.

Gradio's server can fetch addresses, serve files by their path and take any number of bytes. Strangers get a list of
ways in, bounded bodies, and files of the page's own folder; the browser is told to load nothing from elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any
from urllib.parse import unquote, urlsplit

from epsanet.web.uploads import MAX_BYTES, Room

__all__ = ["Gate"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Mistake = Callable[[str | None, Any], tuple[str, str] | None]

_API = "/gradio_api"
_FILE = f"{_API}/file="
_GET = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/(assets|static|svelte)/.+"
    rf"|{_API}/(theme\.css|info/?|app_id|startup-events|upload_progress|queue/(data|status)|heartbeat/\w+"
    r"|call/\w+/\w+|file=.+)"
)
_POST = re.compile(rf"{_API}/(upload|queue/join|cancel|reset|call/\w+|run/predict)/?")
_CALL = re.compile(rf"{_API}/call/(\w+)/?")
_BY_NUMBER = re.compile(rf"{_API}/(queue/join|run/predict)/?")
_SERVED = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp")
_MAX_JSON = 64 * 2**10
_MAX_FORM = MAX_BYTES + 64 * 2**10
_MAX_QUERY = 512
"""Gradio keeps ids that come in it."""

_HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "base-uri 'self'; form-action 'self'; object-src 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class _RefusedError(Exception):
    def __init__(self, status: int, detail: Any) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


class Gate:
    """An ASGI application around another.

    Args:
        app: that is guarded.
        room: where uploads and results are; no file outside is served or read.
        hosts: names under which the page may be asked for; any when empty. Another name means that a page from
            elsewhere was pointed at this machine (DNS rebinding).
        mistake: told the function's name, none where the request has its number, and the request; says which parameter
            is wrong and why.
    """

    def __init__(self, app: App, room: Room, hosts: frozenset[str], mistake: Mistake) -> None:
        self.app, self.room, self.hosts, self.mistake = app, room, hosts, mistake

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # the page needs no web sockets
        refused: _RefusedError | None = None
        kept = 0

        async def send_unless_refused(message: MutableMapping[str, Any]) -> None:
            if refused is None:  # else it is the application's idea of what went wrong
                await send(_with_headers(message))

        async def receive_or_refuse() -> MutableMapping[str, Any]:
            nonlocal refused
            try:
                return await checked()
            except _RefusedError as error:
                refused = error
                raise

        try:
            checked, kept = await self._checked(scope, receive)
            await self.app(scope, receive_or_refuse, send_unless_refused)
        except Exception as error:
            refused = error if isinstance(error, _RefusedError) else refused
            if refused is None:
                raise
        finally:
            self.room.release(kept)
        if refused is not None:
            await _answer(send, refused.status, refused.detail)

    async def _checked(self, scope: Scope, receive: Receive) -> tuple[Receive, int]:
        """What the application receives, and bytes that are kept for it in the room, or ``_RefusedError``."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self._check_names(headers)
        if len(scope["query_string"]) > _MAX_QUERY:
            raise _RefusedError(414, f"more than {_MAX_QUERY} bytes after the question mark")
        path: str = scope["path"]
        if scope["method"] in ("GET", "HEAD"):
            if (
                not _GET.fullmatch(path)
                or ".." in path.split("/")
                or (path.startswith(_FILE) and not self._may_serve(path))
            ):
                raise _RefusedError(404, "there is nothing here")
            return receive, 0
        if scope["method"] != "POST" or not _POST.fullmatch(path):
            raise _RefusedError(404, "there is nothing here")
        upload = path.startswith(f"{_API}/upload")
        limit = _MAX_FORM if upload else _MAX_JSON
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise _RefusedError(413, f"more than {limit // 2**10:,} KB; send a smaller picture")
        if upload:
            kept = self.room.admit(int(length) if length.isdigit() else limit)
            if not kept:
                raise _RefusedError(503, "there is no room for more pictures at the moment; try again in a minute")
            return _limited(receive, limit), kept
        return await self._checked_json(path, _limited(receive, limit)), 0

    def _check_names(self, headers: dict[str, str]) -> None:
        if not self.hosts:
            return
        origin = headers.get("origin")
        for name in (f"//{headers.get('host', '')}", origin):
            try:
                known = name is None or urlsplit(name).hostname in self.hosts
            except ValueError:
                known = False
            if not known:
                raise _RefusedError(403, "this page answers to its own address only")

    def _may_serve(self, path: str) -> bool:
        place = path.removeprefix(_FILE)
        plain = unquote(place) == place  # 50%.png is a name; what could be unquoted once more is not served
        return place.lower().endswith(_SERVED) and plain and place[:1] == "/" and self.room.holds(place)

    async def _checked_json(self, path: str, receive: Receive) -> Receive:
        """The whole body, once every file that it names is known to be ours, and a function can take the rest."""
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _RefusedError(400, "the request ended early")
            body, more = body + message.get("body", b""), message.get("more_body", False)
        try:
            content = json.loads(body, parse_constant=_no_number) if body else None
        except (ValueError, RecursionError) as error:
            raise _RefusedError(400, "this is no JSON") from error
        for place in _paths(content):
            if not isinstance(place, str) or not self.room.holds(place):
                raise _RefusedError(400, "this file was not uploaded here, or has been deleted; upload it again")
        self._check_call(path, content)
        replayed = False

        async def replay() -> MutableMapping[str, Any]:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        return replay

    def _check_call(self, path: str, content: Any) -> None:
        """In the form that Gradio's client for Python and the page take the reason from."""
        called = _CALL.fullmatch(path)
        if not called and not _BY_NUMBER.fullmatch(path):
            return
        mistake = self.mistake(called[1] if called else None, content)
        if mistake is not None:
            parameter, reason = mistake
            detail = {"__type__": "validate", "is_valid": False, "parameter_name": parameter, "message": reason}
            raise _RefusedError(422, [detail])


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _paths(content: Any) -> Iterator[Any]:
    """Every value that Gradio could take for the place of a file, at any depth."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if "path" in value and value["path"] is not None:
                yield value["path"]
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def _limited(receive: Receive, limit: int) -> Receive:
    received = 0

    async def limited() -> MutableMapping[str, Any]:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise _RefusedError(413, f"more than {limit // 2**10:,} KB; send a smaller picture")
        return message

    return limited


def _with_headers(message: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if message["type"] != "http.response.start":
        return message
    extra = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
    return {**message, "headers": [*message.get("headers", []), *extra]}


async def _answer(send: Send, status: int, detail: Any) -> None:
    body = json.dumps({"detail": detail}, ensure_ascii=False).encode("utf-8", "backslashreplace")
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send(_with_headers({"type": "http.response.start", "status": status, "headers": headers}))
    await send({"type": "http.response.body", "body": body})
