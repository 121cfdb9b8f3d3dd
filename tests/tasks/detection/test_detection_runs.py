"""A detector is trained, evaluated and used by the same commands as a classifier."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import os
import shlex
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from detecting import BACKBONE, BACKBONE_ARGS, coco_folder, detector_config
from PIL import Image
from tasks_reading import same_state

import epsanet
from epsanet import cli
from epsanet.cli.predict import _detect
from epsanet.data.coco import CocoSamples, read_rle
from epsanet.data.config import DataConfig
from epsanet.data.images import read_image
from epsanet.network.detectors import PastedMasks, load_detector
from epsanet.tasks.config import OptimizerConfig, ScheduleConfig, TrainConfig, load_recipe, recipe_names
from epsanet.tasks.detection.evaluate import evaluate_detector
from epsanet.tasks.detection.predict import Detections, detect, draw
from epsanet.tasks.train import TrainResult, train

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in pycocotools


def config(data: Path, output: Path, epochs: int = 2) -> TrainConfig:
    return TrainConfig(
        model=BACKBONE,
        model_args=BACKBONE_ARGS,
        detector=detector_config(min_size=48, max_size=64, score_thresh=0.01),
        data=DataConfig(source=str(data), batch_size=2, workers=0, scale_jitter=(0.9, 1.1)),
        optimizer=OptimizerConfig(opt="adamw", lr=1e-3),
        schedule=ScheduleConfig(epochs=epochs),
        device="cpu",
        output=str(output),
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last image to validate on stands upright; the others lie."""
    folder = coco_folder(tmp_path_factory.mktemp("objects"))
    file = folder / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    content["images"][-1].update(width=40, height=90)
    file.write_text(json.dumps(content))
    Image.effect_noise((40, 90), 60).convert("RGB").save(folder / "val" / "5.png")
    return folder


@pytest.fixture(scope="module")
def recorded(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, str]:
    """A run and what it printed; trained once, tests read it and change nothing in it."""
    from epsanet.tasks import console

    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console.console, "_file", text)
        return train(config(data, tmp_path_factory.mktemp("runs") / "run")), text.getvalue()


@pytest.fixture(scope="module")
def trained(recorded: tuple[TrainResult, str]) -> TrainResult:
    return recorded[0]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command; gives its exit code and what it printed."""
    from epsanet.tasks import console

    def run(*words: str) -> tuple[int, str, str]:
        with contextlib.ExitStack() as stack:
            for place, stream in ((console.console, io.StringIO()), (console.messages, io.StringIO())):
                patch = stack.enter_context(pytest.MonkeyPatch.context())
                patch.setattr(place, "_file", stream)
            code = cli.main(words)
            printed = [place._file.getvalue() for place in (console.console, console.messages)]  # type: ignore[union-attr]
        captured = capsys.readouterr()
        return code, captured.out + printed[0], captured.err + printed[1]

    return run


def test_the_run_folder_has_every_file_and_a_row_an_epoch(trained: TrainResult) -> None:
    pictures = ["curves", "precision_recall", "confusion_matrix", "train_batch", "val_batch", "worst"]
    for name in pictures:
        with Image.open(trained.run / f"{name}.png") as image:
            assert min(image.size) > 200
    with (trained.run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for row in rows:
        parts = [float(value) for name, value in row.items() if name.startswith("train_loss_")]
        assert len(parts) == 5
        assert sum(parts) == pytest.approx(float(row["train_loss"]), rel=1e-5)
        assert 0 <= float(row["val_box_ap"]) <= float(row["val_box_ap50"]) <= 1
    config = json.loads((trained.model / "config.json").read_text())
    assert (config["task"], config["architecture"], config["backbone"]) == ("object-detection", "mask_rcnn", BACKBONE)
    assert config["label_names"] == ["ant", "cat"]
    card = (trained.model / "README.md").read_text()
    assert f"# Mask R-CNN on {BACKBONE}" in card
    assert f"| boxes | {trained.evaluation.box.ap:.3f} |" in card  # type: ignore[union-attr]


def test_training_evaluation_and_prediction_agree(trained: TrainResult, data: Path, tmp_path: Path) -> None:
    """One model folder, three ways: the same boxes, scores and masks, but for rounding by the optimised backbone."""
    evaluation = evaluate_detector(
        trained.run, DataConfig(source=str(data), batch_size=4, workers=0), device="cpu", output=tmp_path / "found.json"
    )
    assert evaluation.as_dict()["objects"] == 10
    rows = {row["image_id"]: [] for row in json.loads((tmp_path / "found.json").read_text())}
    for row in json.loads((tmp_path / "found.json").read_text()):
        rows[row["image_id"]].append(row)
    assert sum(map(len, rows.values())) > 5
    detections = list(detect(trained.model, [data / "val"], score_thresh=0, batch_size=1, device="cpu"))
    samples = CocoSamples(data / "annotations" / "instances_val.json", data / "val")
    loaded = load_detector(trained.model)
    for position, found in enumerate(detections):
        assert found.image == samples.name(position)
        wanted = rows.get(samples.image_id(position), [])
        assert list(found.scores) == pytest.approx([row["score"] for row in wanted], abs=1e-5)
        assert [{"ant": 3, "cat": 8}[name] for name in found.classes] == [row["category_id"] for row in wanted]
        corners = [[x, y, x + width, y + height] for x, y, width, height in (row["bbox"] for row in wanted)]
        assert np.array(found.boxes).ravel() == pytest.approx(np.array(corners).ravel(), abs=1e-3)
        with torch.inference_mode():
            pixels = torch.from_numpy(np.array(Image.open(found.image).convert("RGB"))).permute(2, 0, 1) / 255
            (own,) = loaded.model([pixels])
        assert list(found.scores) == pytest.approx(own["scores"].tolist(), abs=1e-5)
        assert found.masks is not None
        for mask, wanted_mask in zip(found.masks, own["masks"], strict=True):
            assert np.mean(read_rle(mask, found.height, found.width) != wanted_mask.numpy()) < 1e-3


def test_the_evaluation_that_a_run_advises_gives_its_own_numbers(recorded: tuple[TrainResult, str], said: Any) -> None:
    result, printed = recorded
    (line,) = (line for line in printed.splitlines() if line.startswith("evaluate  "))
    words = shlex.split(line)
    assert words[1:3] == ["epsanet", "evaluate"]
    assert words[-4:] == ["--split", "val", "--device", "cpu"]
    code, output, _ = said(*words[2:], "--json", "--data.workers=0")
    assert code == 0
    assert json.loads(output[output.index("{\n") :]) == result.evaluation.as_dict()


def test_what_is_found_in_an_image_does_not_depend_on_those_beside_it(
    trained: TrainResult, data: Path, tmp_path: Path
) -> None:
    """An upright image, and one that cannot be read; to the last bit."""
    model = load_detector(trained.model)
    (tmp_path / "broken.png").write_bytes(b"words")
    paths = [data / "val" / "5.png", data / "val" / "0.png", tmp_path / "broken.png", data / "val" / "1.png"]
    alone = [row for path in paths for row in detect(model, [path], score_thresh=0.02, device="cpu", note=[].append)]
    for size in (2, 4):
        assert list(detect(model, paths, score_thresh=0.02, batch_size=size, device="cpu", note=[].append)) == alone
    assert [bool(row.error) for row in alone] == [False, False, True, False]
    assert sum(len(row.boxes) for row in alone) > 3


def test_masks_of_an_image_are_never_all_in_memory(
    trained: TrainResult, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 64 megapixels, a hundred would take 6.4 GB."""
    living: list[weakref.ref[torch.Tensor]] = []
    original = PastedMasks.__getitem__

    def drawn(self: PastedMasks, place: int) -> torch.Tensor:
        assert sum(one() is not None for one in living) <= 1
        mask = original(self, place)
        living.append(weakref.ref(mask))
        return mask

    def together(_: PastedMasks) -> None:
        raise AssertionError

    monkeypatch.setattr(PastedMasks, "__getitem__", drawn)
    monkeypatch.setattr(PastedMasks, "together", together)
    for row in detect(trained.model, [data / "val"], score_thresh=0.02, device="cpu"):
        draw(row)
    assert len(living) > 3
    found = len(living)
    evaluate_detector(trained.model, DataConfig(source=str(data), workers=0), device="cpu")
    assert len(living) > found


def test_the_backbone_is_optimised_on_cpus_and_nothing_is_where_the_reference_is_asked_for(
    trained: TrainResult, data: Path
) -> None:
    from epsanet import kernels
    from epsanet.network.optimize import OptimizedNetwork
    from epsanet.tasks.detection.inference import inference_detector

    said: list[str] = []
    found = list(detect(trained.model, [data / "val"], score_thresh=0.02, device="cpu", note=said.append))
    assert said == ["the network is optimised for this CPU (epsanet.optimize): norms folded, native kernels"]
    with kernels.use("reference"):
        plain = list(detect(trained.model, [data / "val"], score_thresh=0.02, device="cpu", note=said.append))
    assert len(said) == 1
    for one, other in zip(found, plain, strict=True):
        assert one.classes == other.classes
        assert list(one.scores) == pytest.approx(list(other.scores), abs=1e-5)
        assert np.array(one.boxes).ravel() == pytest.approx(np.array(other.boxes).ravel(), abs=1e-3)
    loaded = load_detector(trained.model).model
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    fast = inference_detector(loaded, torch.device("cpu"))
    assert isinstance(fast.network.backbone.body, OptimizedNetwork)
    assert loaded.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())


def test_a_run_starts_from_a_detector_and_goes_on_without_it(trained: TrainResult, data: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(trained.model, source)
    content = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**content, "mean": [0.4, 0.5, 0.6]}))
    start = dataclasses.replace(
        config(data, tmp_path / "run", epochs=1),
        model="auto",
        model_args={},
        init_from=str(source),
        optimizer=OptimizerConfig(lr=1e-12),
    )
    result = train(start)
    kept = load_recipe(str(result.run / "config.yaml"))
    assert (kept.model, kept.model_args, kept.data.mean) == (BACKBONE, BACKBONE_ARGS, (0.4, 0.5, 0.6))
    found, wanted = (load_detector(folder).model.network for folder in (result.model, source))
    assert found.transform.image_mean == [0.4, 0.5, 0.6]
    for name, parameter in found.named_parameters():
        assert torch.allclose(parameter, wanted.get_parameter(name), atol=1e-6), name
    shutil.rmtree(source)
    assert train(resume=result.run).evaluation.as_dict() == result.evaluation.as_dict()


def test_several_processes_do_not_write_one_file_of_detections(
    trained: TrainResult, data: Path, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, errors = said("predict", str(trained.model), str(data / "val"))
    assert (code, errors) == (2, "epsanet: a detector predicts in one process; give each its own images and --output\n")


def test_a_run_that_goes_on_ends_as_one_that_was_never_stopped(
    trained: TrainResult, data: Path, tmp_path: Path
) -> None:
    class StopError(Exception):
        pass

    from epsanet.tasks.detection.module import DetectorModule

    steps = []
    original = DetectorModule.training_step

    def stop(self: Any, batch: Any, index: int) -> Any:
        if self.current_epoch == 1 and index == 1:
            raise StopError
        steps.append(index)
        return original(self, batch, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DetectorModule, "training_step", stop)
        with pytest.raises(StopError):
            train(config(data, tmp_path / "run"))
    again = train(resume=tmp_path / "run")
    ends = [
        torch.load(result.run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for result in (again, trained)
    ]
    same_state(ends[0], ends[1])


def test_commands_tell_a_detector_from_its_folder(trained: TrainResult, data: Path, tmp_path: Path, said: Any) -> None:
    code, output, _ = said("evaluate", str(trained.model), "--data", str(data), "--data.workers=0", "--device=cpu")
    assert code == 0
    assert f"box: AP {trained.evaluation.box.ap:.3f}" in output  # type: ignore[union-attr]
    pictures, table = tmp_path / "drawn", tmp_path / "found.csv"
    (tmp_path / "broken.png").write_bytes(b"words")
    code, _, messages = said(
        "predict",
        str(trained.run),
        str(data / "val"),
        str(tmp_path / "broken.png"),
        f"--output={table}",
        f"--pictures={pictures}",
        "--score_thresh=0.05",
        "--device=cpu",
    )
    assert code == 0
    assert "1 of 7 images could not be read" in messages
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[-1]["image"].endswith("broken.png")
    assert "not an image" in rows[-1]["error"]
    assert all(float(row["score"]) >= 0.05 for row in rows[:-1])
    assert {path.name for path in pictures.iterdir()} == {f"{number}.png" for number in range(6)}


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_a_file_name_that_is_no_utf_8_is_written_as_it_can_be(
    suffix: str, trained: TrainResult, data: Path, tmp_path: Path, said: Any
) -> None:
    strange = tmp_path / "images" / os.fsdecode(b"caf\xe9.png")
    strange.parent.mkdir()
    shutil.copy(data / "val" / "0.png", strange)
    (tmp_path / "images" / os.fsdecode(b"\xff.png")).write_bytes(b"words")
    words = ["predict", str(trained.model), str(tmp_path / "images"), "--score_thresh=0.02", "--device=cpu"]
    path, pictures = tmp_path / f"found.{suffix}", tmp_path / "drawn"
    code, _, _ = said(*words, f"--output={path}", f"--pictures={pictures}")
    assert code == 0
    assert [os.fsencode(picture.name) for picture in pictures.iterdir()] == [b"caf\xe9.png"]
    if suffix == "parquet":
        import pandas

        names = list(pandas.read_parquet(path)["image"])
    elif suffix == "json":
        names = [image["image"] for image in json.loads(path.read_text())]
    else:
        with path.open(newline="", encoding="utf-8") as file:
            names = [row["image"] for row in csv.DictReader(file)]
    assert set(names) == {f"{tmp_path}/images/{name}.png" for name in ("caf\\xe9", "\\xff")}


@pytest.mark.parametrize("suffix", [".csv", ".json", ".parquet"])
def test_tables_hold_what_was_found(suffix: str, trained: TrainResult, data: Path, tmp_path: Path) -> None:
    from epsanet.tasks.detection.predict import write_detections

    path = tmp_path / f"found{suffix}"
    found = list(write_detections(path, detect(trained.model, [data / "val"], score_thresh=0.02, device="cpu")))
    wanted = [
        (row.image, name, score, *box, mask["counts"])
        for row in found
        for name, score, box, mask in zip(row.classes, row.scores, row.boxes, row.masks or (), strict=True)
    ]
    assert len(wanted) > 3
    if suffix == ".json":
        content = json.loads(path.read_text())
        read = [
            (image["image"], one["class"], one["score"], *one["box"], one["mask"]["counts"])
            for image in content
            for one in image["detections"]
        ]
        assert [image["width"] for image in content] == [64] * 5 + [40]
    else:
        import pandas

        frame = pandas.read_csv(path, keep_default_na=False) if suffix == ".csv" else pandas.read_parquet(path)
        columns = ["image", "class", "score", "x0", "y0", "x1", "y1", "mask_counts"]
        read = list(frame[columns].itertuples(index=False, name=None))
    for one, other in zip(read, wanted, strict=True):
        assert (one[0], one[1], one[-1]) == (other[0], other[1], other[-1])
        assert [float(number) for number in one[2:-1]] == pytest.approx(list(other[2:-1]), rel=1e-6)


@pytest.mark.parametrize(
    ("mode", "size", "score_thresh"),
    [
        ("RGB", (4000, 3000), 0.5),  # masks of 12 million pixels take seconds where anything counts
        ("RGB", (2000, 1500), 0.0),
        ("RGB", (32, 32), 0.0),
        ("L", (100, 70), 0.0),
        ("CMYK", (70, 100), 0.0),
    ],
)
def test_images_of_any_kind_are_looked_at(
    mode: str, size: tuple[int, int], score_thresh: float, trained: TrainResult, tmp_path: Path
) -> None:
    """What is found is what is found in the same pixels in RGB."""
    path, copy = tmp_path / "image.jpg", tmp_path / "copy.bmp"
    coarse = size[0] // 4, size[1] // 4
    noise = np.random.default_rng(0).bytes(coarse[0] * coarse[1] * len(mode))
    Image.frombytes(mode, coarse, noise).resize(size, Image.Resampling.NEAREST).save(path)
    read_image(path).save(copy)
    found, plain = detect(trained.model, [path, copy], score_thresh=score_thresh, device="cpu")
    assert (found.width, found.height) == size
    assert found.error == ""
    assert len(found.boxes) > 3 or score_thresh
    assert (found.boxes, found.scores, found.classes) == (plain.boxes, plain.scores, plain.classes)
    for x0, y0, x1, y1 in found.boxes:
        assert 0 <= x0 < x1 <= size[0]
        assert 0 <= y0 < y1 <= size[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "{model}", "--data", "{data}", "--split", "test"], "no COCO JSON for test"),
        (["evaluate", "{model}", "--data", "{data}", "--output", "x.csv"], "does not end in .json"),
        (["evaluate", "{model}", "--data", "{data}", "--output", "{folder}.json"], "a.json is a folder"),
        (["predict", "{model}", "{data}", "--output", "{folder}.csv"], "a.csv is a folder"),
        (["evaluate", "{model}", "--data", "digits-detection"], "not the classes of digits-detection"),
        (["predict", "{model}", "{data}/val", "--output", "x.txt"], "end it in .csv, .json, .parquet"),
        (["predict", "{model}", "{data}/val", "--score_thresh", "2"], "score_thresh=2.0"),
        (["train", "digits-detection", "--detector.min_size", "7"], "min_size=7"),
        (["train", "digits-detection", "--init_from", "gone"], "gone"),
        (["train", "digits-detection", "--init_from", "epsanet14_tiny.digits"], "another network than epsanet50_small"),
        (["train", "digits-detection", "--init_from", "{model}"], "another network than mask_rcnn on epsanet50_small"),
        (["train", "digits-detection", "--freeze_epochs=1", "--init_from={model}"], "--detector.frozen_stages"),
        (["train", "digits-detection", "--optimizer.layer_decay=0.7"], "optimizer.layer_decay is for classifiers"),
        (["train", "digits-detection", "--detector.frozen_stages=1"], "the detector would keep random weights; name"),
        (["train", "digits-detection", "--detector.norm_eval=true"], "the detector would keep random weights; name"),
        (["train", "digits-detection", "--data.mixup=0.2"], "mixup and cutmix are for classifiers"),
        (["train", "digits-detection", "--data.aug_repeats=2"], "aug_repeats is for classifiers"),
        (["train", "digits-detection", "--data.input_size=64"], "a detector has --detector.min_size and max_size"),
        (["train", "digits-detection", "--data.re_prob=0.2"], "data.re_prob is for classifiers; leave it out"),
        (["train", "digits-detection", "--data.train_fraction=0.5"], "data.train_fraction is for classifiers"),
        (["train", "digits-detection", "--label_smoothing=0.2"], "label_smoothing is for classifiers; leave it out"),
        (["train", "digits", "--data.scale_jitter=[0.5,2]"], "data.scale_jitter is for detectors"),
        (["train", "bccd", "--data", "gone"], "there is no folder gone"),
        (
            [
                "train",
                "digits-detection",
                "--model",
                "swin_tiny_patch4_window7_224",
                "--model_args",
                "{{depths: [1,1,1,1]}}",
            ],
            "cannot be the backbone of a detector, which has images of many sizes",
        ),
        (["train", "digits", "--data.scale_jitter=[2,1]"], "scale_jitter"),
    ],
)
def test_mistakes_are_told_in_one_line(
    words: list[str], message: str, trained: TrainResult, data: Path, tmp_path: Path, said: Any
) -> None:
    for suffix in ("json", "csv"):
        (tmp_path / f"a.{suffix}").mkdir()
    code, _, errors = said(*(word.format(model=trained.model, data=data, folder=tmp_path / "a") for word in words))
    assert code == 2
    (line,) = errors.strip().splitlines()
    assert message in line


# Recipes


def test_the_1x_schedule_is_that_of_the_paper() -> None:
    for name, architecture in (
        ("coco-faster-rcnn", "faster_rcnn"),
        ("coco-mask-rcnn", "mask_rcnn"),
        ("coco-retinanet", "retinanet"),
    ):
        recipe = load_recipe(name)
        detector = recipe.detector
        assert detector is not None
        assert (detector.architecture, detector.min_size, detector.max_size) == (architecture, 800, 1333)
        assert (detector.frozen_stages, detector.norm_eval, detector.fpn_channels) == (1, True, 256)
        assert (recipe.schedule.epochs, recipe.schedule.sched, recipe.schedule.decay_milestones) == (
            12,
            "multistep",
            [8, 11],
        )
        optimizer = recipe.optimizer
        assert (optimizer.opt, optimizer.momentum, optimizer.weight_decay) == ("momentum", 0.9, 1e-4)
        text = (Path(epsanet.__file__).parent / "recipes" / f"{name}.yaml").read_text()
        assert "measured  not run" in text


def test_learning_rates_of_the_1x_schedule_fall_after_epochs_8_and_11() -> None:
    """Longhand, with 100 steps an epoch; the rise takes 6.82 of them."""
    from epsanet.network.detectors import create_detector
    from epsanet.tasks.detection.module import DetectorModule

    recipe = load_recipe("coco-faster-rcnn")
    assert recipe.detector is not None
    recipe.detector = detector_config("faster_rcnn")
    model = create_detector(BACKBONE, 2, recipe.detector, backbone_args=BACKBONE_ARGS)
    found = DetectorModule(model, ["a", "b"], recipe, 100, masks=False).configure_optimizers()
    optimizer, scheduler = found["optimizer"], found["lr_scheduler"]["scheduler"]
    rates = {}
    for step in (0, 3, 7, 798, 800, 1098, 1100):  # timm's falls come one step early
        scheduler.step_update(num_updates=step)
        rates[step] = optimizer.param_groups[0]["lr"]
    rise = 2e-5 + 3 * (0.02 - 2e-5) / 6.82
    assert rates == pytest.approx({0: 2e-5, 3: rise, 7: 0.02, 798: 0.02, 800: 0.002, 1098: 0.002, 1100: 0.0002})


def test_recipes_of_detection_are_shipped_and_kept_in_the_run_folder(trained: TrainResult) -> None:
    wanted = {"bccd", "coco-faster-rcnn", "coco-mask-rcnn", "coco-retinanet", "digits-detection"}
    assert wanted <= set(recipe_names())
    kept = yaml.safe_load((trained.run / "config.yaml").read_text())
    assert kept["detector"]["architecture"] == "mask_rcnn"
    assert load_recipe(str(trained.run / "config.yaml")).detector == detector_config(
        min_size=48, max_size=64, score_thresh=0.01
    )


def test_an_image_that_goes_before_it_is_drawn_is_a_row_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no row is kept for a table on the screen that is not asked for."""
    paths = [str(tmp_path / f"{name}.png") for name in ("gone", "here")]
    Image.new("RGB", (8, 8)).save(paths[1])
    rows = [
        Detections(
            image=path,
            path=path,
            width=8,
            height=8,
            classes=("ant",),
            scores=(0.9,),
            boxes=((1.0, 1.0, 5.0, 5.0),),
            class_names=("ant",),
        )
        for path in paths
    ]
    monkeypatch.setattr("epsanet.tasks.detection.predict.detect", lambda *_, **__: iter(rows))
    monkeypatch.setattr("rich.table.Table.add_row", None)
    values = {"model": "finder", "images": paths, "output": str(tmp_path / "found.json")}
    assert _detect(values, str(tmp_path / "drawn"), 0.5) == 0
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert [row["error"] for row in found] == ["not drawn: no such file", None]
    assert [len(row["detections"]) for row in found] == [1, 1]
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == ["here.png"]
