"""The page under load: latency, throughput and what becomes of hostile requests, beside the bare forward pass.

    python benchmarks/serve.py [--model epsanet14_tiny.digits] [--clients 16] [--requests 2000]

Each client sends digits one after the other, each answer is compared with what the network itself says, and every
tenth request is one that must be refused. Then more requests than the queue takes are sent at once.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Answer:
    """Of the server, as it came."""

    status: int
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Visitor:
    """Talks HTTP with the page, and hides nothing of what it says.

    Args:
        url: of the page.
    """

    def __init__(self, url: str) -> None:
        self.host = url.removeprefix("http://").strip("/")

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        """One request on a connection of its own; the path goes over the wire as it is."""
        connection = http.client.HTTPConnection(self.host, timeout=120)
        try:
            connection.putrequest(method, path, skip_host="host" in (headers or {}))
            for name, value in (headers or {}).items():
                connection.putheader(name, value)
            if body is not None and "content-length" not in (headers or {}):
                connection.putheader("content-length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            return Answer(response.status, response.read())
        finally:
            connection.close()

    def upload(self, content: bytes, name: str = "picture.png") -> Answer:
        """Send a file; the answer is a list with its place on the server."""
        edge = uuid.uuid4().hex
        head = f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        body = head.encode() + content + f"\r\n--{edge}--\r\n".encode()
        return self.ask("POST", "/gradio_api/upload", body, {"content-type": f"multipart/form-data; boundary={edge}"})

    def call(self, function: str, *data: Any) -> Answer:
        """Ask for a function; the answer names the event."""
        body = json.dumps({"data": data}).encode()
        return self.ask("POST", f"/gradio_api/call/{function}", body, {"content-type": "application/json"})

    def result(self, function: str, event: str) -> Any:
        """What a function returned; ``RuntimeError`` with its message where it failed."""
        text = self.ask("GET", f"/gradio_api/call/{function}/{event}").body.decode()
        kind, data = re.findall(r"event: (\w+)\ndata: (.*)", text)[-1]
        if kind != "complete":
            raise RuntimeError(data)
        return json.loads(data)

    def use(self, function: str, content: bytes, *data: Any) -> Any:
        """Upload a picture and call a function of it."""
        (place,) = self.upload(content).json()
        asked = self.call(function, file_data(place), *data)
        if asked.status != 200:
            raise RuntimeError(f"{asked.status} {asked.body.decode()}")
        return self.result(function, asked.json()["event_id"])[0]


def file_data(place: str) -> dict[str, Any]:
    """A file as Gradio's functions take it."""
    return {"path": place, "meta": {"_type": "gradio.FileData"}}


@dataclass(frozen=True)
class Load:
    """What came of many requests."""

    seconds: list[float]
    """Of each that was answered."""
    wrong: int
    """Answers that were not those of the picture sent, or were none."""
    refused: int
    """Hostile requests that were refused."""
    hostile: int
    elapsed: float


HOSTILE: tuple[Callable[[Visitor, str], bool], ...] = (
    lambda visitor, model: _fails(lambda: visitor.use("predict", b"no picture at all", model, 0.5)),
    lambda visitor, model: visitor.call("predict", file_data("/etc/passwd"), model, 0.5).status == 400,
    lambda visitor, _: visitor.ask("GET", "/gradio_api/file=/etc/passwd").status == 404,
    lambda visitor, _: visitor.upload(b"\0" * (21 * 2**20)).status == 413,
)


def _fails(action: Callable[[], Any]) -> bool:
    try:
        action()
    except RuntimeError:
        return True
    return False


def load(url: str, model: str, pictures: list[bytes], expected: list[str], clients: int, requests: int) -> Load:
    """Send requests from several clients at once, every tenth of them hostile.

    Args:
        url: of the page.
        model: its name on the page.
        pictures: PNG files.
        expected: best class of each.
        clients: at the same time.
        requests: of all together.
    """
    lock, waiting = threading.Lock(), iter(range(requests))
    seconds: list[float] = []
    wrong = refused = hostile = 0

    def client() -> None:
        nonlocal wrong, refused, hostile
        visitor = Visitor(url)
        while True:
            with lock:
                number = next(waiting, None)
            if number is None:
                return
            if number % 10 == 9:
                good = HOSTILE[number // 10 % len(HOSTILE)](visitor, model)
                with lock:
                    hostile, refused = hostile + 1, refused + good
                continue
            place, started = number % len(pictures), time.perf_counter()
            try:
                best = visitor.use("predict", pictures[place], model, 0.5)["classes"][0]["class"]
            except (RuntimeError, OSError, http.client.HTTPException):
                best = ""
            with lock:
                seconds.append(time.perf_counter() - started)
                wrong += best != expected[place]

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for future in [pool.submit(client) for _ in range(clients)]:
            future.result()
    return Load(seconds, wrong, refused, hostile, time.perf_counter() - started)


def overflow(url: str, model: str, picture: bytes, requests: int) -> tuple[list[float], int]:
    """Ask for more at once than the queue takes: seconds until each refusal, and how many of the rest were answered."""
    visitor = Visitor(url)
    (place,) = visitor.upload(picture).json()

    def ask(_: int) -> tuple[Answer, float]:
        started = time.perf_counter()
        return visitor.call("predict", file_data(place), model, 0.5), time.perf_counter() - started

    with ThreadPoolExecutor(requests) as pool:
        asked = list(pool.map(ask, range(requests)))
        events = [answer.json()["event_id"] for answer, _ in asked if answer.status == 200]
        answered = sum(bool(found) for found in pool.map(lambda event: visitor.result("predict", event), events))
    refusals = [seconds for answer, seconds in asked if answer.status == 503]
    if len(refusals) + answered != requests:
        raise RuntimeError(f"{requests - len(refusals) - answered} of {requests} requests were lost")
    return refusals, answered


def start(models: list[str], log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A server at a free port, and its address.

    Args:
        models: for ``epsanet serve``.
        log: that its output goes to.
    """
    with log.open("wb") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "epsanet", "serve", *models, "--port", "0"],
            stdout=file,
            stderr=file,
            # A shell has what it runs in the background ignore Ctrl-C, and so does what that starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    while not (found := re.search(r"http://[\d.:]+", log.read_text())):
        if server.poll() is not None:
            raise RuntimeError(f"epsanet serve ended: {log.read_text()}")
        time.sleep(0.01)
    return server, found[0]


def digits(count: int) -> list[bytes]:
    """Digits of scikit-learn as PNG files."""
    from epsanet.data.samples import DigitsSamples

    samples, files = DigitsSamples(), []
    for position in range(count):
        file = io.BytesIO()
        samples.open(position).convert("RGB").save(file, "PNG")
        files.append(file.getvalue())
    return files


def _forward(model: str, pictures: list[bytes]) -> tuple[list[str], list[float]]:
    """Best classes and seconds of the network alone, with decoding and preprocessing outside the clock."""
    import torch

    from epsanet.data.images import read_image
    from epsanet.data.loaders import evaluation_transform
    from epsanet.network.weights import load_model
    from epsanet.tasks.inference import inference_network

    loaded = load_model(model)
    network = inference_network(loaded.model, loaded.data_config["input_size"], torch.device("cpu"))
    transform = evaluation_transform(loaded.data_config)
    images = [transform(read_image(Image.open(io.BytesIO(picture))))[None] for picture in pictures]
    names, seconds = [], []
    with torch.inference_mode():
        network(images[0])
        for image in images:
            started = time.perf_counter()
            names.append(loaded.class_names[int(network(image).argmax())])
            seconds.append(time.perf_counter() - started)
    return names, seconds


def _memory(process: int) -> tuple[int, int]:
    """Resident bytes of a process, and the most that they were."""
    status = Path(f"/proc/{process}/status").read_text()
    now, most = (int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


def _disk(folder: str) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="epsanet14_tiny.digits")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=2000)
    chosen = parser.parse_args()
    pictures = digits(200)
    expected, alone = _forward(chosen.model, pictures)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TMPDIR"] = scratch  # where the server keeps what is uploaded
        _measure(chosen, pictures, expected, alone, scratch)


def _measure(
    chosen: argparse.Namespace, pictures: list[bytes], expected: list[str], alone: list[float], scratch: str
) -> None:
    server, url = start([chosen.model], Path(scratch) / "log")
    try:
        name = Path(chosen.model).name
        before, _ = _memory(server.pid)
        found = load(url, name, pictures, expected, chosen.clients, chosen.requests)
        disk = _disk(scratch)
        refusals, answered = overflow(url, name, pictures[0], 120)
        time.sleep(10)
        started = time.perf_counter()
        Visitor(url).use("predict", pictures[0], name, 0.5)
        healthy, (after, most) = time.perf_counter() - started, _memory(server.pid)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()
    p50, p95 = (statistics.quantiles(found.seconds, n=100)[place - 1] for place in (50, 95))
    print(f"| {chosen.clients} clients, {chosen.requests:,} requests | |\n|---|---:|")
    print(f"| answers lost or of another picture | {found.wrong} |")
    print(f"| hostile requests refused | {found.refused} of {found.hostile} |")
    print(f"| p50, p95 [ms] | {1e3 * p50:.0f}, {1e3 * p95:.0f} |")
    print(f"| pictures a second | {len(found.seconds) / found.elapsed:.1f} |")
    print(
        f"| forward pass alone: p50 [ms], pictures a second | {1e3 * statistics.median(alone):.2f}, "
        f"{1 / statistics.mean(alone):.0f} |"
    )
    print(
        f"| of 120 at once: answered, refused, slowest refusal [ms] | {answered}, {len(refusals)}, "
        f"{1e3 * max(refusals, default=0):.0f} |"
    )
    print(f"| one picture ten seconds later [ms] | {1e3 * healthy:.0f} |")
    print(f"| resident memory before, at most, after [MB] | {before / 1e6:.0f}, {most / 1e6:.0f}, {after / 1e6:.0f} |")
    print(f"| files of the server after the load, after its end [MB] | {disk / 1e6:.1f}, {_disk(scratch) / 1e6:.1f} |")


if __name__ == "__main__":
    main()
