"""The command line: light help, one-line errors, exit codes, and one name for each thing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import class_folders
from PIL import Image

from epsanet._files import atomic_folder
from epsanet.cli import main
from epsanet.tasks.config import TrainConfig, load_recipe

Run = Callable[..., tuple[int, str, str]]
TINY = ["--model=epsanet14_tiny", "--data.input-size=8", "--data.batch-size=8", "--data.workers=0", "--device=cpu"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A command in this process: its exit code and what it printed."""

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for start, (split, count) in enumerate({"train": 12, "val": 4}.items()):
        class_folders(root / split, dict.fromkeys(["ant", "bee"], count), start=100 * start)
    return root


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder made by the command."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = ["train", "folder", "--data", str(pictures), *TINY, "--schedule.epochs=3", "--schedule.warmup-epochs=0"]
    assert main([*words, f"--output={folder}"]) == 0
    return folder


def fails(result: tuple[int, str, str], *parts: str) -> None:
    """Exit code 2, nothing on standard output, one line on standard error that says all this."""
    code, output, errors = result
    assert code == 2
    assert output == ""
    assert errors.startswith("epsanet: ")
    assert errors.count("\n") == 1, errors
    for part in parts:
        assert part in errors


# Light


PROBE = """
import contextlib, io, json, sys
from epsanet.cli import main
with contextlib.redirect_stdout(io.StringIO()) as text:
    code = main(sys.argv[1:])
heavy = {"torch", "torchvision", "timm", "lightning", "numpy", "matplotlib", "sklearn", "PIL", "rich"}
print(json.dumps([code, text.getvalue(), sorted(heavy & set(sys.modules))]))
"""


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["train", "--help"], ["evaluate", "--help"], ["predict", "-h"]]
)
def test_help_answers_without_a_large_library(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, *words], capture_output=True, text=True, timeout=60, check=True)
    code, text, heavy = json.loads(done.stdout)
    assert code == 0
    assert heavy == []
    if words == ["--help"]:
        assert all(command in text for command in ("train", "evaluate", "predict", "models", "convert"))
    if words == ["train", "--help"]:
        for flag in (
            "--data SOURCE",
            "--optimizer.lr",
            "--schedule.epochs",
            "--resume",
            "--data.on_bad_image",
            "--seed",
        ):
            assert flag in text
        assert "Highest learning rate." in text, "the help is the field's own docstring"


def test_the_installed_command_is_this_one() -> None:
    script = Path(sys.executable).with_name("epsanet")
    if not script.is_file():
        pytest.skip("the package is not installed with its script")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "epsanet 0.1.0\n")


# Mistakes


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["train", "--epochs=3"], ["epochs", "see epsanet train --help"]),
        (["train", "--schedule.epochs=many"], ["schedule.epochs", "many"]),
        (["train", "--schedule.epochs=0"], ["schedule.epochs=0 is impossible; use 1 or more"]),
        (["train", "digit"], ["there is no recipe 'digit': shipped are bccd, cifar10, coco"]),
        (["train", "--config", "{tmp}/nowhere.yaml"], ["there is no recipe", "nowhere.yaml': shipped are bccd"]),
        (["train", "--model=epsanet50_smal", "--output={tmp}/run"], ["no network 'epsanet50_smal'", "epsanet50_small"]),
        (["train", "--device=cuda:9", "--output={tmp}/run"], ["device 'cuda:9' is not here", "use cpu or auto"]),
        (["train", "--data=nowhere", "--output={tmp}/run"], ["there is no data set 'nowhere'"]),
        (["train", "--resume={tmp}"], ["is no run folder"]),
        (["train", "digits", "--resume={tmp}"], ["leave the recipe out"]),
        (["evaluate", "nothing"], ["there is no model 'nothing'"]),
        (["evaluate", "{tmp}"], ["is no model folder"]),
        (["evaluate"], ["model", "see epsanet evaluate --help"]),
        (["predict", "{tmp}", "x.png"], ["is no model folder"]),
        (["predict", "resnet18.a1_in1k"], ["images"]),
        (["predict", "nothing", "*.nothing"], ["nothing matches '*.nothing'"]),
        (["convert", "{tmp}/gone.pth", "{tmp}/new"], ["there is no model", "gone.pth"]),
        (["models", "--xml"], ["--xml"]),
        (["tarin"], ["tarin"]),
        ([], ["command"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_mistake_is_one_line_and_exit_code_2(words: list[str], parts: list[str], run: Run, tmp_path: Path) -> None:
    fails(run(*(word.format(tmp=tmp_path) for word in words)), *parts)
    assert list(tmp_path.iterdir()) == [], "nothing was written"


def test_debug_shows_where_a_mistake_was_noticed(run: Run) -> None:
    with pytest.raises(ValueError, match="no recipe 'digit'"):
        run("--debug", "train", "digit")
    done = subprocess.run(
        [sys.executable, "-m", "epsanet", "train", "digit", "--debug"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "no recipe 'digit'" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_that_is_not_there_is_no_cpu(run: Run, trained: Path, pictures: Path) -> None:
    for words in (["evaluate", trained, "--data", pictures], ["predict", trained, pictures]):
        fails(run(*words, "--device", "cuda"), "device 'cuda' is not here: 0 CUDA devices; use cpu or auto")


@pytest.mark.parametrize("words", [("train",), ("train", "--config"), ("study", "compare", "--config")], ids=" ".join)
def test_a_recipe_without_end_is_refused_however_it_is_named(words: tuple[str, ...], run: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "endless.yaml"
    recipe.write_text("model: &network\n  name: *network\n")
    fails(run(*words, recipe), "endless.yaml unfolds to more than 10,000 values")


def test_a_misspelt_key_of_a_recipe_is_named(run: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("optimizer: {learning_rate: 0.1}\n")
    fails(run("train", recipe), "learning_rate")


def test_a_loss_that_is_no_number_is_exit_code_2(run: Run, pictures: Path, tmp_path: Path) -> None:
    words = [
        "--optimizer.lr=1e20",
        "--schedule.warmup_epochs=0",
        "--schedule.sched=step",
        f"--output={tmp_path / 'run'}",
    ]
    code, _, errors = run("train", "folder", "--data", pictures, *TINY, *words)
    assert code == 2
    assert "epsanet: the loss is " in errors
    assert "lower --optimizer.lr" in errors


# Training: one name for each thing


def config(folder: Path) -> dict[str, object]:
    import yaml

    content: dict[str, object] = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return content


def test_flag_goes_before_recipe_and_recipe_before_default(trained: Path, pictures: Path) -> None:
    found = config(trained)
    assert found["model"] == "epsanet14_tiny"
    assert found["data"]["source"] == str(pictures)
    assert found["data"]["input_size"] == 8
    assert found["schedule"]["epochs"] == 3
    assert found["optimizer"]["lr"] == 0.05, "of the recipe"
    assert found["optimizer"]["momentum"] == 0.9, "the default"


def test_a_yaml_file_of_ones_own_is_a_recipe_and_hyphens_are_underscores(
    run: Run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[TrainConfig] = []
    monkeypatch.setattr("epsanet.tasks.train.train", lambda config, **_: asked.append(config))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"model: epsanet14_tiny\ndata: {{source: {pictures}, workers: 0, input_size: 9}}\nseed: 5\n")
    hyphens = ["--schedule.epochs", "1", "--label-smoothing", "0.2", "--data.batch-size", "6", "--device", "cpu"]
    scores = ["--schedule.epochs=1", "--label_smoothing=0.2", "--data.batch_size=6", "--device=cpu"]
    assert run("train", recipe, *hyphens, "--output", tmp_path / "a")[0] == 0
    assert run("train", "--config", recipe, *scores, f"--output={tmp_path / 'a'}")[0] == 0
    first, second = asked
    assert first == second
    assert (first.seed, first.label_smoothing, first.data.batch_size, first.schedule.epochs) == (5, 0.2, 6, 1)
    assert (first.data.source, first.data.input_size) == (str(pictures), 9)


def test_python_gets_the_same_run_as_the_command_line(trained: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from epsanet.tasks.config import load_recipe
    from epsanet.tasks.train import train

    again = load_recipe(str(trained / "config.yaml"), [f"--output={tmp_path / 'run'}"])
    weights = load_file(train(again).model / "model.safetensors")
    wanted = load_file(trained / "model" / "model.safetensors")
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def test_ctrl_c_before_training_is_exit_code_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt  # a signal would not reach a suite that runs in the background

    monkeypatch.setattr("epsanet.study.cost.cost_table", interrupted)
    code, _, errors = run("models")
    assert code == 130
    assert errors == "epsanet: interrupted\n"


class OutOfMemoryError(RuntimeError):
    """Torch's is called so."""


class BackendCompilerFailed(RuntimeError):  # noqa: N818
    """Torch's is called so."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OutOfMemoryError("CUDA"), "CUDA; use a smaller --data.batch_size (predict: --batch_size)"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9\nmore"),
            "can't allocate memory: you tried 9; use a smaller --data.batch_size",
        ),
        (MemoryError(), "MemoryError; use a smaller --data.batch_size"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "Killed.; use fewer --data.workers"),
        (RuntimeError("unable to write to a file of shared memory"), "shared memory; use fewer --data.workers"),
        (
            BackendCompilerFailed("backend='inductor' raised:\n" + "x" * 9999),
            "raised:; torch.compile does not work here",
        ),
        (OutOfMemoryError("x" * 9999), f"epsanet: {'x' * 300}; use"),
    ],
    ids=range(7),
)
def test_what_the_machine_cannot_do_is_one_line_with_a_remedy(
    error: Exception, said: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("epsanet.cli.models.run", fail)
    fails(run("models"), said)
    with pytest.raises(type(error)):
        run("models", "--debug")


@pytest.mark.parametrize(
    "text", ["mat1 and mat2 cannot be multiplied", "Caught RuntimeError in DataLoader worker process 0.\nOriginal"]
)
def test_a_fault_of_the_package_is_a_traceback(text: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr("epsanet.cli.models.run", fail)
    with pytest.raises(RuntimeError, match=re.escape(text)):
        run("models")


def test_a_character_that_the_terminal_lacks_is_printed_as_its_number() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "epsanet", "study", "--help"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"train networks \\xd7 seeds" in done.stdout


def test_sigterm_to_the_program_removes_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handlers: list[object] = []

    def stopped(*_: object) -> int:
        handlers.append(signal.getsignal(signal.SIGTERM))
        with atomic_folder(tmp_path / "packed") as folder:
            (folder / "shard.tar").write_bytes(b"x")
            if handlers[-1] != before:
                os.kill(os.getpid(), signal.SIGTERM)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("epsanet.cli.models.run", stopped)
    monkeypatch.setattr(sys, "argv", ["epsanet", "models"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before
    assert main(["models"]) == 0
    assert handlers[1] == before, "who calls it from Python has handlers of their own"


# Evaluation and prediction


def test_evaluate_prints_json_that_parses_and_a_table_that_agrees(run: Run, trained: Path, pictures: Path) -> None:
    words = ["evaluate", trained, "--data", pictures, "--data.workers=0", "--device=cpu"]
    code, output, _ = run(*words, "--json")
    assert code == 0
    found = json.loads(output)
    assert found["images"] == 8
    assert found["top1"] == 100 * found["correct"] / 8
    assert {name: entry["images"] for name, entry in found["per_class"].items()} == {"ant": 4, "bee": 4}
    code, table, _ = run(*words)
    assert code == 0
    assert f"{found['top1']:.2f} % top-1 ({found['correct']} of 8; 95 % interval" in table
    assert f"loss {found['loss']:.4f}" in table


def test_evaluate_matches_folders_by_name_and_refuses_what_it_does_not_know(
    run: Run, trained: Path, pictures: Path, tmp_path: Path
) -> None:
    whole = json.loads(run("evaluate", trained, "--data", pictures, "--json", "--device=cpu", "--data.workers=0")[1])
    (tmp_path / "bee").symlink_to(pictures / "val" / "bee")
    code, output, errors = run("evaluate", trained, "--data", tmp_path, "--json", "--device=cpu", "--data.workers=0")
    assert code == 0
    assert json.loads(output)["per_class"] == {"bee": whole["per_class"]["bee"]}
    assert "lacks 1 of 2 classes (ant); matched by name" in " ".join(errors.split())
    (tmp_path / "yak").symlink_to(pictures / "val" / "bee")
    fails(run("evaluate", trained, "--data", tmp_path), "1 of 2 classes are unknown: 'yak'")


def test_predict_prints_a_row_an_image_and_errors_in_theirs(
    run: Run, trained: Path, pictures: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "odd[b].png"
    Image.fromarray(np.zeros((9, 9, 3), dtype=np.uint8)).save(odd)
    code, output, errors = run("predict", trained, odd, tmp_path / "gone.png", "--device=cpu", "--topk", 2)
    assert code == 0
    flat = output.replace("\n", "").replace(" ", "").replace("│", "")
    assert "odd[b].png" in flat, "brackets are no markup"
    assert "nosuchfile" in flat
    assert "1 of 2 images could not be read" in errors
    assert pictures.is_dir()


def test_names_of_images_are_whole_on_a_narrow_terminal(
    run: Run, trained: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = next(iter(sorted((pictures / "val").rglob("*.png"))))
    name = tmp_path / ("a_name_of_forty_letters_and_more_and_so_on" * 2 + ".png")
    name.write_bytes(image.read_bytes())
    monkeypatch.setattr("epsanet.tasks.console.console._width", 60)
    code, output, _ = run("predict", trained, name, "--device=cpu", "--topk=2")
    assert code == 0
    first_cells = [line.split("│")[1].strip() for line in output.splitlines() if "│" in line]
    assert str(name) in "".join(first_cells)


def test_predict_writes_the_file_it_is_asked_for(run: Run, trained: Path, pictures: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    code, output, errors = run("predict", trained, pictures / "val", "--output", target, "--device=cpu", "--topk=1")
    assert (code, output) == (0, "")
    assert "8 rows in" in errors
    rows = json.loads(target.read_text(encoding="utf-8"))
    assert [row["image"] for row in rows] == sorted(map(str, (pictures / "val").rglob("*.png")))
    whole = json.loads(run("evaluate", trained, "--data", pictures, "--json", "--device=cpu", "--data.workers=0")[1])
    right = sum(row["predictions"][0]["class"] == Path(row["image"]).parent.name for row in rows)
    assert right == whole["correct"]


def test_predict_is_exit_code_2_when_no_image_could_be_read(run: Run, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "words.png").write_text("words")
    code, _, errors = run("predict", trained, tmp_path, tmp_path / "gone.png", "--device=cpu")
    assert code == 2
    assert "2 of 2 images could not be read" in errors


def test_predict_refuses_an_unknown_format_and_leaves_nothing(
    run: Run, trained: Path, pictures: Path, tmp_path: Path
) -> None:
    fails(run("predict", trained, pictures, "--output", tmp_path / "x.xlsx"), "end it in .csv, .json, .parquet")
    assert list(tmp_path.iterdir()) == []


# The other commands


def test_a_packed_folder_is_evaluated_like_the_folder(run: Run, trained: Path, pictures: Path, tmp_path: Path) -> None:
    code, output, errors = run("shard", pictures, tmp_path / "packed", "--shard-size=5")
    assert (code, errors) == (0, "")
    assert output.splitlines() == [
        "train: 24 images in 5 shards",
        "val: 8 images in 2 shards",
        "",
        f"train  epsanet train folder --data wds/{tmp_path / 'packed'}",
    ]
    results = [
        json.loads(run("evaluate", trained, "--data", source, "--data.workers=0", "--json")[1])
        for source in (f"wds/{tmp_path / 'packed'}", pictures)
    ]
    for result in results:
        result["loss"] = round(result["loss"], 5)  # the order of the images is another
    assert results[0] == results[1]
    fails(run("shard", pictures, tmp_path / "packed"), "is there already")


def test_models_as_json_and_as_a_table_has_every_network_with_its_cost(
    run: Run, costs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("epsanet.study.cost.cost_table", lambda: costs)
    code, output, _ = run("models", "--json")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(output)}
    assert len(rows) == len(costs)
    for cost in costs:
        row = rows[cost.name]
        assert (row["parameters"], row["macs"]) == (cost.parameters, cost.macs)
        if cost.published is None:
            assert row["published"] is None
        else:
            said = row["published"]
            assert (said["parameters"], said["gmacs"]) == (cost.published.parameters, cost.published.gmacs)
            assert (said["top1"], said["top5"]) == (cost.published.top1, cost.published.top5)
    monkeypatch.setattr("epsanet.tasks.console.console._width", 80)
    code, table, _ = run("models")
    assert code == 0
    for cost in costs:
        (line,) = [line for line in table.splitlines() if line.split()[:1] == [cost.name]]
        assert f"{cost.parameters:,}" in line
        assert f"{cost.macs / 1e9:.3f}" in line
        assert cost.published is None or f"{cost.published.parameters:.2f} M" in line


def test_convert_goes_both_ways_and_does_not_overwrite(run: Run, tmp_path: Path) -> None:
    import timm

    from epsanet.network.weights import save_model

    torch.manual_seed(1)
    model = timm.create_model("epsanet50_small", num_classes=3).eval()
    save_model(tmp_path / "ours", model, ["a", "b", "c"])
    assert run("convert", tmp_path / "ours", tmp_path / "theirs.pth.tar", "--data-parallel")[0] == 0
    theirs = torch.load(tmp_path / "theirs.pth.tar", weights_only=True)
    assert all(name.startswith("module.") for name in theirs["state_dict"])
    assert "module.layer1.0.conv2.conv_4.weight" in theirs["state_dict"]
    assert run("convert", tmp_path / "theirs.pth.tar", tmp_path / "back")[0] == 0
    back = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True).eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(back(image), model(image), atol=1e-5)
    fails(run("convert", tmp_path / "ours", tmp_path / "back"), "exists; remove it or choose another name")
    (tmp_path / "words.pth").write_text("words")
    fails(run("convert", tmp_path / "words.pth", tmp_path / "new"), "words.pth")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("schedule: {epochs: }", "schedule.epochs is empty; give it a value, or leave it out for 120"),
        ("data: {source: x, batch_size: }", "data.batch_size is empty; give it a value, or leave it out for 64"),
        (
            "model: resnet18\noptimizer:",
            "optimizer=None has no parts; leave it out, or give it some, such as optimizer",
        ),
        ("schedule: 1.5", "schedule=1.5 has no parts"),
    ],
)
def test_a_key_of_a_recipe_without_a_value_is_named(text: str, said: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    fails(run("train", tmp_path / "recipe.yaml", "--output", tmp_path / "run"), said)
    fails(run("study", "ablation", tmp_path / "recipe.yaml", "--output", tmp_path / "run"), said.split(";")[0])
    with pytest.raises(ValueError, match=re.escape(said)):
        load_recipe(str(tmp_path / "recipe.yaml"))
    assert not (tmp_path / "run").exists()


def test_a_file_where_a_folder_is_needed_is_named(run: Run, pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    image = next(pictures.rglob("*.png"))
    for words in (["predict", "--output", file / "x.csv"], ["explain", "--output", file]):
        command, *flags = words
        fails(run(command, "epsanet14_tiny.digits", image, *flags), str(file), "needs a folder where a file stands")
    assert file.read_text() == "mine"
