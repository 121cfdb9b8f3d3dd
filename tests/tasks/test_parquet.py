"""Prediction of many images into Parquet: the same bytes whoever wrote which part and whatever was killed."""

from __future__ import annotations

import errno
import itertools
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from making import png

from epsanet.network.weights import load_model
from epsanet.tasks import console, parquet, predict
from epsanet.tasks.parquet import ParquetResult, predict_to_parquet
from epsanet.tasks.predict import Prediction

MODEL = "epsanet14_tiny.digits"
OPTIONS: dict[str, Any] = {"topk": 3, "batch_size": 5, "device": "cpu"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """37 images, of which two cannot be read; each digit looks different to the network."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("images")
    for place, digit in enumerate(load_digits().images[:37]):
        (folder / f"{place:02d}.png").write_bytes(png((digit * 15).astype("uint8")))
    (folder / "07.png").write_bytes(b"words")
    return [*sorted(map(str, folder.iterdir())), str(folder / "gone.png")]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of eight rows, so that 38 images make five."""
    monkeypatch.setattr(parquet, "PARQUET_ROWS", 8)


@pytest.fixture(scope="module")
def whole(images: list[str], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What one process writes that nobody interrupts."""
    path = tmp_path_factory.mktemp("whole") / "x.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "PARQUET_ROWS", 8)
        assert predict_to_parquet(MODEL, images, path, **OPTIONS) == ParquetResult(rows=38, errors=2, resumed=0)
    assert list(path.parent.iterdir()) == [path], "the parts are gone"
    return path.read_bytes()


def test_the_file_has_the_rows_of_prediction_at_once(images: list[str], whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(whole)
    rows = pyarrow.parquet.read_table(tmp_path / "x.parquet").to_pylist()
    wanted = list(predict.predict(MODEL, images, **OPTIONS))
    assert [row["image"] for row in rows] == images
    for row, prediction in zip(rows, wanted, strict=True):
        assert row["error"] == (prediction.error or None)
        names = [row[f"class_{place}"] for place in (1, 2, 3)]
        chances = [row[f"probability_{place}"] for place in (1, 2, 3)]
        assert names == (list(prediction.classes) or [None] * 3)
        assert chances == (pytest.approx(prediction.probabilities, abs=1e-5) if names[0] else [None] * 3)
    assert len({row["class_1"] for row in rows}) > 5, "the images look different"


def read_part(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


class Stopped(BaseException):
    """Stands for whatever ends a process."""


def stop_after(count: int, patch: pytest.MonkeyPatch) -> list[str]:
    """From now on prediction ends after so many images; the list of those that were begun."""
    seen: list[str] = []
    original = predict._Files.__getitem__

    def item(self: Any, position: int) -> Any:
        if len(seen) == count:
            raise Stopped
        seen.append(self.paths[position])
        return original(self, position)

    patch.setattr(predict._Files, "__getitem__", item)
    return seen


@pytest.mark.parametrize("count", [0, 3, 8, 17, 37])
def test_what_is_written_is_not_done_again_and_the_bytes_are_the_same(
    images: list[str], whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    output = tmp_path / "x.parquet"
    with monkeypatch.context() as patch:
        stop_after(count, patch)
        with pytest.raises(Stopped):
            predict_to_parquet(MODEL, images, output, **OPTIONS)
    assert not output.exists()
    done = [row["image"] for path in sorted(tmp_path.glob("x.parquet.parts/0*.parquet")) for row in read_part(path)]
    assert done == images[: len(done)]
    assert len(done) in {count // 8 * 8, max(count // 8 - 1, 0) * 8}, "all but the part that was being written"
    with monkeypatch.context() as patch:
        seen = stop_after(100, patch)
        result = predict_to_parquet(MODEL, images, output, **OPTIONS)
    assert seen == images[len(done) :]
    assert result == ParquetResult(rows=38, errors=2, resumed=len(done))
    assert output.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [output]


PREDICT = """
import os, signal, sys
from epsanet.tasks import parquet, predict
assert "torchmetrics" not in sys.modules, "its import takes seconds"
parquet.PARQUET_ROWS = 8
output, *images = sys.argv[1:]
def run(path):
    print(parquet.predict_to_parquet("epsanet14_tiny.digits", images, path, topk=3, batch_size=5, device="cpu"))
"""

# The second waits until the first has looked: what is there by then would count as found.
TORCHRUN = (
    PREDICT
    + """
import time
while os.environ["RANK"] == "1" and not os.path.exists(f"{output}.parts/job.json"):
    time.sleep(0.01)
run(output)
"""
)

KILLED = (
    PREDICT
    + """
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
def arm(point):
    if point.isdigit():  # while so many-th image is read
        original, count = predict._Files.__getitem__, [0]
        def item(self, position):
            count[0] += 1
            return die() if count[0] == int(point) else original(self, position)
        predict._Files.__getitem__ = item
    elif point == "merging":
        import pyarrow.parquet
        original = pyarrow.parquet.read_table
        pyarrow.parquet.read_table = lambda path, **options: die() if "0003" in str(path) else original(path, **options)
    elif point == "merged":
        parquet.shutil.rmtree = die
for point in ("4", "20", "merging", "merged"):
    child = os.fork()
    if not child:
        arm(point)
        run(f"{output}/{point}/x.parquet")
        sys.exit()
    print(point, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
)


def test_killed_processes_leave_parts_from_which_the_others_make_the_same_bytes(
    images: list[str], whole: bytes, tmp_path: Path
) -> None:
    """SIGKILL at four points: in a part, in another part, while merging, after merging; each then resumed."""
    points = {"4": 0, "20": 2, "merging": 5, "merged": 0}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path, *images], capture_output=True, text=True, timeout=250
    )
    assert killed.stdout.splitlines() == [f"{point} {-signal.SIGKILL}" for point in points], killed.stderr
    for point, parts in points.items():
        output = tmp_path / point / "x.parquet"
        assert output.exists() == (point == "merged")
        if point != "merged":
            assert len(list(output.parent.glob("x.parquet.parts/0*.parquet"))) == parts
        result = predict_to_parquet(MODEL, images, output, **OPTIONS)
        resumed = 38 if point in ("merging", "merged") else 8 * parts
        assert result == ParquetResult(rows=38, errors=2, resumed=resumed)
        assert output.read_bytes() == whole
        assert [path.name for path in output.parent.iterdir() if not path.name.startswith(".")] == ["x.parquet"]


def test_two_processes_of_torchrun_write_what_one_writes(images: list[str], whole: bytes, tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(TORCHRUN)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, script, tmp_path / "x.parquet", *images],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["None", "ParquetResult(rows=38, errors=2, resumed=0)"]
    assert (tmp_path / "x.parquet").read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["driver.py", "x.parquet"]


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_processes_share_the_parts_and_none_does_another_ones(
    images: list[str], whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """One after the other, the first last; it finds all parts there and merges."""
    output, seen = tmp_path / "x.parquet", {}
    for rank in reversed(range(processes)):
        with monkeypatch.context() as patch:
            patch.setenv("RANK", str(rank))
            patch.setenv("WORLD_SIZE", str(processes))
            seen[rank] = stop_after(100, patch)
            result = predict_to_parquet(MODEL, images, output, **OPTIONS)
        assert (result is None) == (rank > 0)
    parts = [tuple(images[place : place + 8]) for place in range(0, 38, 8)]
    for rank, names in seen.items():
        assert names == [name for part in parts[rank::processes] for name in part]
    assert output.read_bytes() == whole


def test_the_first_process_waits_for_the_parts_of_the_others(
    images: list[str], whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one is started when the first looks for its parts in vain."""
    output, looks = tmp_path / "x.parquet", []

    def other(_: float) -> None:
        looks.append(sorted(path.name for path in (tmp_path / "x.parquet.parts").glob("0*")))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", "1")
            assert predict_to_parquet(MODEL, images, output, **OPTIONS) is None

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(parquet.time, "sleep", other)
    assert predict_to_parquet(MODEL, images, output, **OPTIONS) is not None
    assert looks == [["00000000.parquet", "00000002.parquet", "00000004.parquet"]]
    assert output.read_bytes() == whole


@pytest.mark.parametrize(
    ("what", "change"),
    [("topk", {"topk": 2}), ("batch_size", {"batch_size": 4}), ("images", {}), ("model", {})],
)
def test_parts_of_another_prediction_are_refused_and_stay(
    images: list[str], whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, change: dict[str, int]
) -> None:
    output = tmp_path / "x.parquet"
    with monkeypatch.context() as patch:
        stop_after(20, patch)
        with pytest.raises(Stopped):
            predict_to_parquet(MODEL, images, output, **OPTIONS)
    model: Any = load_model(MODEL)
    if what == "model":
        model.model.fc.bias.data[3] += 0.001
    others = images[:1] + images[:0:-1] if what == "images" else images
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=rf"holds parts of another prediction: not the same {what}; go on") as raised:
        predict_to_parquet(model, others, output, **{**OPTIONS, **change})
    assert "\n" not in str(raised.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    predict_to_parquet(MODEL, images, output, **OPTIONS)
    assert output.read_bytes() == whole


def test_a_finished_file_is_not_predicted_again_and_one_of_other_arguments_is_replaced(
    images: list[str], whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "x.parquet"
    output.write_bytes(whole)
    with monkeypatch.context() as patch:
        stop_after(0, patch)
        result = predict_to_parquet(MODEL, images, output, **OPTIONS)
    assert result == ParquetResult(rows=38, errors=2, resumed=38)
    assert output.read_bytes() == whole
    predict_to_parquet(MODEL, images[:2], output, **OPTIONS)
    assert [row["image"] for row in read_part(output)] == images[:2]


@pytest.mark.parametrize("damage", ["cut", "empty", "of another length"])
def test_a_part_that_is_not_whole_is_written_again(
    images: list[str], whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    output = tmp_path / "x.parquet"
    with monkeypatch.context() as patch:
        stop_after(30, patch)
        with pytest.raises(Stopped):
            predict_to_parquet(MODEL, images, output, **OPTIONS)
    part = tmp_path / "x.parquet.parts" / "00000001.parquet"
    if damage == "of another length":
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(part).slice(1), part)
    else:
        part.write_bytes(part.read_bytes()[: 200 if damage == "cut" else 0])
    predict_to_parquet(MODEL, images, output, **OPTIONS)
    assert output.read_bytes() == whole


def test_a_part_whose_content_changed_is_named_and_nothing_is_written(
    images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "x.parquet"
    with monkeypatch.context() as patch:
        stop_after(30, patch)
        with pytest.raises(Stopped):
            predict_to_parquet(MODEL, images, output, **OPTIONS)
    part = tmp_path / "x.parquet.parts" / "00000001.parquet"
    content = bytearray(part.read_bytes())
    content[content.index(Path(images[0]).parent.name.encode()) + 3] ^= 1  # in the first path, which the others repeat
    part.write_bytes(content)
    with pytest.raises(ValueError, match=r"00000001\.parquet is damaged .*; remove it and start again") as raised:
        predict_to_parquet(MODEL, images, output, **OPTIONS)
    assert "\n" not in str(raised.value)
    assert not output.exists()
    part.unlink()
    predict_to_parquet(MODEL, images, output, **OPTIONS)
    assert [row["image"] for row in read_part(output)] == images


def test_a_folder_that_is_called_like_the_parts_is_left_alone(images: list[str], tmp_path: Path) -> None:
    (tmp_path / "x.parquet.parts").mkdir()
    (tmp_path / "x.parquet.parts" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds no parts of a prediction; remove it or choose another --output"):
        predict_to_parquet(MODEL, images, tmp_path / "x.parquet", **OPTIONS)
    assert (tmp_path / "x.parquet.parts" / "thesis.txt").read_text() == "mine"


def test_it_is_left_alone_beside_a_finished_file_too(images: list[str], whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(whole)
    (tmp_path / "x.parquet.parts").mkdir()
    (tmp_path / "x.parquet.parts" / "thesis.txt").write_text("mine")
    assert predict_to_parquet(MODEL, images, tmp_path / "x.parquet", **OPTIONS) is not None
    assert (tmp_path / "x.parquet.parts" / "thesis.txt").read_text() == "mine"


def test_an_output_that_is_a_folder_is_refused_before_the_work(
    images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.parquet").mkdir()
    with monkeypatch.context() as patch:
        stop_after(0, patch)
        with pytest.raises(ValueError, match=r"x\.parquet is a folder; choose another --output"):
            predict_to_parquet(MODEL, images, tmp_path / "x.parquet", **OPTIONS)
    assert not (tmp_path / "x.parquet.parts").exists()


def test_the_same_command_started_twice_is_refused_while_the_first_is_at_work(
    images: list[str], whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, said, original = tmp_path / "x.parquet", [], predict._Files.__getitem__

    def item(self: Any, position: int) -> Any:
        if position == 20:
            with pytest.raises(
                ValueError, match=r"another process is writing .*x\.parquet; wait for its end"
            ) as raised:
                predict_to_parquet(MODEL, images, output, **OPTIONS)
            said.append(str(raised.value))
        return original(self, position)

    monkeypatch.setattr(predict._Files, "__getitem__", item)
    assert predict_to_parquet(MODEL, images, output, **OPTIONS) == ParquetResult(rows=38, errors=2, resumed=0)
    assert len(said) == 1
    assert "\n" not in said[0]
    assert output.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [output]


def test_without_locks_a_run_ends_when_another_has_finished_the_output(
    images: list[str], whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one finishes while the first, of two processes, waits for parts that nobody writes."""
    output = tmp_path / "x.parquet"

    def without(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def other(_: float) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WORLD_SIZE", "1")
            assert predict_to_parquet(MODEL, images, output, **OPTIONS) is not None
        assert not (tmp_path / "x.parquet.parts").exists()

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(parquet.fcntl, "flock", without)
    monkeypatch.setattr(parquet.time, "sleep", other)
    assert predict_to_parquet(MODEL, images, output, **OPTIONS) == ParquetResult(rows=38, errors=2, resumed=0)
    assert output.read_bytes() == whole


@pytest.mark.parametrize(("rank", "processes"), [("2", "2"), ("x", "2"), ("0", "")])
def test_an_impossible_place_among_processes_is_refused(
    images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str, processes: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(ValueError, match=f"RANK={rank} of WORLD_SIZE={processes} is impossible"):
        predict_to_parquet(MODEL, images, tmp_path / "x.parquet", **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_several_processes_without_a_parquet_file_are_refused(
    images: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from epsanet.cli import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    for words in ([], ["--output", str(tmp_path / "x.csv")]):
        assert main(["predict", MODEL, *images, *words]) == 2
        assert capsys.readouterr().err.startswith("epsanet: several processes write one Parquet file; add --output")
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_it_did_and_where_it_goes_on(
    images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from epsanet.cli import main

    def interrupted(*_: Any) -> Iterator[Prediction]:
        raise KeyboardInterrupt
        yield

    words = ["predict", MODEL, *images, "--output", str(tmp_path / "x.parquet"), "--batch-size=5", "--device=cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "predict_batches", interrupted)
        assert main(words) == 130
    assert "x.parquet.parts; the same command goes on from there" in capsys.readouterr().err.replace("\n", "")
    assert main(words) == 0
    errors = capsys.readouterr().err
    assert "38 rows in" in errors
    assert "2 of 38 images could not be read" in errors


def test_without_a_terminal_a_line_a_minute_says_what_remains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = itertools.count(0, 20)
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(seconds)))
    assert list(console.track(range(10), 10, "predicting")) == list(range(10))
    assert capsys.readouterr().err.splitlines() == [
        "predicting: 3 of 10, remaining 2 min 20 s",
        "predicting: 6 of 10, remaining 1 min 20 s",
        "predicting: 9 of 10, remaining 20 s",
    ]
