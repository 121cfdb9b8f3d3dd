"""Strangers at the door: what a raw request can reach, and what it cannot."""

from __future__ import annotations

import asyncio
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from conftest import DIGITS, Server, load

from epsanet.web.gate import Gate
from epsanet.web.serve import _hosts
from epsanet.web.uploads import Room

API = "/gradio_api"
JSON = {"content-type": "application/json"}


@pytest.fixture
def canary() -> Iterator[tuple[str, list[str]]]:
    """A server of this machine that nobody may be led to; it writes down who comes."""
    visits: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            visits.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"CANARY")

        do_HEAD = do_POST = do_GET

        def log_message(self, *_: object) -> None:
            """Not into the output of the tests."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as listener:
        threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{listener.server_port}", visits
        listener.shutdown()


def paths(secret: Path, server: Server, canary: str) -> list[str]:
    """Ways to ask for a file of the machine or for another address."""
    up = "../" * 12
    dotted = "%2e%2e/" * 12
    double = "%252e%252e%252f" * 12
    return [
        *(f"{API}/file={place}" for place in (secret, "/etc/passwd", "/proc/self/environ", Path(__file__).resolve())),
        f"{API}/file={server.folder}/files/{up}etc/passwd",
        f"{API}/file={server.folder}/files/{dotted}etc/passwd",
        f"{API}/file={server.folder}/files/{double}etc/passwd",
        f"{API}/file={server.folder}/examples/../../log",
        f"{API}/file=//etc/passwd",
        f"{API}/file=file:///etc/passwd",
        f"{API}/file={canary}/a.png",
        f"{API}/file=http:/{canary.removeprefix('http:/')}",
        f"{API}/file/etc/passwd",
        f"{API}/proxy={canary}/a.png",
        f"{API}/stream/../../../../etc/passwd",
        f"{API}/custom_component/1/client/component/{up}etc/passwd",
        f"{API}/call/predict/{up}etc/passwd",
        f"/file={secret}",
        f"/file/{secret}",
        f"/proxy={canary}",
        f"/static/{up}etc/passwd",
        f"/static/{dotted}etc/passwd",
        f"/static/{double}etc/passwd",
        "/static//etc/passwd",
        f"/assets/{up}etc/passwd",
        f"/assets/{dotted}etc/passwd",
        f"/svelte/{up}etc/passwd",
        f"/svelte/{dotted}etc/passwd",
        f"/?deep_link={up}etc/passwd",
        f"/{up}etc/passwd",
        f"{API}/runs",
        f"{API}/dev/reload",
        f"{API}/user",
        "/docs",
        "/openapi.json",
        "/monitoring",
    ]


def bodies(secret: Path, canary: str) -> list[tuple[str, Any]]:
    """Ways to have a file or an address read by a function of the page."""
    meta = {"_type": "gradio.FileData"}
    files = [
        {"path": str(secret), "meta": meta},
        {"path": str(secret)},
        {"path": f"{canary}/a.png", "meta": meta},
        {"path": f"{canary}/a.png", "url": f"{canary}/a.png", "meta": meta},
        {"path": None, "url": f"{canary}/a.png", "meta": meta},
        {"path": None, "url": f"file://{secret}", "meta": meta},
        {"image": {"path": str(secret), "meta": meta}},
        str(secret),
        f"{canary}/a.png",
    ]
    asked = [(f"{API}/call/{name}", {"data": [file, DIGITS, 0.5]}) for file in files for name in ("predict", "picture")]
    return [
        *asked,
        (f"{API}/queue/join", {"data": [files[0], DIGITS, 0.5], "fn_index": 0, "session_hash": "x"}),
        (f"{API}/component_server", {"data": [str(secret)], "component_id": 1, "fn_name": "ls", "session_hash": "x"}),
        (f"{API}/run/predict", {"data": [files[0], DIGITS, 0.5]}),
        (f"{API}/run/predict", {"data": [files[4], DIGITS, 0.5], "fn_index": 0}),
    ]


def test_no_file_or_address_of_the_machine_can_be_read(
    server: Server, canary: tuple[str, list[str]], tmp_path: Path
) -> None:
    address, visits = canary
    secret = tmp_path / "secret.png"
    secret.write_bytes(load.digits(1)[0] + b"SECRET")
    probes = [("GET", path, None) for path in paths(secret, server, address)]
    probes += [("POST", path, body) for path, body in bodies(secret, address)]
    assert len(probes) >= 40
    read: list[Any] = []
    for method, path, body in probes:
        data = None if body is None else json.dumps(body).encode()
        answer = server.visitor.ask(method, path, data, JSON if data else {})
        content = answer.body
        if method == "POST" and answer.status == 200:  # a function was asked; it must fail
            name, event = path.rsplit("/", 1)[1], answer.json()["event_id"]
            content = server.visitor.ask("GET", f"{API}/call/{name}/{event}").body
            if b"event: error" not in content:
                read.append((path, body, content))
        page = path.startswith("/?")  # the page itself, whatever is asked of it
        if any(word in content for word in (b"SECRET", b"root:", b"CANARY", b"def test_")) or (
            method == "GET" and answer.status == 200 and not page
        ):
            read.append((path, body, content[:200]))
    assert read == []
    assert visits == []


def test_a_picture_can_be_fetched_from_where_it_was_put_and_nothing_else_beside_it(server: Server) -> None:
    content = load.digits(1)[0]
    (place,) = server.visitor.upload(content, "mine.png").json()
    assert server.visitor.ask("GET", f"{API}/file={place}").body == content
    for name in ("50%.png", "wait..png", "mine.jfif"):
        (place,) = server.visitor.upload(content, name).json()
        assert server.visitor.ask("GET", f"{API}/file={quote(place)}").body == content, name
    (place,) = server.visitor.upload(content, "a%2e.png").json()
    assert server.visitor.ask("GET", f"{API}/file={quote(place)}").status == 404, "could be unquoted once more"
    (text,) = server.visitor.upload(b"<script>alert(1)</script>", "mine.html").json()
    assert Path(text).is_relative_to(server.folder / "files")
    assert server.visitor.ask("GET", f"{API}/file={text}").status == 404


def test_too_much_is_refused_before_it_is_kept(server: Server) -> None:
    def kept() -> int:
        return sum(path.stat().st_size for path in server.folder.rglob("*") if path.is_file())

    before = kept()
    assert server.visitor.upload(b"\0" * (20 * 2**20 + 10**5)).status == 413
    assert server.visitor.ask("POST", f"{API}/upload", b"", {"content-length": str(10**12)}).status == 413
    body = b"[" + b"1," * 40_000 + b"1]"
    assert server.visitor.ask("POST", f"{API}/call/predict", body, JSON).status == 413
    assert kept() == before
    assert server.visitor.ask("GET", f"{API}/upload_progress?upload_id={'x' * 510}").status == 414
    assert server.visitor.ask("POST", f"{API}/upload?upload_id={'x' * 60_000}", b"").status == 414
    nested = b'{"data":' + b"[" * 30_000 + b"]" * 30_000 + b"}"
    assert server.visitor.ask("POST", f"{API}/call/predict", nested, JSON).status in (400, 413)
    assert server.visitor.ask("POST", f"{API}/call/predict", b"{", JSON).status == 400


@pytest.mark.parametrize("headers", [{"host": "evil.example"}, {"origin": "http://evil.example"}, {"origin": "null"}])
def test_the_page_answers_to_its_own_name_only(server: Server, headers: dict[str, str]) -> None:
    answer = server.visitor.ask("GET", "/", headers=headers)
    assert answer.status == 403
    assert answer.json() == {"detail": "this page answers to its own address only"}


def ask(gate: Gate, method: str, path: str, headers: dict[str, str]) -> int:
    """The status of a request without a body, passed on without a server."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    lines = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": lines}
    asyncio.run(gate(scope, receive, send))
    status: int = sent[0]["status"]
    return status


async def fine(_: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 200})


def test_a_web_server_before_the_page_may_pass_on_its_own_name(tmp_path: Path) -> None:
    for names, status in (([], 403), (["example.org"], 200)):
        gate = Gate(fine, Room(tmp_path), _hosts("127.0.0.1", names), lambda *_: None)
        for host in ("127.0.0.1:7860", "example.org"):
            headers = {"host": host, "origin": "https://example.org"}
            assert ask(gate, "POST", f"{API}/upload", headers) == status, (names, host)
            assert ask(gate, "POST", f"{API}/upload", {**headers, "origin": "https://evil.example"}) == 403


def test_the_room_for_an_upload_is_given_back_however_it_ends(tmp_path: Path) -> None:
    room = Room(tmp_path)

    async def broken(*_: Any) -> None:
        assert not room.admit(room.most - 2 * 10**7), "the upload has its room"
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        ask(Gate(broken, room, frozenset(), lambda *_: None), "POST", f"{API}/upload", {"content-length": str(10**7)})
    room.sweep()
    assert room.admit(room.most - 2 * 10**7)


def test_the_browser_is_told_to_load_nothing_from_elsewhere(server: Server) -> None:
    import urllib.request

    with urllib.request.urlopen(server.url) as answer:
        policy = answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["server"] is None
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'self'"
    assert not any("http" in value or "*" in value for value in directives.values())
