"""Publishing: what reaches the Hub is the folder as it is, and nothing goes that could not be read back."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from epsanet.cli import main
from epsanet.network.shipped import shipped_folders
from epsanet.network.weights import save_model
from epsanet.tasks.publish import publish

MODEL = "epsanet14_tiny.digits"
FOLDER = shipped_folders()[MODEL]
CARD = "---\nlibrary_name: timm\ntags: [epsanet]\nlicense: mit\nmetrics: [accuracy]\n---\n# Coins\n"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's protocol as a commit needs; remembers what came in."""

    server: Any

    def do_GET(self) -> None:
        self.reply({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.headers.get("transfer-encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.server.requests.append((self.path, self.headers.get("authorization"), body))
        if self.server.refuses:
            self.reply({"error": "You may not write here"}, 403)
        elif self.path == "/api/repos/create":
            name = json.loads(body)["name"]
            self.reply({"url": f"http://127.0.0.1:{self.server.server_port}/me/{name}", "name": f"me/{name}"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.reply({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif "/commit/" in self.path:
            self.reply({"commitUrl": "http://127.0.0.1/me/digits/commit/5", "commitOid": "5" * 40, "hookOutput": ""})
        else:
            self.reply({})

    def reply(self, content: object, code: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.refuses = [], False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def environment(hub: Any, home: Path) -> dict[str, str]:
    """For a process of its own: the address of the Hub is read when its library is imported."""
    others = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    return others | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(home)}


def test_the_hub_gets_the_folder_as_it_is(hub: Any, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "epsanet", "publish", MODEL, "me/digits", "--private"],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment(hub, tmp_path) | {"HF_TOKEN": "hf_secret"},
    )
    assert done.returncode == 0, done.stderr
    assert "http://127.0.0.1/me/digits/commit/5" in done.stdout
    posted = {path: (token, body) for path, token, body in hub.requests}
    assert {token for token, _ in posted.values()} == {"Bearer hf_secret"}
    made = json.loads(posted["/api/repos/create"][1])
    assert made["name"] == "digits"
    assert made.get("private") is True or made.get("visibility") == "private"
    (commit,) = [body for path, (_, body) in posted.items() if path == "/api/models/me/digits/commit/main"]
    lines = [json.loads(line) for line in commit.splitlines()]
    assert lines[0]["value"]["summary"] == "Upload epsanet14_tiny"
    files = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines[1:]}
    assert files == {path.name: path.read_bytes() for path in FOLDER.iterdir()}
    (tmp_path / "back").mkdir()
    for name, content in files.items():
        (tmp_path / "back" / name).write_bytes(content)
    back = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True).eval()
    wanted = timm.create_model(MODEL, pretrained=True).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(back(x), wanted(x))
    assert back.pretrained_cfg["label_names"] == list("0123456789")


CHILD = """
import contextlib, io, json, os, sys
from epsanet.cli import main
for line in sys.stdin:
    if token := line.strip():
        os.environ["HF_TOKEN"] = token
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = main(sys.argv[1:])
    print(json.dumps([code, output.getvalue(), errors.getvalue()]), flush=True)
"""


def test_a_lacking_token_a_refusal_and_a_lost_hub_are_one_line(hub: Any, tmp_path: Path) -> None:
    words = [sys.executable, "-c", CHILD, "publish", MODEL, "me/digits"]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(hub, tmp_path)
    ) as child:

        def published(token: str) -> Any:
            print(token, file=child.stdin, flush=True)
            return json.loads(child.stdout.readline())  # type: ignore[union-attr]

        lacking = published("")
        assert hub.requests == [], "the Hub was asked without a token"
        hub.refuses = True
        refused = published("hf_secret")
        assert [token for _, token, _ in hub.requests] == ["Bearer hf_secret"]
        hub.shutdown()
        hub.server_close()
        lost = published("hf_secret")
    for (code, output, errors), part in (
        (lacking, "there is no Hugging Face token here; run hf auth login"),
        (refused, "me/digits could not be uploaded: "),
        (lost, "me/digits could not be uploaded: "),
    ):
        assert code == 2, errors
        assert errors.startswith(f"epsanet: {part}")
        assert errors.count("\n") == 1
        assert output == ""


def test_a_dry_run_lists_everything_and_asks_nobody(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert main(["publish", MODEL, "me/digits", "--dry-run"]) == 0
    text = capsys.readouterr().out
    for path in FOLDER.iterdir():
        (line,) = [line for line in text.splitlines() if f" {path.name} " in line]
        assert f"{path.stat().st_size:,}" in line
    assert "me/digits" in text
    assert '"architecture": "epsanet14_tiny"' in text
    assert "10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in text
    assert "note:" not in text, "the card that training wrote lacks nothing"
    assert "nothing was uploaded" in text


def coins(folder: Path, card: str = CARD) -> Path:
    torch.manual_seed(1)
    save_model(folder, timm.create_model("epsanet14_tiny", num_classes=2), ["heads", "tails"], card=card)
    return folder


def test_hidden_files_stay_at_home_and_pictures_of_the_card_go(tmp_path: Path) -> None:
    folder = coins(tmp_path / "coins")
    (folder / ".env").write_text("secret")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("secret")
    (folder / "curves.png").write_bytes(b"picture")
    assert set(publish(folder, "me/coins", dry_run=True).files) == {
        "README.md",
        "config.json",
        "curves.png",
        "model.safetensors",
    }


@pytest.mark.parametrize(
    ("card", "notes"),
    [
        (CARD, ()),
        ("---\nlibrary_name: timm\n---\n", ("tags", "license", "metrics")),
        (CARD.replace("license: mit\n", ""), ("license",)),
    ],
)
def test_what_a_card_lacks_is_noted(tmp_path: Path, card: str, notes: tuple[str, ...]) -> None:
    result = publish(coins(tmp_path / "coins", card), "me/coins", dry_run=True)
    assert result.notes == tuple(f"the model card names no {key}" for key in notes)
    assert result.url is None


@pytest.mark.parametrize(
    ("model", "repo", "message"),
    [
        ("nothing", "me/x", "nothing is no model folder; .* epsanet convert"),
        ("resnet18.a1_in1k", "me/x", "is no model folder"),
        ("{coins}", "me/x/y", "Repo id"),
        ("{coins}", "../x", "Repo id|repo"),
        ("{bare}", "me/x", r"README\.md does not say library_name: timm"),
        ("{lost}", "me/x", r"has no README\.md"),
        ("{spoilt}", "me/x", r"the head of .*spoilt/README\.md is no YAML: .*; mend it"),
    ],
)
def test_what_is_not_fit_for_the_hub_is_one_line(
    tmp_path: Path, model: str, repo: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cards = {"coins": CARD, "bare": "# Coins\n", "lost": CARD, "spoilt": "---\ntags: [a\n---\n"}
    names = {name: coins(tmp_path / name, card) for name, card in cards.items()}
    (names["lost"] / "README.md").unlink()
    model = model.format(**names)
    with pytest.raises(ValueError, match=message):
        publish(model, repo, dry_run=True)
    assert main(["publish", model, repo, "--dry-run"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
