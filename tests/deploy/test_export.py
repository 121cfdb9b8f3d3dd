"""Exports: what another runtime computes from the file is what the network computes."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import made_once
from making import class_folders
from real_digits import digits
from torch import Tensor, nn

from epsanet import cli, evaluate, kernels, predict
from epsanet.data.config import DataConfig
from epsanet.data.samples import Samples
from epsanet.data.sources import open_split
from epsanet.deploy import export as export_module
from epsanet.deploy import tune
from epsanet.deploy.config import ExportConfig
from epsanet.deploy.export import Exported, compare, export
from epsanet.deploy.images import open_images
from epsanet.deploy.portable import PortablePSA, portable
from epsanet.network.bundle import RuntimeNetwork
from epsanet.network.weights import LoadedModel, load_model


def ignore(_: str) -> None:
    """What an export says."""


def bare_onnx(folder: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "network.onnx", providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


def bare_openvino(folder: Path, images: Tensor) -> Tensor:
    from epsanet._optional import without_telemetry

    without_telemetry()
    import openvino

    compiled = openvino.compile_model(folder / "network.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled(images.numpy())[0].copy())


def bare_pt2(folder: Path, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = torch.export.load(folder / "network.pt2").module()(images)
    return logits


BARE: dict[str, Callable[[Path, Tensor], Tensor]] = {
    "onnx": bare_onnx,
    "openvino": bare_openvino,
    "pt2": bare_pt2,
}


@pytest.mark.parametrize("kind", BARE)
@pytest.mark.filterwarnings("ignore")
def test_the_runtime_alone_gives_the_networks_logits_for_any_number_and_size(
    kind: str, bundles: dict[str, Exported], digits_folder: Path
) -> None:
    model = load_model(digits_folder).model
    assert bundles[kind].dynamic_size
    for shape in ((1, 3, 16, 16), (5, 3, 16, 16), (2, 3, 37, 24)):
        images = torch.randn(shape)
        with torch.no_grad(), kernels.use("reference"):
            expected = model(images)
        assert (BARE[kind](bundles[kind].folder, images) - expected).abs().max() < 1e-4


def test_an_onnx_file_is_whole_plain_and_says_what_it_is(bundles: dict[str, Exported], digits_folder: Path) -> None:
    import onnx

    folder = bundles["onnx"].folder
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "bundle.json", "network.onnx"]
    model = onnx.load(folder / "network.onnx", load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    kinds = [node.op_type for node in model.graph.node]
    assert "BatchNormalization" not in kinds
    assert {node.domain for node in model.graph.node} == {""}
    layers = load_model(digits_folder).model.named_modules()
    convolutions = [name for name, layer in layers if isinstance(layer, nn.Conv2d) and ".se." not in name]
    assert kinds.count("Conv") == len(convolutions)
    told = {entry.key: entry.value for entry in model.metadata_props}
    loaded = load_model(digits_folder)
    assert json.loads(told["label_names"]) == loaded.class_names
    assert json.loads(told["data_config"])["mean"] == pytest.approx(loaded.data_config["mean"])
    assert str(Path.cwd()).encode() not in (folder / "network.onnx").read_bytes()


def test_the_documented_use_of_the_runtimes_runs(
    bundles: dict[str, Exported], digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "tutorials" / "libraries.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(import json\n.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for kind in ("onnx", "openvino"):
        (tmp_path / f"digits-{kind}").symlink_to(bundles[kind].folder)
    said: list[str] = []
    namespace: dict[str, Any] = {"print": lambda *values: said.append(" ".join(map(str, values)))}
    exec(example, namespace)
    loaded = load_model(digits_folder)
    with torch.no_grad():
        wanted = loaded.model(torch.from_numpy(namespace["batch"])).argmax(1)
    assert said == [f"{[loaded.class_names[place] for place in wanted]} True"]


def test_an_openvino_network_says_what_it_is(bundles: dict[str, Exported], digits_folder: Path) -> None:
    import openvino

    network = openvino.Core().read_model(bundles["openvino"].folder / "network.xml")
    loaded = load_model(digits_folder)
    assert json.loads(network.get_rt_info(["epsanet", "label_names"]).astype(str)) == loaded.class_names
    data_config = json.loads(network.get_rt_info(["epsanet", "data_config"]).astype(str))
    assert tuple(data_config["input_size"]) == loaded.data_config["input_size"] == (3, 16, 16)
    assert network.get_rt_info(["epsanet", "architecture"]).astype(str) == "epsanet14_tiny"


@pytest.mark.parametrize("kind", BARE)
def test_predictions_and_evaluations_of_a_bundle_are_those_of_the_model(
    kind: str, bundles: dict[str, Exported], digits_folder: Path, tmp_path: Path
) -> None:
    from PIL import Image
    from sklearn.datasets import load_sample_images

    for place, photograph in enumerate(load_sample_images().images):
        Image.fromarray(photograph).save(tmp_path / f"{place}.png")
    for ours, theirs in zip(predict(bundles[kind].folder, [tmp_path]), predict(digits_folder, [tmp_path]), strict=True):
        assert ours.classes == theirs.classes
        assert ours.probabilities == pytest.approx(theirs.probabilities, abs=1e-4)
    network = bundles[kind].folder / {"onnx": "network.onnx", "openvino": "network.xml", "pt2": "network.pt2"}[kind]
    data = DataConfig(source="digits")
    ours, theirs = (evaluate(model, data, split="test", note=ignore) for model in (network, digits_folder))
    assert np.array_equal(ours.confusion, theirs.confusion)  # type: ignore[attr-defined]
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-4)  # type: ignore[attr-defined]
    assert ours.top1 > 85  # type: ignore[attr-defined]


def test_agreement_is_counted_on_probabilities() -> None:
    before = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    after = torch.tensor([[2.0, 0.0], [0.2, 0.0], [0.0, 3.0], [1.0, 0.0]])
    found = compare(before, after, torch.tensor([0, 1, 0, -1]))
    moved = np.exp(1) / (1 + np.exp(1)) - 1 / (1 + np.exp(0.2))
    assert found.largest == pytest.approx(moved)
    assert found.mean == pytest.approx(moved / 4)
    assert found.same_top1 == 75
    assert found.top1 == pytest.approx((200 / 3, 100 / 3))
    assert compare(before, torch.full_like(after, torch.nan), torch.full((4,), -1)).largest == torch.inf


def test_a_network_that_answers_differently_is_refused_and_an_older_bundle_stays(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(model: nn.Module, forms: Any = None) -> nn.Module:
        network = portable(model, forms)
        next(module for module in network.modules() if isinstance(module, PortablePSA)).scale.data *= 1.01
        return network

    monkeypatch.setattr(export_module, "portable", wrong)
    old = tmp_path / "bundle"
    old.mkdir()
    (old / "bundle.json").write_text("old")
    with made_once({}):
        assert cli.main(["export", str(digits_folder), "--format", "pt2", "--output", str(old)]) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert "answers differently (more than --tolerance 0.0001" in message
        assert [file.name for file in tmp_path.iterdir()] == ["bundle"]
        assert (old / "bundle.json").read_text() == "old"
        limits = ["--tolerance", "0.5", "--agreement", "50"]
        assert cli.main(["export", str(digits_folder), "--format", "pt2", "-o", str(old), *limits]) == 0
    assert isinstance(load_model(old).model, RuntimeNetwork)


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_int8_keeps_the_accuracy_on_the_digits_and_reports_what_the_runtime_does(
    kind: str, bundles: dict[str, Exported], made: dict[str, Any], digits_folder: Path, tmp_path: Path
) -> None:
    config = ExportConfig(format=kind, int8=True, calibrate="digits")  # type: ignore[arg-type]
    with made_once(made):
        found = export(digits_folder, tmp_path / "bundle", config, note=ignore)
    loaded = load_model(digits_folder)
    check = digits("test", loaded, 500)
    with torch.no_grad():
        before = loaded.model(check.images).argmax(1)
    after = BARE[kind](found.folder, check.images).argmax(1)
    assert found.agreement.images == 360
    assert found.agreement.same_top1 == pytest.approx(100 * (before == after).double().mean().item(), abs=0.28)
    assert found.agreement.top1 is not None
    right = [100 * (guess == check.labels).double().mean().item() for guess in (before, after)]
    assert found.agreement.top1 == pytest.approx(right, abs=0.28)  # an image may stand on the edge
    assert right[0] > 98
    assert right[0] - right[1] <= 1.5
    assert 0 < found.agreement.mean < 0.02
    eight_bits = {"onnx": "onnx", "openvino": "bin"}[kind]
    assert (found.folder / f"network.{eight_bits}").stat().st_size < 0.6 * (
        bundles[kind].folder / f"network.{eight_bits}"
    ).stat().st_size


def quietly_exported(loaded: LoadedModel, folder: Path, config: ExportConfig) -> Path:
    return export(loaded, folder, config, note=ignore).folder


def test_accuracy_control_keeps_layers_in_float32_until_top1_holds(digits_folder: Path, tmp_path: Path) -> None:
    """A small network with outliers, on images of which plain int8 takes a third for another class than the network.

    In a process of its own: one in which NNCF's accuracy control has run may crash when it trains.
    """
    loaded = load_model(digits_folder)
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    network: Any = nn.Sequential(*layers, nn.Linear(8, 10)).eval()
    samples, _, _ = open_split(DataConfig(source="digits"), "test", loaded.class_names)
    assert isinstance(samples, Samples)
    check = digits("test", loaded, len(samples))
    with torch.no_grad():
        network[0].weight[0] *= 30
        network[-1].bias -= network(check.images).mean(0)
        expected = network(check.images).argmax(1)
    network.pretrained_cfg = loaded.model.pretrained_cfg
    loaded = dataclasses.replace(loaded, model=network)
    int8 = ExportConfig(format="openvino", int8=True, calibrate="digits", agreement=10)
    plain = export(loaded, tmp_path / "plain", int8, note=ignore).folder
    same = bare_openvino(plain, check.images).argmax(1) == expected
    changed = torch.nonzero(~same)[:10, 0]
    chosen = torch.cat([changed, torch.nonzero(same)[:20, 0]]).tolist()
    for position in chosen:
        place = tmp_path / "images" / str(int(expected[position])) / f"{position}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        samples.open(position).save(place)
    config = dataclasses.replace(int8, images=str(tmp_path / "images"), accuracy_drop=10)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as own:
        careful = own.submit(quietly_exported, loaded, tmp_path / "careful", config).result()
    answers = bare_openvino(careful, check.images[chosen]).argmax(1)
    quantised = [(folder / "network.xml").read_text().count('type="FakeQuantize"') for folder in (plain, careful)]
    assert len(changed) > 6
    assert (answers == expected[chosen]).double().mean() >= 0.9
    assert 0 < quantised[1] < quantised[0]


def test_forms_that_are_measured_faster_are_taken_with_the_same_answers(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last form of each branch is said to be fastest, and then the network of them."""
    raced: list[list[float]] = []

    def race(runs: list[Callable[[Tensor], Tensor]], images: Tensor, **_: Any) -> list[float]:
        answers = [run(images) for run in runs]
        assert all((answer - answers[0]).abs().max() < 1e-4 for answer in answers)
        raced.append([float(len(runs) - place) for place in range(len(runs))])
        return raced[-1]

    monkeypatch.setattr(tune, "race", race)
    monkeypatch.setattr(export_module, "race", race)
    found = export(digits_folder, tmp_path / "bundle", ExportConfig(format="onnx", tune=True), note=ignore)
    groups = [conv.groups for conv in load_model(digits_folder).model.layer4[0].conv2.spc.branches]
    assert groups == [1, 4, 8, 16]
    assert found.forms["layer4.0.conv2"] == [1, 1, 64, 64]  # 16 channels a group are too many to part
    assert found.milliseconds == {1: (2.0, 1.0), 16: (2.0 / 16, 1.0 / 16)}
    assert found.agreement.largest < 1e-4
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = load_model(digits_folder).model(images)
    assert (bare_onnx(found.folder, images) - expected).abs().max() < 1e-4


def test_the_forms_stay_when_no_other_is_measured_faster(digits_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(digits_folder).model
    monkeypatch.setattr(tune, "race", lambda runs, _: [1.0, *[0.99] * (len(runs) - 1)])
    forms = tune.best_forms(model, "pt2", (3, 16, 16), lambda items, *_: items)
    assert len(forms) == 4
    for name, groups in forms.items():
        assert groups == [conv.groups for conv in model.get_submodule(name).spc.branches]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_network_of_one_size_says_so(digits_folder: Path, tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3 * 16 * 16, 10)
            self.pretrained_cfg = {"architecture": "fixed"}

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(1))

    loaded = load_model(digits_folder)
    fixed = LoadedModel(model=Fixed().eval(), class_names=loaded.class_names, data_config=loaded.data_config)
    found = export(fixed, tmp_path / "bundle", ExportConfig(format="pt2"), note=ignore)
    assert not found.dynamic_size
    network, x = load_model(found.folder).model, torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(network(x), fixed.model(x))
    with pytest.raises(ValueError, match="takes 16×16 pixels only, not 32×32"):
        network(torch.zeros(1, 3, 32, 32))


def test_images_of_other_classes_have_no_labels_and_are_refused_only_where_accuracy_counts(
    digits_folder: Path, tmp_path: Path
) -> None:
    loaded, said = load_model(digits_folder), list[str]()
    class_folders(tmp_path / "cameras", {"cam1": 2, "cam2/monday": 1})
    class_folders(tmp_path, {"cameras": 1})
    config = ExportConfig(format="openvino", int8=True, calibrate=str(tmp_path / "cameras"))
    calibration, check = export_module._images(config, loaded, said.append)
    assert calibration is not None
    assert len(calibration) == 4, "at any depth"
    assert check.labels.tolist() == [-1] * 4
    (note,) = said
    assert "'cam1', 'cam2'" in note
    with pytest.raises(ValueError, match="2 of 2 classes are unknown: 'cam1', 'cam2'"):
        export_module._images(dataclasses.replace(config, accuracy_drop=1.0), loaded, said.append)
    class_folders(tmp_path / "known", {"3": 2, "7": 1})
    config = ExportConfig(images=str(tmp_path / "known"))
    assert export_module._images(config, loaded, said.append)[1].labels.tolist() == [3, 3, 7]
    assert said == [note]


def test_linked_folders_hold_images_to_check_with(digits_folder: Path, tmp_path: Path) -> None:
    class_folders(tmp_path / "store", {"cat": 2, "dog": 1})
    (tmp_path / "data").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "store" / name)
    loaded, said = load_model(digits_folder), list[str]()
    found = open_images(str(tmp_path / "data"), loaded.data_config, loaded.class_names, None, note=said.append)
    assert len(found) == 3
    assert "without labels" in said[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "tflite"], "format"),
        (["--int8"], "add --calibrate FOLDER"),
        (["--calibrate", "digits"], "--calibrate is for --int8"),
        (["--int8", "--calibrate", "digits", "--format", "pt2"], "pt2 is float32"),
        (["--int8", "--calibrate", "digits", "--accuracy-drop", "1"], "use it with --int8 --format openvino"),
        (["--tolerance", "2"], "tolerance=2"),
        (["--images", "nowhere", "--format", "pt2"], "there is no data set 'nowhere'"),
        (["--output", "mine"], "mine is there and no bundle"),
    ],
)
def test_impossible_exports_are_refused_in_one_line(
    flags: list[str],
    message: str,
    digits_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert cli.main(["export", str(digits_folder), *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_missing_library_names_the_line_to_install(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(ValueError, match=r"needs onnxscript.*pip install 'epsanet\[deploy\]'"):
        export(digits_folder, tmp_path / "bundle", ExportConfig(), note=ignore)


def test_a_bundle_is_not_exported_again(bundles: dict[str, Exported], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="an exported bundle already"):
        export(bundles["onnx"].folder, tmp_path / "bundle", ExportConfig(), note=ignore)


def test_a_folder_with_other_files_beside_a_bundle_is_left_as_it_is(
    bundles: dict[str, Exported], digits_folder: Path, tmp_path: Path
) -> None:
    """A bundle is replaced as a whole, and a repository around it would go with it."""
    folder = tmp_path / "app"
    shutil.copytree(bundles["pt2"].folder, folder)
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main")
    with pytest.raises(ValueError, match=r"app holds other files than a bundle \(\.git\); name another folder"):
        export(digits_folder, folder, ExportConfig(format="pt2"), note=ignore)
    assert (folder / ".git" / "HEAD").read_text() == "ref: refs/heads/main"


@pytest.mark.parametrize("kind", ["onnx", "openvino", "pt2"])
def test_a_bundle_answers_several_threads_at_once(kind: str, bundles: dict[str, Exported]) -> None:
    model = load_model(bundles[kind].folder).model
    images = [torch.randn(16, 3, 16, 16) for _ in range(48)]
    wanted = [model(x) for x in images]
    with ThreadPoolExecutor(4) as pool:
        for found, one in zip(pool.map(model, images), wanted, strict=True):
            torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-5)


def test_bundles_are_told_apart_by_their_state(bundles: dict[str, Exported], tmp_path: Path) -> None:
    """Prediction resumes by the state of a model: another bundle must not go on where this one stopped."""
    states = {kind: load_model(found.folder).model.state_dict()["digest"] for kind, found in bundles.items()}
    assert not torch.equal(states["onnx"], states["pt2"])
    shutil.copytree(bundles["openvino"].folder, tmp_path / "copy")
    assert torch.equal(load_model(tmp_path / "copy").model.state_dict()["digest"], states["openvino"])
    weights = bytearray((tmp_path / "copy" / "network.bin").read_bytes())
    weights[100] ^= 1
    (tmp_path / "copy" / "network.bin").write_bytes(weights)
    assert not torch.equal(load_model(tmp_path / "copy").model.state_dict()["digest"], states["openvino"])


def test_a_bundle_can_be_moved(bundles: dict[str, Exported], tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16)
    for kind, found in bundles.items():
        moved = tmp_path / kind
        shutil.copytree(found.folder, moved)
        names = [str(found.folder).encode(), str(found.folder.parent).encode()]
        assert not any(name in file.read_bytes() for file in moved.iterdir() for name in names)
        assert load_model(moved).class_names == [str(number) for number in range(10)]
        torch.testing.assert_close(load_model(moved).model(x), load_model(found.folder).model(x))


def test_nothing_is_reported_over_the_network(bundles: dict[str, Exported]) -> None:
    """OpenVINO and NNCF report their use, unless the library that does it looks missing."""
    import sys

    assert bundles
    assert sys.modules["openvino_telemetry"] is None
