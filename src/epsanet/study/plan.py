"""From the flags of a study to its rows: what has to be known of the data set first."""

from __future__ import annotations

from epsanet.data.sources import open_data
from epsanet.network.weights import create_model
from epsanet.study.config import CompareConfig, StudyConfig
from epsanet.study.rows import Row, ablation_rows, compare_rows
from epsanet.tasks.config import TrainConfig

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
    if train.detector is not None:
        classes, size = 1000, 224  # of the backbones, whose cost is compared
    else:
        classes, size = len(open_data(train.data).class_names), train.data.input_size or 0
    if isinstance(study, CompareConfig):
        if train.model != "auto":
            raise ValueError(f"a comparison takes its networks from --networks; leave --model {train.model} out")
        return compare_rows(study, train.model_args, classes, size or (32 if study.size == "tiny" else 224))
    model = "epsanet14_tiny" if train.model == "auto" else train.model
    size = size or create_model(model).pretrained_cfg["input_size"][-1]
    return ablation_rows(study, model, train.model_args, classes, size)
