"""Studies: their rows at equal cost, runs that survive a kill, and the report of made-up results."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from making import class_folders
from safetensors.torch import load_file, save_file
from scipy import stats

from epsanet._processes import cores
from epsanet.cli import main
from epsanet.insight.scales import record_scales
from epsanet.network.psa import PSA
from epsanet.study.config import CompareConfig, StudyConfig
from epsanet.study.cost import count
from epsanet.study.report import write_report
from epsanet.study.rows import ABLATION, Row, ablation_rows, compare_rows, match_widths
from epsanet.study.running import StudyInterrupted, StudyRun, _Crew, read_results
from epsanet.study.tables import Table, printed
from epsanet.study.worker import _listening, rescaled

SMALL = {"layers": [1, 1, 1, 1], "channels": [16, 16, 16, 16]}

# ---------------------------------------------------------------------------------------------------------------- rows


def parameters(row: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(row.model, num_classes=10, **row.model_args).parameters())


def test_networks_are_matched_to_the_reference_within_a_few_percent() -> None:
    study = CompareConfig(networks=["resnet", "se", "sk"], match="parameters")
    rows = compare_rows(study, {"layers": [1, 1, 1, 1]}, 10, 32)
    assert [row.name for row in rows] == ["epsanet", "resnet", "se", "sk"]
    target = parameters(rows[0])
    assert "channels" not in rows[0].model_args, "the reference is as it was"
    for row in rows[1:]:
        assert parameters(row) == pytest.approx(target, rel=0.03), row.name
        assert all(width % 8 == 0 for width in row.model_args["channels"])


def test_of_the_widths_that_cost_the_same_those_in_proportion_are_taken() -> None:
    """Stages of 8 and of 24 channels would come nearer to the target."""
    row = compare_rows(CompareConfig(networks=["se"]), {"layers": [1, 2, 2, 2], "stem_width": 16}, 10, 32)[1]
    assert row.model_args["channels"] == [16, 24, 24, 64], "of 16, 32, 32 and 64"


def test_networks_of_basic_blocks_and_of_timm_are_matched_too() -> None:
    small = {"layers": [1, 1, 1, 1], "channels": [32, 32, 64, 64]}
    paper, split = ablation_rows(StudyConfig(networks=["split"]), "epsanet18", small, 10, 64)
    assert parameters(split) == pytest.approx(parameters(paper), rel=0.05), "its widths are multiples of 16"
    row = Row(name="resnet", title="ResNet", model="resnet50", model_args={"layers": [1, 1, 1, 1]})
    wider = match_widths(row, 2 * parameters(row), "parameters", 10, 64)
    assert parameters(wider) == pytest.approx(2 * parameters(row), rel=0.03)
    with pytest.raises(ValueError, match="widths of vgg11 cannot be changed for equal cost; use --match none"):
        match_widths(Row(name="vgg", title="VGG", model="vgg11"), 10**6, "parameters", 10, 64)


def test_multiply_accumulates_are_matched_where_they_are_asked_for() -> None:
    rows = compare_rows(CompareConfig(networks=["resnet"], match="macs"), SMALL, 10, 16)
    macs = [count(row.model, 16, num_classes=10, **row.model_args)[1] for row in rows]
    assert macs[1] == pytest.approx(macs[0], rel=0.06)


def test_without_matching_all_networks_have_the_same_widths() -> None:
    rows = compare_rows(CompareConfig(networks=["resnet", "fca"], match="none"), SMALL, 10, 16)
    assert all(row.model_args["channels"] == SMALL["channels"] for row in rows)


def test_every_setting_of_the_ablation_changes_the_modules_as_it_says() -> None:
    rows = ablation_rows(StudyConfig(match="none"), "epsanet14_tiny", {"channels": [64, 64, 64, 64]}, 10, 32)
    assert [row.name for row in rows] == list(ABLATION)
    found = {}
    for row in rows:
        with torch.device("meta"):
            model = timm.create_model(row.model, num_classes=10, **row.model_args)
        psa = next(module for module in model.modules() if isinstance(module, PSA))
        se = "none" if psa.se is None else type(psa.se).__name__
        kernels = tuple(branch.kernel_size[0] for branch in psa.spc.branches)
        groups = tuple(branch.groups for branch in psa.spc.branches)
        found[row.name] = (kernels, groups, psa.spc.mode, se, psa.softmax, psa.fusion)
    paper = ((3, 5, 7, 9), (1, 4, 8, 16), "multiplex", "SEWeight", "scales", "concat")
    changed = {name: {i: x for i, x in enumerate(value) if x != paper[i]} for name, value in found.items()}
    assert changed == {
        "paper": {},
        "groups_2_4_8_16": {1: (2, 4, 8, 16)},
        "groups_4_8_16_16": {1: (4, 8, 16, 16)},
        "groups_16_16_16_16": {1: (16, 16, 16, 16)},
        "groups_1_1_1_1": {1: (1, 1, 1, 1)},
        "kernels_3_3_3_3": {0: (3, 3, 3, 3)},
        "kernels_3_5": {0: (3, 5), 1: (1, 4)},
        "kernels_3_5_7": {0: (3, 5, 7, 7), 1: (1, 4, 8, 8)},
        "kernels_9_7_5_3": {0: (9, 7, 5, 3)},
        "split": {2: "split"},
        "se_branches": {3: "ModuleList"},
        "se_none": {3: "none"},
        "softmax_channels": {4: "channels"},
        "softmax_none": {4: "none"},
        "fusion_sum": {5: "sum"},
        "split+se_none": {2: "split", 3: "none"},
        "split+softmax_channels": {2: "split", 4: "channels"},
        "se_branches+softmax_channels": {3: "ModuleList", 4: "channels"},
        "kernels_3_3_3_3+groups_1_1_1_1": {0: (3, 3, 3, 3), 1: (1, 1, 1, 1)},
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["compare", "--output", "x", "--networks", "[vgg]"],
            "no network 'vgg' in the comparison; there are resnet, se",
        ),
        (
            ["ablation", "--output", "x", "--networks", "[split2]"],
            "no setting 'split2' of the ablation; there are paper",
        ),
        (["ablation", "--output", "x", "--model", "resnet18"], "--model resnet18 has no PSA modules"),
        (["ablation", "--output", "x", "--model", "epsanet50_large"], "epsanet50_large has PSA settings of its own"),
        (["ablation", "--output", "x", "--model", "epsanet50_large_g32"], "has PSA settings of its own"),
        (
            ["ablation", "--output", "x", "--model_args.block_args", "{softmax: channels}"],
            "epsanet14_tiny has PSA settings of its own, or --model_args gives it some",
        ),
        (["compare", "--output", "x", "--model_args.num_classes", "7"], "leave --model_args.num_classes out"),
        (
            ["compare", "--match", "none", "--networks", "[resnet]", "--output", "x", "--model_args.layerz", "[1]"],
            "layerz",
        ),
        (["compare", "--output", "x", "--model", "resnet18"], "takes its networks from --networks"),
        (["compare", "--output", "x", "--seeds", "0"], "seeds=0 is impossible; use 1 or more"),
        (
            ["compare", "--output", "x", "--devices", "2"],
            "a run of a study is one process; leave --devices and --nodes",
        ),
        (
            ["compare", "--match", "none", "--networks", "[resnet]", "--output", "x", "--threads", "999"],
            "at_once=1 with threads=999 is more than the",
        ),
        (["compare", "--output", "x", "--device", "cuda:99"], "cuda:99"),
        (["compare", "coco-compare", "--output", "x", "--device", "cpu"], "there is no folder coco"),
        (["compare", "typing.yaml", "--output", "x"], "typing.yaml: Option 'netwroks' is not accepted"),
        (["ablation", "cifar10-compare", "--output", "x"], "it is a study for epsanet study compare"),
        (["compare", "cifar10-ablation", "--output", "x"], "it is a study for epsanet study ablation"),
        (["compare", "--match", "none", "--networks", "[resnet]"], "a study needs --output"),
        (["compare", "nothing-like-it"], "there is no study 'nothing-like-it': shipped are"),
        (["compare", "circle.yaml", "--output", "x"], "circle.yaml unfolds to more than 10,000 values"),
        (["report", "nowhere"], "nowhere has no finished run of a study"),
        (["compare", "--output", "x", "--init_from", "y"], "leave --init_from out"),
    ],
)
def test_what_cannot_be_studied_is_one_line_with_the_remedy(
    words: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("circle.yaml").write_text("networks: &all [*all]\n")
    Path("typing.yaml").write_text("netwroks: [se]\n")
    assert main(["study", *words]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"circle.yaml", "typing.yaml"}, "nothing was written"


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for start, (split, number) in enumerate({"train": 12, "val": 6}.items()):
        class_folders(root / split, dict.fromkeys(("ant", "bee"), number), start=100 * start, size=16)
    return root


def flags(pictures: Path, output: Path, seeds: int) -> list[str]:
    recipe = {
        "networks": ["epsanet"],
        "match": "none",
        "model_args": SMALL,
        "data": {"source": str(pictures), "input_size": 16, "batch_size": 8, "workers": 0},
        "schedule": {"epochs": 2},
        "optimizer": {"lr": 0.02},
        "device": "cpu",
    }
    output.parent.mkdir(exist_ok=True)
    path = output.parent / "study-recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return ["study", "compare", str(path), "--output", str(output), "--seeds", str(seeds)]


def test_a_run_that_is_still_being_measured_is_time_that_remains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Row(name="epsanet", title="EPSANet", model="epsanet14_tiny")
    done, measured = (StudyRun(folder=tmp_path, row=row, seed=seed) for seed in (0, 1))
    done.result.parent.mkdir()
    done.result.write_text(made_up("epsanet", 0, 50.0))
    metrics = tmp_path / "runs" / measured.name / "metrics.csv"
    metrics.parent.mkdir(parents=True)
    metrics.write_text("epoch\n0\n1\n")
    crew = _Crew([done, measured], epochs=2, study=StudyConfig(), numbers=[0])
    crew.start, crew.epochs_before = 0.0, 0
    monkeypatch.setattr("epsanet.study.running.time", SimpleNamespace(monotonic=lambda: 50.0))
    crew._say_finished(done)  # five of six parts took 50 seconds
    assert "1 of 2  epsanet-seed0  50.00 %  remaining 10 s" in capsys.readouterr().out


WORKER = """#!{python} -S
import json, os, sys, time
from pathlib import Path
result = Path(sys.argv[-1])
if result.stem == "c-seed0":
    sys.exit("no such luck")
start = time.monotonic()
time.sleep(0.3)
place = {{"threads": os.environ["OMP_NUM_THREADS"], "cores": sorted(os.sched_getaffinity(0))}}
found = json.loads(Path(sys.argv[-2]).with_suffix(".made").read_text())
result.write_text(json.dumps({{**found, "place": place, "time": [start, time.monotonic()]}}))
"""


SLOW_WORKER = """#!{python} -S
import sys, time
time.sleep(30)
open(sys.argv[-1], "w").close()
"""


def test_a_run_that_is_being_started_when_the_study_is_stopped_is_stopped_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    worker = tmp_path / "worker"
    worker.write_text(SLOW_WORKER.format(python=sys.executable))
    worker.chmod(0o755)
    monkeypatch.setattr("epsanet.study.running.sys", SimpleNamespace(executable=str(worker)))
    run = StudyRun(folder=tmp_path, row=Row(name="a", title="a", model="epsanet14_tiny"), seed=0)
    crew = _Crew([run], epochs=1, study=StudyConfig(), numbers=sorted(cores())[:1])
    begin = crew._begin

    def stopped_as_it_begins(*arguments: Any) -> Any:
        begun = begin(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)
        return begun

    monkeypatch.setattr(crew, "_begin", stopped_as_it_begins)
    start = time.monotonic()
    with pytest.raises(StudyInterrupted, match="stopped and saved; 1 of 1 run"):
        crew.work()
    assert time.monotonic() - start < 20, "it was waited for"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="processes cannot be kept to cores here")
def test_runs_at_a_time_have_their_own_cores_and_a_failed_one_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Processes that take a third of a second stand in for the training."""
    for folder in ("results", "configs"):
        (tmp_path / folder).mkdir()
    runs = [
        StudyRun(folder=tmp_path, row=Row(name=name, title=name, model="epsanet14_tiny"), seed=0) for name in "abcdef"
    ]
    for run in runs:
        (tmp_path / "configs" / f"{run.name}.made").write_text(made_up(run.row.name, 0, 50.0))
    worker = tmp_path / "worker"
    worker.write_text(WORKER.format(python=sys.executable))
    worker.chmod(0o755)
    monkeypatch.setattr("epsanet.study.running.sys", SimpleNamespace(executable=str(worker)))
    monkeypatch.setattr("epsanet.study.running._POLL_SECONDS", 0.05)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    numbers = sorted(os.sched_getaffinity(0))[:2]
    crew = _Crew(runs, epochs=1, study=StudyConfig(at_once=len(numbers)), numbers=numbers)
    assert crew.work() == ["c-seed0"]
    said = capsys.readouterr()
    assert "c-seed0 failed: no such luck" in said.err.replace("\n", " ")
    found = [json.loads(run.result.read_text()) for run in runs if run.row.name != "c"]
    assert [one["network"] for one in found] == list("abdef")
    assert all(one["place"]["threads"] == "1" for one in found), "the run's own number goes before the environment's"
    assert {tuple(one["place"]["cores"]) for one in found} == {(number,) for number in numbers}
    for one in found:
        for other in found:
            at_once = one["time"][0] < other["time"][1] and other["time"][0] < one["time"][1]
            assert one is other or not at_once or one["place"]["cores"] != other["place"]["cores"]


@pytest.mark.timeout(900)  # three processes start from nothing, on whatever the machine leaves them
def test_a_killed_study_goes_on_and_its_rows_give_the_identical_numbers_again(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from epsanet.study.worker import run_one
    from epsanet.tasks.config import load_recipe

    folder = tmp_path / "study"
    done, half = folder / "results" / "epsanet-seed0.json", folder / "runs" / "epsanet-seed1" / "metrics.csv"
    command = [sys.executable, "-m", "epsanet", *flags(pictures, folder, 2)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as study:
        try:
            while not half.is_file() and study.poll() is None:  # until the second run has an epoch
                time.sleep(0.05)
        finally:
            study.send_signal(signal.SIGKILL)
    assert half.is_file()
    before = done.read_text()

    assert main(flags(pictures, folder, 2)) == 0
    assert done.read_text() == before, "a finished run was run again"
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["network"], row["seed"], row["epochs"]) for row in rows] == [
        ("epsanet", "0", "2"),
        ("epsanet", "1", "2"),
    ]
    assert "2 runs, 1 finished before" in capfd.readouterr().out

    found = [json.loads((folder / "results" / f"epsanet-seed{seed}.json").read_text()) for seed in (0, 1)]
    assert found[0]["last_train_loss"] != found[1]["last_train_loss"]
    for seed in (0, 1):  # the second was killed and resumed
        config = load_recipe(str(folder / "configs" / f"epsanet-seed{seed}.train.yaml"))
        config.output = str(tmp_path / f"again{seed}")
        run_one(config, tmp_path / f"again{seed}.json", {})
        again = json.loads((tmp_path / f"again{seed}.json").read_text())
        same = ("score", "top1_at_0.5", "top1_at_1.5", "last_train_loss", "parameters", "attention_spread")
        assert {key: again[key] for key in same} == {key: found[seed][key] for key in same}

    assert main([*flags(pictures, folder, 2), "--optimizer.lr", "0.03"]) == 2
    assert "was begun with optimizer.lr=0.02, not 0.03; use the same, or another --output" in capfd.readouterr().err


def test_objects_at_half_size_are_the_averaged_image_on_its_mean_colour() -> None:
    x = torch.randn(2, 3, 32, 32)
    found = rescaled(x, 0.5)
    assert found.shape == x.shape
    border = found.clone()
    border[..., 8:24, 8:24] = 0
    assert not border.any()
    flat = torch.full((1, 1, 32, 32), 2.0)
    torch.testing.assert_close(rescaled(flat, 0.5)[..., 8:24, 8:24], torch.full((1, 1, 16, 16), 2.0))
    ramp = torch.arange(32.0).expand(1, 1, 32, 32)
    inner = rescaled(ramp, 0.5)[0, 0, 16, 9:23]
    torch.testing.assert_close(inner, 2 * torch.arange(1.0, 15) + 0.5)  # middles of pairs


def test_objects_at_one_and_a_half_size_are_the_middle_enlarged() -> None:
    ramp = torch.arange(36.0).expand(1, 1, 36, 36)
    found = rescaled(ramp, 1.5)[0, 0, 18]
    torch.testing.assert_close(found[6:30], 6 + (torch.arange(6.0, 30) + 0.5) / 1.5 - 0.5)
    assert rescaled(ramp, 1.0) is ramp


def test_what_the_modules_listen_to_is_the_deviation_of_the_shares_over_images() -> None:
    torch.manual_seed(0)
    network = timm.create_model("epsanet14_tiny", num_classes=3, **SMALL).eval()
    batches = [(torch.randn(5, 3, 16, 16), torch.zeros(5), torch.zeros(5)) for _ in range(2)]
    found = _listening(network, batches)
    modules = record_scales(network, torch.cat([images for images, _, _ in batches]))
    for name in ("attention", "contribution"):
        shares = [getattr(module, f"{name}_NS").tolist() for module in modules]  # images by scales
        variances = [[stats.moment(scale, 2) for scale in zip(*share, strict=True)] for share in shares]
        expected = 100 * np.sqrt(variances).mean()
        assert found[f"{name}_spread"] == pytest.approx(expected, rel=1e-5)
        assert expected > 0
    assert _listening(timm.create_model("resnet26_tiny", num_classes=3), batches) == {}


# -------------------------------------------------------------------------------------------------------------- report

SCORES = {"paper": [70.0, 71.0, 70.5], "split": [68.0, 69.5, 68.7], "split+se_none": [67.5, 69.6, 68.2]}


def made_up(name: str, seed: int, score: float) -> str:
    """The result of a run that never was."""
    run = {"network": name, "title": name.title(), "seed": seed, "score": score, "parameters": 1000}
    run |= {"gmacs": 0.01, "milliseconds": 0.5, "train_seconds": 60.0, "processor": "a CPU", "threads": 1}
    run |= {"top1_at_0.5": score - 30, "top1_at_1": score, "top1_at_1.5": score - 10}
    run |= {"finished": "2026-01-01 00:00:00", "split": "val", "images": 200, "torch": "2.14"}
    return json.dumps({**run, "model": "epsanet14_tiny", "model_args": "{}"})


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A study with made-up results."""
    (tmp_path / "results").mkdir()
    study = {"study": "ablation", "match": "none", "schedule": {"epochs": 2}, "data": {"source": "made-up"}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    for name, scores in SCORES.items():
        for seed, score in enumerate(scores):
            (tmp_path / "results" / f"{name}-seed{seed}.json").write_text(made_up(name, seed, score))
    return tmp_path


def test_the_report_has_the_means_and_tests_that_scipy_gives(finished: Path) -> None:
    report = write_report(finished)
    accuracy, comparisons, scales = report.tables
    assert [row[0] for row in accuracy.rows] == ["paper", "split", "split+se_none"], "best first"
    assert accuracy.rows[0][3] == "70.50"
    low, high = stats.t.interval(0.95, 2, loc=70.5, scale=stats.sem(SCORES["paper"]))
    assert accuracy.rows[0][4] == f"{low:.2f} to {high:.2f}"
    pairs = [("split", "paper"), ("split+se_none", "paper"), ("split+se_none", "split")]
    assert [row[:2] for row in comparisons.rows] == pairs
    p_values = [stats.ttest_rel(SCORES[one], SCORES[other]).pvalue for one, other in pairs]
    assert [row[5] for row in comparisons.rows] == [f"{p:.4f}" for p in p_values]
    smallest, middle, largest = sorted(p_values)
    expected = {smallest: 3 * smallest, middle: max(3 * smallest, 2 * middle)}
    expected[largest] = max(expected[middle], largest)
    assert [row[6] for row in comparisons.rows] == [f"{min(1.0, expected[p]):.4f}" for p in p_values]
    assert comparisons.rows[0][3] == f"{np.mean(SCORES['split']) - 70.5:+.2f}"
    assert scales.rows[0] == ("paper", "40.50", "70.50", "60.50", "30.00", "10.00")


def test_the_report_is_on_disk_as_tables_and_pictures(finished: Path) -> None:
    folder = write_report(finished).folder
    names = {"accuracy.csv", "comparisons.csv", "scales.csv", "report.md", "accuracy.png", "scales.png"}
    assert {path.name for path in folder.iterdir()} == names
    with (folder / "accuracy.csv").open() as file:
        assert next(csv.DictReader(file))["mean"] == "70.50"
    assert "| paper | Paper | 3 | 70.50 |" in (folder / "report.md").read_text()


def test_a_study_that_is_not_finished_is_reported_with_what_is_lacking(finished: Path) -> None:
    (finished / "results" / "split-seed2.json").unlink()
    report = write_report(finished)
    assert "fewer than 3 runs: split (2)" in report.notes
    assert report.tables[1].rows[0][2] == "2", "pairs of the seeds that both have"


@pytest.mark.parametrize("reference", ["split", "split+se_none"])
def test_a_difference_that_is_both_to_the_reference_and_to_a_part_is_tested_once(
    finished: Path, reference: str
) -> None:
    pairs = [row[:2] for row in write_report(finished, reference).tables[1].rows]
    assert sorted(pairs) == sorted((name, reference) for name in SCORES if name != reference)


def test_rows_without_a_common_seed_are_named_and_keep_their_own_figures(finished: Path) -> None:
    for seed in (0, 1):
        (finished / "results" / f"paper-seed{seed}.json").unlink()
    (finished / "results" / "split-seed2.json").unlink()
    report = write_report(finished)
    assert "not tested against paper, with which they share no seed: split" in report.notes
    assert ("split", "38.75", "68.75", "58.75", "30.00", "10.00") in report.tables[2].rows


def test_the_report_has_how_far_the_shares_of_the_scales_vary(finished: Path) -> None:
    for seed, (attention, contribution) in enumerate([(1.0, 4.0), (2.0, 6.0), (3.0, 5.0)]):
        path = finished / "results" / f"paper-seed{seed}.json"
        spread = {"attention_spread": attention, "contribution_spread": contribution}
        path.write_text(json.dumps({**json.loads(path.read_text()), **spread}))
    report = write_report(finished)
    assert report.tables[3].rows == [("paper", "2.000", "5.000")]
    assert (report.folder / "attention.csv").is_file()


def test_a_reference_without_runs_is_named(finished: Path) -> None:
    with pytest.raises(ValueError, match="no finished run of 'resnet', only of paper, split"):
        write_report(finished, "resnet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": None}, "'score' is 'None'"),
        ({"score": float("nan")}, "'score' is 'nan'"),
        ({"seed": "0"}, "'seed' is '0'"),
        ({"seed": 0.5}, "'seed' is 0.5"),
        ({"gmacs": []}, r"'gmacs' is '\[\]'"),
        ({"model_args": "[]"}, "'model_args' is no object"),
        ({"model_args": "{"}, "Expecting"),
    ],
)
def test_a_damaged_result_is_named_with_the_remedy(
    change: dict[str, Any], message: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished / "results" / "split-seed1.json"
    whole = path.read_text()
    path.write_text(json.dumps({**json.loads(whole), **change}))
    assert main(["study", "report", str(finished)]) == 2
    said = capsys.readouterr().err
    assert re.search(
        rf"split-seed1.json is damaged \({message}.*\); take it out, and the study does its run again", said
    )
    assert said.count("\n") == 1
    path.write_text(whole[:100])
    with pytest.raises(ValueError, match=r"split-seed1.json is damaged"):
        write_report(finished)


def test_a_result_that_is_being_written_is_not_read(finished: Path) -> None:
    before = read_results(finished)
    (finished / "results" / ".split-seed1.json.x1y2.json").write_text("{")
    assert read_results(finished) == before


@pytest.mark.parametrize("text", [None, "a: [", "[]", "schedule: {epochs: 2}", "\x80"])
def test_a_study_that_lost_its_settings_is_named(text: str | None, finished: Path) -> None:
    path = finished / "study.yaml"
    path.unlink()
    if text is not None:
        path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"no study.yaml: it is no study" if text is None else "study.yaml is damaged"):
        write_report(finished)


def test_a_table_prints_as_text_csv_and_markdown() -> None:
    table = Table(title="T", columns=("name", "value"), rows=[("a|b", "1.5"), ("c, d", "")], notes=("why",))
    assert printed(table, "csv") == 'name,value\na|b,1.5\n"c, d",\n'
    assert printed(table, "markdown").splitlines()[3] == "|---|--:|"
    text = printed(table, "text")
    assert "1.5" in text
    assert text.endswith("why\n")


def test_the_table_of_cost_says_what_was_published_and_how_far_off_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from epsanet.network import rivals
    from epsanet.study import tables

    kept = {name: rivals.RIVALS[name] for name in ("bat", "epsanet")}
    monkeypatch.setattr(tables, "RIVALS", kept)
    rows = {row[0]: row[1:] for row in tables.imagenet_costs().rows}
    assert rows["batresnet50"][:3] == ("30.23", "30.20", "+0.03")
    assert rows["epsanet50_small"][:6] == ("22.56", "22.56", "0", "3.598", "3.62", "-0.02")
    assert rows["epsanet101_large_g32"][0] == "53.74"
    assert math.isclose(float(rows["epsanet101_large_g32"][2]), 53.74 - 49.59, abs_tol=0.006)


def test_a_detector_is_a_run_of_a_study_too_and_its_score_is_the_box_ap_after_the_last_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from detecting import BACKBONE, BACKBONE_ARGS, coco_folder, detector_config

    from epsanet.data.config import DataConfig
    from epsanet.network.detectors import load_detector
    from epsanet.study.worker import measure_detector, run_one
    from epsanet.tasks.config import ScheduleConfig, TrainConfig
    from epsanet.tasks.detection.evaluate import evaluate_detector

    data = DataConfig(source=str(coco_folder(tmp_path / "coco")), batch_size=2, workers=0)
    config = TrainConfig(
        model=BACKBONE,
        model_args=BACKBONE_ARGS,
        detector=detector_config("faster_rcnn"),
        data=data,
        schedule=ScheduleConfig(epochs=1),
        device="cpu",
        output=str(tmp_path / "run"),
    )
    run_one(config, tmp_path / "result.json", {"network": "epsanet", "seed": 0})
    found = json.loads((tmp_path / "result.json").read_text())
    expected = evaluate_detector(str(tmp_path / "run" / "model"), data, split="val")
    assert found["score"] == pytest.approx(100 * expected.box.ap)
    assert found["images"] == expected.images
    detector = load_detector(tmp_path / "run" / "model").model
    assert found["parameters"] == sum(p.numel() for p in detector.parameters())

    scored: dict[str, torch.Tensor] = {}

    def evaluated(loaded: Any, *args: Any, **kwargs: Any) -> Any:
        scored.update(loaded.model.state_dict())
        return evaluate_detector(loaded, *args, **kwargs)

    monkeypatch.setattr("epsanet.tasks.detection.evaluate.evaluate_detector", evaluated)
    best = tmp_path / "run" / "model" / "model.safetensors"
    save_file({name: 2 * value for name, value in load_file(best).items()}, best)  # of another epoch than the last
    measure_detector(config, tmp_path / "run")
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, last[f"model.{name}"]) for name, value in scored.items())


def test_each_network_of_a_study_of_detectors_has_its_own_trained_backbone(tmp_path: Path) -> None:
    from epsanet.network.detector_config import DetectorConfig
    from epsanet.study.rows import Row
    from epsanet.study.running import StudyRun
    from epsanet.tasks.config import TrainConfig

    train = TrainConfig(detector=DetectorConfig(), init_from="x/{network}-seed0/model", output=str(tmp_path))
    run = StudyRun(folder=tmp_path, row=Row(name="se", title="SENet", model="seresnet50"), seed=3)
    config = run.config(train)
    assert config.init_from == "x/se-seed0/model"
    assert (config.model, config.seed, config.output) == ("seresnet50", 3, str(tmp_path / "runs" / "se-seed3"))
    assert train.init_from == "x/{network}-seed0/model", "the common configuration has been changed"
