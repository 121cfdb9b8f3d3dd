"""Predictions: the right rows in the right order, and one image has one set of probabilities everywhere."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tasks_reading import CLASSES

from epsanet import kernels
from epsanet.data.config import DataConfig
from epsanet.data.images import read_image
from epsanet.network.weights import LoadedModel, load_model
from epsanet.tasks.evaluate import evaluate
from epsanet.tasks.predict import Prediction, find_images, predict, predict_batches, write_predictions
from epsanet.tasks.scores import Score


@pytest.fixture(scope="module")
def good(pictures: Path) -> list[str]:
    """The readable images of the test split, in the order in which a folder is read."""
    return [str(path) for path in sorted((pictures / "test").rglob("*.png")) if path.stat().st_size > 10]


def chances(rows: list[Prediction]) -> np.ndarray:
    """In the order of the classes, not of the guesses."""
    return np.array([[row.probabilities[row.classes.index(name)] for name in CLASSES] for row in rows])


# One image, the same probabilities


def test_training_evaluation_prediction_and_timm_agree(
    trained: Any, pictures: Path, good: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training's own pass over the test split was recorded while it ran."""
    in_training = trained.logits.double().softmax(1).numpy()

    batches: list[torch.Tensor] = []
    update = Score.update
    monkeypatch.setattr(
        Score, "update", lambda self, logits, y: (batches.append(logits.clone()), update(self, logits, y))[1]
    )
    result = evaluate(trained.result.model, DataConfig(source=str(pictures), batch_size=4, workers=0), device="cpu")
    in_evaluation = torch.cat(batches).double().softmax(1).numpy()

    in_prediction = chances(list(predict(trained.result.run, good, batch_size=3, device="cpu")))

    model = timm.create_model(f"local-dir:{trained.result.model}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        by_timm = np.stack(
            [model(transform(Image.open(path).convert("RGB"))[None])[0].double().softmax(0).numpy() for path in good]
        )

    assert in_training.shape == (11, 3)
    for other in (in_evaluation, in_prediction, by_timm):
        assert np.abs(other - in_training).max() < 1e-6
    assert np.array_equal(result.confusion, trained.result.evaluation.confusion)
    assert result.loss == pytest.approx(trained.result.evaluation.loss, abs=1e-6)


def test_probabilities_are_a_softmax_over_all_classes_however_few_are_asked_for(trained: Any, good: list[str]) -> None:
    (first, *_) = predict(trained.result.model, good[:1], topk=2, device="cpu")
    loaded = load_model(trained.result.model)
    transform = timm.data.create_transform(**loaded.data_config, is_training=False)
    with torch.no_grad():
        logits = loaded.model(transform(read_image(Path(good[0])))[None])[0].double().numpy()
    wanted = np.exp(logits) / np.exp(logits).sum()
    order = np.argsort(-wanted)[:2]
    assert first.classes == tuple(CLASSES[place] for place in order)
    assert first.probabilities == pytest.approx(wanted[order], abs=1e-6)


def test_a_model_that_is_used_elsewhere_stays_where_it_is() -> None:
    loaded = load_model("epsanet14_tiny.digits")
    elsewhere = torch.device("meta")  # in the place of a GPU
    assert list(predict_batches(loaded, [], [], 1, 0, elsewhere, print)) == []
    assert {weight.device.type for weight in loaded.model.parameters()} == {"cpu"}


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 4, "workers": 2}, {"batch_size": 100}])
def test_batches_and_workers_do_not_change_predictions(options: dict[str, int], trained: Any, good: list[str]) -> None:
    found = list(predict(trained.result.model, good, device="cpu", **options))
    wanted = list(predict(trained.result.model, good, device="cpu"))
    assert [row.image for row in found] == good
    assert np.abs(chances(found) - chances(wanted)).max() < 1e-6


# Which images


def test_files_folders_and_patterns_are_found_in_the_order_they_were_given(pictures: Path, tmp_path: Path) -> None:
    ants = sorted(str(path) for path in (pictures / "val" / "ant").iterdir())
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "album.jpg").mkdir()
    found = find_images(
        [tmp_path / "b.png", pictures / "val" / "ant", str(pictures / "val" / "*" / "101.png"), "gone.jpg"]
    )
    assert found == [
        str(tmp_path / "b.png"),
        *ants,
        *(str(pictures / "val" / name / "101.png") for name in CLASSES),
        "gone.jpg",
    ]
    assert find_images([tmp_path]) == [str(tmp_path / "b.png")], (
        "neither text nor a folder that is called like an image"
    )
    assert find_images([f"{pictures}/val/**/101.png"]) == found[-4:-1]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    path = tmp_path / "image[1].png"
    path.write_bytes(b"")
    assert find_images([path]) == [str(path)]


def test_an_empty_folder_and_a_pattern_without_match_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no images \(\.bmp"):
        find_images([tmp_path])
    with pytest.raises(ValueError, match=r"nothing matches '.*\*\.png'"):
        find_images([tmp_path / "*.png"])


def test_an_empty_name_is_refused_and_does_not_mean_this_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"the empty name ''; give a file"):
        find_images([""])
    assert find_images(["."]) == ["./a.png"]


def test_unreadable_files_are_rows_with_an_error_and_leave_the_others_alone(
    trained: Any, good: list[str], tmp_path: Path
) -> None:
    (tmp_path / "words.png").write_bytes(b"words")
    mixed = [str(tmp_path / "gone.png"), good[0], str(tmp_path / "words.png"), *good[1:4], str(tmp_path)]
    assert Path(mixed[-1]).is_dir()
    mixed[-1] = str(tmp_path / "words.png")
    rows = list(predict(trained.result.model, mixed, batch_size=2, device="cpu"))
    assert [row.image for row in rows] == mixed
    assert [row.error for row in rows] == [
        "no such file",
        "",
        "not an image that can be identified",
        "",
        "",
        "",
        "not an image that can be identified",
    ]
    assert all(not row.classes and not row.probabilities for row in rows if row.error)
    sound = [row for row in rows if not row.error]
    assert np.abs(chances(sound) - chances(list(predict(trained.result.model, good[:4], device="cpu")))).max() < 1e-6


def test_only_unreadable_files_give_only_errors(trained: Any) -> None:
    assert [row.error for row in predict(trained.result.model, ["x.png", "y.png"], device="cpu")] == [
        "no such file"
    ] * 2


@pytest.mark.parametrize("options", [{"topk": 0}, {"batch_size": 0}, {"workers": -1}])
def test_numbers_that_make_no_sense_are_refused(options: dict[str, int], trained: Any, good: list[str]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}={next(iter(options.values()))}"):
        predict(trained.result.model, good, **options)


# Files


@pytest.fixture
def rows() -> list[Prediction]:
    return [
        Prediction(image="a/ä b.png", classes=("cat, black", 'dog "x"'), probabilities=(0.75, 0.25)),
        Prediction(image="b.png", error="no such file"),
        Prediction(image="c.png", classes=('dog "x"', "cat, black"), probabilities=(0.625, 0.375)),
    ]


FLAT = [
    {"image": "a/ä b.png", "error": None, "class_1": "cat, black", "probability_1": 0.75, "class_2": 'dog "x"'}
    | {"probability_2": 0.25, "class_3": None, "probability_3": None},
    {"image": "b.png", "error": "no such file"}
    | {f"{key}_{place}": None for place in (1, 2, 3) for key in ("class", "probability")},
    {"image": "c.png", "error": None, "class_1": 'dog "x"', "probability_1": 0.625, "class_2": "cat, black"}
    | {"probability_2": 0.375, "class_3": None, "probability_3": None},
]
"""Three classes were asked for and there are two."""


def read(path: Path) -> list[dict[str, Any]]:
    """As flat rows, by the format's own library."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        content: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
        return content
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return [
                {key: (float(value) if "prob" in key else value) if value else None for key, value in row.items()}
                for row in csv.DictReader(file)
            ]
    flat = []
    for entry in json.loads(path.read_text(encoding="utf-8")):
        row = {"image": entry["image"], "error": entry["error"]}
        pairs = [*entry["predictions"], *[{"class": None, "probability": None}] * 3][:3]
        for place, pair in enumerate(pairs, 1):
            row |= {f"class_{place}": pair["class"], f"probability_{place}": pair["probability"]}
        flat.append(row)
    return flat


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_every_format_says_the_same(suffix: str, rows: list[Prediction], tmp_path: Path) -> None:
    path = tmp_path / "new" / f"x.{suffix}"
    assert list(write_predictions(path, iter(rows), topk=3)) == rows, "they are passed on"
    assert read(path) == FLAT
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_no_rows_make_a_valid_empty_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    assert list(write_predictions(path, iter(()), topk=3)) == []
    assert read(path) == []


def test_more_rows_than_parquet_writes_at_once_are_all_there(tmp_path: Path) -> None:
    many = [Prediction(image=str(number), classes=("a",), probabilities=(0.5,)) for number in range(2500)]
    for _ in write_predictions(tmp_path / "x.parquet", many, topk=1):
        pass
    assert [row["image"] for row in read(tmp_path / "x.parquet")] == [str(number) for number in range(2500)]


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_a_failure_midway_leaves_the_old_file_and_no_half_one(
    suffix: str, rows: list[Prediction], tmp_path: Path
) -> None:
    path = tmp_path / f"x.{suffix}"
    path.write_text("old")

    def failing() -> Iterator[Prediction]:
        yield rows[0]
        raise RuntimeError("the GPU is gone")

    with pytest.raises(RuntimeError, match="GPU is gone"):
        list(write_predictions(path, failing(), topk=3))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_that_stops_early_leaves_no_file(rows: list[Prediction], tmp_path: Path) -> None:
    written = write_predictions(tmp_path / "x.csv", iter(rows), topk=3)
    next(written)
    written.close()  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_is_refused_before_anything_is_predicted(tmp_path: Path) -> None:
    def never() -> Iterator[Prediction]:
        raise AssertionError("asked for a prediction")
        yield

    with pytest.raises(
        ValueError, match=r"x\.xlsx is no format that can be written; end it in \.csv, \.json, \.parquet"
    ):
        write_predictions(tmp_path / "x.xlsx", never(), topk=3)


def test_parquet_without_its_library_names_the_line_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(ValueError, match=r"this needs pyarrow, .*pip install 'epsanet\[data\]'"):
        write_predictions(tmp_path / "x.parquet", iter(()), topk=3)


# Evaluation


def test_evaluation_counts_each_image_once_when_the_batch_does_not_divide(trained: Any, pictures: Path) -> None:
    for batch_size in (1, 5, 64):
        data = DataConfig(source=str(pictures), batch_size=batch_size, workers=0)
        result = evaluate(trained.result.model, data, split="train", device="cpu", note=lambda _: None)
        assert result.images == 44
        assert result.confusion.sum(axis=1).tolist() == [15, 15, 14]


def test_a_folder_that_lacks_classes_is_matched_by_name(trained: Any, pictures: Path, tmp_path: Path) -> None:
    """The class that is left would be number 0 in its folder, and is number 2 of the network."""
    (tmp_path / "cow").symlink_to(pictures / "test" / "cow")
    notes: list[str] = []
    data = DataConfig(source=str(tmp_path), workers=0)
    result = evaluate(trained.result.model, data, device="cpu", note=notes.append)
    assert np.array_equal(result.confusion[2], trained.result.evaluation.confusion[2])
    assert result.confusion.sum() == 4
    assert list(result.per_class) == ["cow"]
    assert any("lacks 2 of 3 classes (ant, bee); matched by name" in note for note in notes)


def test_a_folder_of_unknown_classes_is_refused(trained: Any, pictures: Path, tmp_path: Path) -> None:
    for name in ("ant", "yak"):
        (tmp_path / name).symlink_to(pictures / "test" / "ant")
    with pytest.raises(ValueError, match=r"1 of 2 classes are unknown: 'yak'; known are 'ant', 'bee', 'cow'"):
        evaluate(trained.result.model, DataConfig(source=str(tmp_path), workers=0), device="cpu")


def test_skipped_images_are_noted(trained: Any, pictures: Path) -> None:
    notes: list[str] = []
    evaluate(trained.result.model, DataConfig(source=str(pictures), workers=0), device="cpu", note=notes.append)
    assert f"skipped {pictures}/test/bee/200.png: not an image that can be identified" in notes
    assert sum("skipped" in text for text in notes) == 1
    assert any("optimised for this CPU" in text for text in notes)


def test_evaluation_may_be_given_another_size(trained: Any, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(trained.result.model)
    sizes = []
    forward: Callable[[torch.Tensor], torch.Tensor] = loaded.model.forward
    monkeypatch.setattr(loaded.model, "forward", lambda x: (sizes.append(tuple(x.shape)), forward(x))[1])
    with kernels.use("reference"):  # the network as it is
        evaluate(loaded, DataConfig(source=str(pictures), workers=0, input_size=12, batch_size=11), device="cpu")
    assert sizes == [(11, 3, 12, 12)]
    assert isinstance(loaded, LoadedModel)
    assert loaded.data_config["input_size"] == (3, 8, 8)
