"""The page for programs: its answers are those of the network, under load too, and the documented example runs."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CIFAR, DIGITS, Server, load
from PIL import Image

from epsanet.insight.explain import explain
from epsanet.network.detectors import load_detector
from epsanet.network.weights import load_model
from epsanet.tasks.detection.predict import detect
from epsanet.tasks.predict import predict

ROOT = Path(__file__).parents[2]
DIGIT = load.digits(4)[3]


@pytest.fixture
def digit(tmp_path: Path) -> Path:
    (tmp_path / "digit.png").write_bytes(DIGIT)
    return tmp_path / "digit.png"


def test_classes_are_those_that_predict_gives(server: Server, digit: Path) -> None:
    for model in (DIGITS, CIFAR):
        (row,) = predict(model, [digit], note=lambda _: None)
        found = server.visitor.use("predict", DIGIT, model, 0.5)
        assert found["model"] == model
        assert [entry["class"] for entry in found["classes"]] == list(row.classes)
        given = [entry["probability"] for entry in found["classes"]]
        np.testing.assert_allclose(given, row.probabilities, atol=1e-5)


def test_scales_and_picture_are_those_that_explain_gives(server: Server, digit: Path) -> None:
    (wanted,) = explain(load_model(DIGITS), [digit])
    found = server.visitor.use("scales", DIGIT, DIGITS)
    assert [entry["block"] for entry in found] == [module.name.removesuffix(".conv2") for module in wanted.scales]
    for entry, module in zip(found, wanted.scales, strict=True):
        assert entry["kernel_sizes"] == [3, 5, 7, 9]
        np.testing.assert_allclose(entry["attention"], module.attention_NS[0], atol=1e-5)
        np.testing.assert_allclose(entry["energy"], module.contribution_NS[0], atol=1e-5)
    place = server.visitor.use("picture", DIGIT, DIGITS, 0.5)["path"]
    overlay = np.asarray(
        Image.open(io.BytesIO(server.visitor.ask("GET", f"/gradio_api/file={place}").body)).convert("RGB")
    ).astype(float)
    assert wanted.cam is not None
    side = len(overlay) // len(wanted.cam)
    red = overlay[side // 2 :: side, side // 2 :: side, 0]
    assert np.corrcoef(red.ravel(), wanted.cam.ravel())[0, 1] > 0.5, "it is bright where Grad-CAM is"


def test_objects_are_those_that_detect_gives_above_the_score(
    server: Server, digit: Path, detector_folder: Path
) -> None:
    loaded = load_detector(detector_folder)
    (every,) = detect(loaded, [digit], score_thresh=0.05)
    middle = float(np.median(every.scores))
    for score in (0.05, middle):
        (wanted,) = detect(loaded, [digit], score_thresh=score)
        found = server.visitor.use("predict", DIGIT, "finder", score)
        assert (found["width"], found["height"]) == (32, 32)
        assert [entry["class"] for entry in found["objects"]] == list(wanted.classes)
        np.testing.assert_allclose([entry["score"] for entry in found["objects"]], wanted.scores, atol=1e-5)
        np.testing.assert_allclose([entry["box"] for entry in found["objects"]], wanted.boxes, atol=1e-3)
    assert 0 < len(wanted.scores) < len(every.scores)


@pytest.mark.parametrize(
    ("content", "model", "message"),
    [
        (b"no picture", DIGITS, "this picture cannot be used: no JPEG, PNG or WebP picture"),
        (DIGIT[:-60], DIGITS, "this picture cannot be used: damaged"),
        (DIGIT, "another", "'another' is none of epsanet14_tiny.digits, "),
    ],
)
def test_a_refusal_says_why(server: Server, content: bytes, model: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        server.visitor.use("predict", content, model, 0.5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({0: 3}, "3 is no file as an upload gives it"),
        ({0: {"size": "x"}}, "is no file as an upload gives it"),
        ({0: {"meta": 3}}, "is no file as an upload gives it"),
        ({1: None}, "None is none of epsanet14_tiny.digits, "),
        ({1: ["x" * 500]}, "xx... is none of epsanet14_tiny.digits, "),
        ({2: "0.5"}, "'0.5' is no number from 0.05 to 1"),
        ({2: None}, "None is no number from 0.05 to 1"),
        ({2: True}, "True is no number from 0.05 to 1"),
        ({2: 10**400}, "... is no number from 0.05 to 1"),
        ({2: 7}, "7 is no number from 0.05 to 1"),
        ({3: 7}, "3 values are needed, in a list"),
    ],
)
def test_a_value_that_a_function_cannot_take_is_named(server: Server, changed: dict[int, Any], message: str) -> None:
    """Gradio answers most of them without a reason, and prints a traceback in the server's terminal."""
    (place,) = server.visitor.upload(DIGIT).json()
    values: dict[int, Any] = {0: load.file_data(place), 1: DIGITS, 2: 0.5}
    for position, value in changed.items():
        values[position] = {**values[0], **value} if isinstance(value, dict) else value
    answer = server.visitor.call("predict", *values.values())
    (detail,) = answer.json()["detail"]
    assert answer.status == 422
    assert message in detail["message"]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("call/predict", b"[1]", 422, "no object with a list"),
        ("call/nothing", b'{"data": []}', 422, "there is no function 'nothing'"),
        ("queue/join", b'{"data": [], "fn_index": 999, "session_hash": "a"}', 422, "there is no function 999"),
        ("run/predict", b'{"data": [1], "fn_index": 99}', 422, "there is no function 99"),
        ("queue/join", b'{"data": [], "fn_index": [1], "session_hash": "a"}', 422, "there is no function [1]"),
        ("call/predict", b'{"data": [null, null, NaN]}', 400, "this is no JSON"),
        ("cancel", b'{"event_id": NaN}', 400, "this is no JSON"),
    ],
)
def test_a_request_that_is_none_is_refused(server: Server, path: str, body: bytes, status: int, message: str) -> None:
    answer = server.visitor.ask("POST", f"/gradio_api/{path}", body, {"content-type": "application/json"})
    assert (answer.status, message in answer.body.decode()) == (status, True)


def test_gradios_client_says_what_is_wrong(server: Server, digit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("gradio_client")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    session = client.Client(server.url, verbose=False, download_files=False)
    with pytest.raises(ValueError, match="model: 'another' is none of epsanet14_tiny"):
        session.predict(client.handle_file(digit), "another", api_name="/predict")


def test_the_documented_example_runs(server: Server, digit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio_client")
    (example,) = re.findall(r"```python\n(from gradio_client.*?)```", (ROOT / "docs/serve.md").read_text(), re.DOTALL)
    (output,) = re.findall(
        r"```python\nfrom gradio_client.*?```\n\n```text\n(.*?)```", (ROOT / "docs/serve.md").read_text(), re.DOTALL
    )
    monkeypatch.chdir(digit.parent)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(digit.parent))
    said: list[str] = []
    namespace: dict[str, Any] = {"print": lambda *values: said.append(" ".join(map(str, values)))}
    exec(example.replace("http://127.0.0.1:7860", server.url), namespace)
    assert said == output.splitlines()
    with Image.open(namespace["picture"]) as picture:
        assert picture.size == (448, 448)


def test_many_clients_get_their_own_answers_and_the_hostile_none(server: Server) -> None:
    pictures = load.digits(24)
    names, _ = load._forward(DIGITS, pictures)
    assert len(set(names)) == 10
    found = load.load(server.url, DIGITS, pictures, names, clients=16, requests=80)
    assert (found.wrong, len(found.seconds)) == (0, 72)
    assert (found.refused, found.hostile) == (8, 8)


def test_what_the_queue_does_not_take_is_refused_at_once_and_the_rest_is_answered(server: Server) -> None:
    refusals, answered = load.overflow(server.url, DIGITS, DIGIT, 60)
    assert refusals
    assert answered >= 32
    time.sleep(0.1)
    assert server.visitor.use("predict", DIGIT, DIGITS, 0.5)["classes"][0]["class"] == "3"
