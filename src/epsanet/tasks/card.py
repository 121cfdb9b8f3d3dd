"""The model card: what a model folder says of itself to whoever finds it."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCardData

from epsanet.tasks.config import TrainConfig
from epsanet.tasks.console import counted, duration
from epsanet.tasks.scores import Evaluation

__all__ = ["data_name", "model_card", "optimisation"]

_USE = """## Use

```python
import epsanet, timm

model = timm.create_model("local-dir:.", pretrained=True).eval()
```

`epsanet predict . IMAGES` prints class names; the preprocessing is in `config.json`.
"""


def data_name(source: str) -> str:
    """What a card calls a data set: the last part of its address, without the ending of a file; of one of the Hub's
    Parquet files, ``train-00000-of-00001.parquet``, the folder that it is in."""
    path = Path(source)
    if re.search(r"-\d+-of-\d+\.", path.name):
        folder = path.resolve().parent
        return (folder.parent if folder.name == "data" else folder).name
    return path.stem if path.is_file() else path.name


def optimisation(config: TrainConfig) -> str:
    """Optimiser, rate and schedule in one line."""
    optimizer, schedule = config.optimizer, config.schedule
    more, shape = (
        "".join(f", {name} {value}" for name, value in (arguments or {}).items())
        for arguments in (optimizer.opt_args, schedule.sched_args)
    )
    return (
        f"{optimizer.opt}, learning rate {optimizer.lr:g} ({schedule.sched}{shape}), "
        f"weight decay {optimizer.weight_decay:g}{more}"
    )


def model_card(
    *,
    config: TrainConfig,
    parameters: int,
    class_names: Sequence[str],
    input_size: tuple[int, int, int],
    licence: str | None,
    split: str,
    evaluation: Evaluation,
    epoch: int,
    seconds: float,
    processes: int,
    hardware: str,
) -> str:
    """Markdown under the Hub's metadata, which hold the result for programs to read.

    Args:
        config: of the run.
        parameters: of the network.
        class_names: of the network.
        input_size: channels, height, width in pixels.
        licence: of the network, as the Hub abbreviates it.
        split: that was evaluated, test or val.
        evaluation: the result on it.
        epoch: whose weights these are.
        seconds: that training took.
        processes: that trained together.
        hardware: name of the processor or GPU.
    """
    data, epochs = data_name(config.data.source), config.schedule.epochs
    names = ", ".join(class_names[:20]) + (", …" if len(class_names) > 20 else "")
    role = "it had no part in training" if split == "test" else "it also chose the epoch"
    low, high = evaluation.interval
    batch = f"batch {config.data.batch_size}" + (f" in each of {processes} processes" if processes > 1 else "")
    result = (
        f"| {split} | {evaluation.images:,} | {evaluation.top1:.2f} | {low:.2f} to {high:.2f} "
        f"| {evaluation.top5:.2f} | {evaluation.loss:.4f} |"
    )
    start = f"It was trained from the weights of {_origin(config.init_from)}.\n" if config.init_from else ""
    metadata = _metadata(config, licence, split, evaluation)
    return f"""---
{metadata}
---
# {config.model} trained on {data}

{config.model}, {parameters:,} parameters, for images of {input_size[1]}×{input_size[2]} pixels and {len(class_names)}
classes: {names}.
{start}
| split | images | top-1 [%] | 95 % interval | top-5 [%] | loss |
|---|---|---|---|---|---|
{result}

The weights are those of epoch {epoch} of {epochs}, the best on the validation split. The result is on the
{split} split; {role}.

{_USE}
## Training

{optimisation(config)},
{batch}, label smoothing {config.label_smoothing:g}, seed {config.seed}, {config.precision};
{duration(seconds)} on {hardware} ({counted(torch.get_num_threads(), "thread")}), torch {torch.__version__},
{time.strftime("%Y-%m-%d")}.

EPSANet is by Zhang, Zu, Lu, Zou and Meng, ACCV 2022, arXiv:2105.14447.
"""


def _metadata(config: TrainConfig, licence: str | None, split: str, evaluation: Evaluation) -> str:
    """The Hub's metadata in YAML; a data set is named as such where it is one of the Hub's."""
    source = config.data.source
    name = data_name(source)
    result = EvalResult(
        task_type="image-classification",
        dataset_type=source.removeprefix("hfds/") if source.startswith("hfds/") else name,
        dataset_name=name,
        dataset_split=split,
        metric_type="accuracy",
        metric_name="top-1",
        metric_value=evaluation.correct / evaluation.images,
    )
    return ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "epsanet"],
        license=licence,
        datasets=[source.removeprefix("hfds/")] if source.startswith("hfds/") else None,
        metrics=["accuracy"],
        model_name=config.model,
        eval_results=[result],
    ).to_yaml()


def _origin(source: str) -> str:
    """A name as it was given; of a path the last two parts, since the rest says nothing to others."""
    path = Path(source.removeprefix("local-dir:"))
    return "/".join(path.parts[-2:]) if path.exists() else source
