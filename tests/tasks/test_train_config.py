"""A run as data: recipes load, misspelt or impossible values are refused by name, flags go before recipes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from epsanet.tasks.config import (
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    load_recipe,
    recipe_names,
    recipe_path,
)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (OptimizerConfig, {"lr": 0}, r"optimizer\.lr=0 .* for example 0\.1"),
        (OptimizerConfig, {"lr": -0.1}, r"optimizer\.lr=-0\.1"),
        (OptimizerConfig, {"weight_decay": -1e-4}, r"optimizer\.weight_decay=-0\.0001 .* 0 or more"),
        (ScheduleConfig, {"epochs": 0}, r"schedule\.epochs=0 .* 1 or more"),
        (ScheduleConfig, {"epochs": 3, "warmup_epochs": 4}, r"warmup_epochs=4 does not fit into schedule\.epochs=3"),
        (ScheduleConfig, {"warmup_epochs": -1}, r"warmup_epochs=-1"),
        (TrainConfig, {"label_smoothing": 1.0}, r"label_smoothing=1\.0 .* up to below 1"),
        (TrainConfig, {"label_smoothing": -0.1}, r"label_smoothing=-0\.1"),
        (TrainConfig, {"devices": 0}, r"devices=0 .* 1 or more"),
        (TrainConfig, {"nodes": -1}, r"nodes=-1 .* 1 or more"),
        (TrainConfig, {"train_time_interval": -1.0}, r"train_time_interval=-1\.0 .* 0 or more minutes"),
    ],
)
def test_an_impossible_value_is_refused(build: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_loads_and_its_head_says_what_to_expect(name: str) -> None:
    config = load_recipe(name)
    text = recipe_path(name).read_text(encoding="utf-8")
    head = text[: re.search(r"^[^#]", text, re.MULTILINE).start()]  # type: ignore[union-attr]
    assert re.search(r"command +(\w+=\S+ )*epsanet train", head)
    assert re.search(r"(hardware|data) +\S", head)
    assert re.search(r"(expected|measured) +\S", head)
    keys = re.findall(r"^(\w+):", text, re.MULTILINE)
    assert keys, "a recipe sets something"
    changed = {
        field.name
        for field in dataclasses.fields(TrainConfig)
        if getattr(config, field.name) != getattr(TrainConfig(), field.name)
    }
    assert changed <= set(keys), "only what the file says differs from the defaults"
    assert changed


def test_digits_and_folder_are_shipped() -> None:
    assert {"digits", "folder"} <= set(recipe_names())
    assert load_recipe() == load_recipe("digits")
    assert load_recipe("digits").data.source == "digits"


def test_a_flag_goes_before_the_recipe_and_the_recipe_before_the_default(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "model: epsanet14_tiny\nmodel_args: {block_args: {softmax: channels}}\n"
        "schedule: {epochs: 7, sched: step}\ndata: {scale: [0.5, 0.75]}\n"
    )
    config = load_recipe(str(tmp_path / "mine.yaml"), ["--schedule.epochs=9", "--data.batch_size", "3"])
    wanted = TrainConfig(model="epsanet14_tiny", model_args={"block_args": {"softmax": "channels"}})
    wanted.schedule.epochs, wanted.schedule.sched = 9, "step"
    wanted.data.scale, wanted.data.batch_size = (0.5, 0.75), 3
    assert config == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schedule: {epoch: 3}", "epoch"),
        ("modle: resnet18", "modle"),
        ("optimizer: {lr: quick}", "lr"),
        ("schedule: {sched_args: {warmup_lr: 1}}", r"sched_args has warmup_lr, which .* use --schedule\.warmup_lr"),
        ("schedule: {sched_args: {cooldown_epochs: 2}}", r"has cooldown_epochs, but schedule\.epochs is the whole run"),
        ("schedule: {sched_args: {cycle_limit: 0}}", r"has cycle_limit=0, which is no number of cycles of the epochs"),
        ("schedule: {decay_milestones: [60, 30]}", r"schedule\.decay_milestones=\[60, 30\] must rise"),
        ("schedule: {epochs: 0}", r"schedule\.epochs=0 is impossible; use 1 or more"),
        ("data: {hflip: 2}", r"data\.hflip=2(\.0)? is no probability"),
        ("model: [", "parsing config.*line 2"),
        ("just words", "just words|dict|config"),
        ("optimizer: {opt_args: {lr: 1}}", r"opt_args has lr, which has a flag of its own; use --optimizer\.lr"),
        ("output: ''", "output is empty; give it a value, or leave it out"),
        ("model: &network\n  name: *network", r"mine\.yaml unfolds to more than 10,000 values, or one of its aliases"),
        ("model_args: {layers: &few [1, *few]}", "write the values out"),
        # ten times ten times … values of one line each
        (
            "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)),
            "more than 10,000 values",
        ),
    ],
)
def test_a_wrong_recipe_names_the_key_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        load_recipe(str(tmp_path / "mine.yaml"))
    assert "\n" not in str(raised.value)


def test_a_mistake_is_placed_in_the_file_or_among_the_flags(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("optimizer: {lr: quick}\n")
    with pytest.raises(ValueError, match=rf'^{re.escape(str(path))}: Parser key "optimizer\.lr": .*quick'):
        load_recipe(str(path))
    path.write_text("optimizer: {lr: 0.1}\n")
    with pytest.raises(ValueError, match=r'^Parser key "optimizer\.lr": .*fast'):
        load_recipe(str(path), ["--optimizer.lr=fast"])


def test_a_recipe_that_is_not_there_lists_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"no recipe 'digit': shipped are .*digits, .*folder.*, or name a YAML file"):
        load_recipe("digit")
