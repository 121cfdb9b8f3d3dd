"""From the flags of a study to its rows: what has to be known of the data set first."""

from __future__ import annotations

from pathlib import Path

from epsanet.data.coco import find_coco_splits
from epsanet.data.digits_scenes import DIGITS_DETECTION
from epsanet.data.sources import open_data
from epsanet.network.model_folder import is_detector
from epsanet.network.weights import create_model, load_model
from epsanet.study.config import CompareConfig, StudyConfig
from epsanet.study.rows import Row, ablation_rows, compare_rows
from epsanet.tasks.config import TrainConfig
from epsanet.tasks.devices import resolve_device

__all__ = ["plan"]


def plan(study: StudyConfig, train: TrainConfig) -> list[Row]:
    """The networks to train, the reference first.

    Args:
        study: a ``CompareConfig`` for a comparison, else an ablation is meant.
        train: what all runs have in common.

    Raises:
        ValueError: for a network, a data set or a setting that cannot be had, before anything is written.
    """
    if train.init_from is not None and train.detector is None:
        raise ValueError("a study of classifiers starts from random weights; leave --init_from out")
    if train.devices * train.nodes > 1:
        raise ValueError("a run of a study is one process; leave --devices and --nodes out, and start a study a device")
    if "num_classes" in train.model_args:
        raise ValueError("the data set says how many classes there are; leave --model_args.num_classes out")
    resolve_device(train.device)
    if train.detector is not None:
        if train.data.source != DIGITS_DETECTION:
            find_coco_splits(Path(train.data.source))
        classes, size = 1000, 224  # of the backbones, whose cost is compared
    else:
        classes, size = len(open_data(train.data).class_names), train.data.input_size or 0
    if isinstance(study, CompareConfig):
        if train.model != "auto":
            raise ValueError(f"a comparison takes its networks from --networks; leave --model {train.model} out")
        rows = compare_rows(study, train.model_args, classes, size or (32 if study.size == "tiny" else 224))
    else:
        model = "epsanet14_tiny" if train.model == "auto" else train.model
        size = size or create_model(model).pretrained_cfg["input_size"][-1]
        rows = ablation_rows(study, model, train.model_args, classes, size)
    for start in sorted({start for row in rows if (start := row.start(train.init_from)) is not None}):
        if not is_detector(start):
            load_model(start)
    return rows
