"""The command: what goes wrong is one line, and Ctrl-C leaves nothing."""

from __future__ import annotations

import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import DIGITS, load

from epsanet import cli
from epsanet.web import serve


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "there is no model 'nothing'"),
        (["{tmp}"], "is no model folder"),
        (
            [DIGITS, "--port={taken}"],
            "port {taken} of 127.0.0.1 cannot be had (Address already in use); choose another",
        ),
        ([DIGITS, "--port=99999"], "port=99999 is none"),
        ([DIGITS, "--port=x"], "see epsanet serve --help"),
        (
            [DIGITS, "--port=0", "--host=no.such.name.invalid"],
            "host=no.such.name.invalid is no address of this machine",
        ),
        ([DIGITS, "--port=0", "--host=192.0.2.1"], "of 192.0.2.1 cannot be had"),
        ([DIGITS, "--port=0", "--names=[https://example.org]"], "names='https://example.org' is no host name; give it"),
        ([DIGITS, "--port=0", "--examples={tmp}"], "holds no images"),
        ([DIGITS, "--port=0", "--examples=nowhere"], "there is no folder 'nowhere' of pictures to try"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str],
    message: str,
    taken: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("gradio")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    handler = signal.getsignal(signal.SIGTERM)
    code = cli.main(["serve", *(word.format(tmp=tmp_path / "tmp", taken=taken) for word in words)])
    output, errors = capsys.readouterr()
    assert (code, output) == (2, "")
    assert errors.startswith("epsanet: ")
    assert errors.count("\n") == 1
    assert message.format(taken=taken) in errors
    assert list((tmp_path / "tmp").iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == handler


def test_without_gradio_the_line_to_install_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name))
    assert cli.main(["serve"]) == 2
    assert "this needs gradio, which is not installed; pip install 'epsanet[web]'" in capsys.readouterr().err


def test_files_are_deleted_after_an_error_too(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[BaseException | None] = [OSError("the disk is gone"), None, SystemExit()]

    class Broken:
        def sweep(self) -> None:
            outcome = outcomes.pop(0)
            if outcome is not None:
                raise outcome

    monkeypatch.setattr(serve, "_SWEEP_SECONDS", 0.001)
    with pytest.raises(SystemExit):
        serve._sweep(Broken().sweep)
    assert outcomes == []
    assert "the disk is gone" in caplog.text


@pytest.mark.parametrize(
    ("host", "names", "hosts"),
    [
        ("127.0.0.1", [], {"127.0.0.1", "localhost", "::1"}),
        ("127.0.0.1", ["Example.org"], {"127.0.0.1", "localhost", "::1", "example.org"}),
        ("0.0.0.0", [], set()),
        ("0.0.0.0", ["example.org"], {"127.0.0.1", "localhost", "::1", "0.0.0.0", "example.org"}),
    ],
)
def test_the_page_answers_to_the_names_it_is_given(host: str, names: list[str], hosts: set[str]) -> None:
    """What the gate does with them, ``test_the_page_answers_to_its_own_name_only`` tells."""
    assert serve._hosts(host, names) == hosts


def test_ids_of_uploads_are_forgotten() -> None:
    pytest.importorskip("gradio")
    from gradio.routes import file_upload_statuses as uploads

    for number in range(serve._UPLOAD_IDS + 10):
        uploads.set_done(str(number))
    serve._forget_uploads()
    for ids in (uploads._statuses, uploads._signals):
        assert list(ids) == [str(number) for number in range(10, serve._UPLOAD_IDS + 10)]


def test_sigterm_while_somebody_is_connected_ends_it_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    (tmp_path / "tmp").mkdir()
    log, (picture,) = tmp_path / "log", load.digits(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path / "tmp"))
        server, url = load.start([DIGITS], log)
    try:
        load.Visitor(url).upload(picture)  # at once: the address is said when it can be used
        with socket.create_connection(tuple(url.removeprefix("http://").split(":"))) as line:  # type: ignore[arg-type]
            line.sendall(b"GET /gradio_api/heartbeat/abc HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert line.recv(100).startswith(b"HTTP/1.1 200")
            server.send_signal(signal.SIGTERM)
            started = time.monotonic()
            while line.recv(1000):
                pass
            assert time.monotonic() - started < 30, "the line was cut"
        assert server.wait(60) == 128 + signal.SIGTERM
    finally:
        server.kill()
    assert list((tmp_path / "tmp").iterdir()) == []
    lines = log.read_text().splitlines()
    assert lines == [f"{url}  {DIGITS}", "Ctrl-C ends it"], "and no noise"
