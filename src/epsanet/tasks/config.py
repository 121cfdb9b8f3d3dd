"""A training run as data: every flag, YAML key and Python argument, with its default. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from epsanet._flags import file_at_fault, refuse_empty
from epsanet.data.config import DataConfig
from epsanet.network.detector_config import DetectorConfig

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = [
    "OptimizerConfig",
    "ScheduleConfig",
    "TrainConfig",
    "load_recipe",
    "recipe_names",
    "refuse_endless",
    "train_parser",
]

_MAX_RECIPE_VALUES = 10_000


@dataclass(kw_only=True)
class OptimizerConfig:
    """timm's optimisers, under timm's names."""

    opt: str = "sgd"
    """Any optimiser of timm: sgd (with Nesterov momentum), momentum (without), adamw, lamb, muon, …"""
    lr: float = 0.1
    """Highest learning rate."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 1e-4
    """Pull towards zero."""
    filter_bias_and_bn: bool = False
    """Whether norms and biases go without weight decay."""
    layer_decay: float | None = None
    """Factor of the learning rate from each layer to the one below it, 1 at the classifier, as is usual when a trained
    network is trained further. None: the same rate everywhere."""
    clip_grad: float | None = None
    """Largest norm of the gradient; longer ones are scaled down to it. None: as long as they are."""
    opt_args: dict[str, Any] | None = None
    """More of the optimiser's arguments, for example {betas: [0.9, 0.95]} of adamw or {ns_steps: 4} of muon."""

    def __post_init__(self) -> None:
        twice = next((name for name in self.opt_args or () if name in self.__dataclass_fields__), None)
        if twice is not None:
            raise ValueError(f"optimizer.opt_args has {twice}, which has a flag of its own; use --optimizer.{twice}")
        if self.lr <= 0:
            raise ValueError(f"optimizer.lr={self.lr} is impossible; use a rate above 0, for example 0.1")
        if self.weight_decay < 0:
            raise ValueError(f"optimizer.weight_decay={self.weight_decay} is impossible; use 0 or more")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"optimizer.layer_decay={self.layer_decay} is impossible; use a factor such as 0.75")
        if self.clip_grad is not None and self.clip_grad <= 0:
            raise ValueError(f"optimizer.clip_grad={self.clip_grad} is impossible; use a norm above 0, such as 1")


@dataclass(kw_only=True)
class ScheduleConfig:
    """timm's learning rate schedules, stepped after every batch."""

    sched: str = "cosine"
    """Shape of the decay, by timm's name: cosine, step, multistep, poly, tanh, wsd, rsqrt or constant."""
    epochs: int = 120
    """Passes over the training images."""
    warmup_epochs: float = 0
    """Epochs of linear rise from warmup_lr at the start, part of ``epochs``."""
    warmup_lr: float = 1e-5
    """Where the rise begins."""
    min_lr: float = 0.0
    """Where all but step, multistep and constant end."""
    decay_epochs: int = 30
    """Of step: epochs between two reductions."""
    decay_milestones: list[int] = field(default_factory=lambda: [30, 60, 90])
    """Of multistep: epochs of the reductions."""
    decay_rate: float = 0.1
    """Of step and multistep: factor of a reduction. Of poly: the power."""
    sched_args: dict[str, Any] | None = None
    """More arguments of timm's create_scheduler_v2, for example {decay_epochs: 0.3} of wsd or {cycle_limit: 3} of
    cosine, whose cycles share ``epochs``."""

    def __post_init__(self) -> None:
        own = [name for name in self.__dataclass_fields__ if name != "decay_epochs" or self.sched == "step"]
        twice = next((name for name in self.sched_args or () if name in own), None)
        if twice is not None:
            raise ValueError(f"schedule.sched_args has {twice}, which has a flag of its own; use --schedule.{twice}")
        longer = next((name for name in ("cooldown_epochs", "warmup_prefix") if name in (self.sched_args or {})), None)
        if longer is not None:
            raise ValueError(f"schedule.sched_args has {longer}, but schedule.epochs is the whole run; leave it out")
        if self.epochs < 1:
            raise ValueError(f"schedule.epochs={self.epochs} is impossible; use 1 or more")
        limit = (self.sched_args or {}).get("cycle_limit", 1)
        if not isinstance(limit, int) or not 1 <= limit <= self.epochs:
            raise ValueError(f"schedule.sched_args has cycle_limit={limit}, which is no number of cycles of the epochs")
        if self.decay_milestones != sorted(self.decay_milestones):
            raise ValueError(f"schedule.decay_milestones={self.decay_milestones} must rise")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ValueError(
                f"schedule.warmup_epochs={self.warmup_epochs} does not fit into schedule.epochs={self.epochs}"
            )
        if self.sched == "step" and self.decay_epochs < 1:
            raise ValueError(f"schedule.decay_epochs={self.decay_epochs} is impossible; use 1 or more")

    @property
    def first_cycle(self) -> float:
        """Epochs of the first cycle: all, where there is one. timm asks for them, and makes the run longer."""
        given = self.sched_args or {}
        return self.epochs / sum(given.get("cycle_mul", 1) ** place for place in range(given.get("cycle_limit", 1)))


@dataclass(kw_only=True)
class TrainConfig:
    """One training run."""

    model: str = "auto"
    """Any network of timm; epsanet models lists EPSANets. auto: that of init_from, else epsanet50_small."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Its arguments, for example drop_path_rate, or block_args for PSA's own: {softmax: channels}."""
    init_from: str | None = None
    """Where first weights and preprocessing come from: a model or run folder, a checkpoint, hf-hub:USER/NAME, or a name
    in timm (resnet50.a1_in1k). The classifier is new unless the classes are known by name. An EPSANet takes a ResNet
    of its depth and widths: PSA modules inherit from its 3×3 convolutions. A detector takes its backbone from a
    classifier, or all but other classes from a detector."""
    freeze_epochs: int = 0
    """Epochs at the start that train the classifier only; all else is frozen, norms with it."""
    detector: DetectorConfig | None = None
    """Train a detector with the network as its backbone, instead of a classifier."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data set, preprocessing and augmentation."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How weights are changed."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """How the learning rate changes."""
    loss: Literal["cross_entropy", "binary_cross_entropy"] = "cross_entropy"
    """binary_cross_entropy asks of each class by itself whether it is there."""
    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes."""
    bce_target_thresh: float | None = None
    """Of binary_cross_entropy: targets above this count as 1, others as 0, so that both classes of a mixed image are
    there. None: as they are."""
    ema_decay: float | None = None
    """Decay of a moving average of all weights, made after each step; it is what is validated and kept. None: none."""
    accumulate_grad_batches: int = 1
    """Batches whose gradients are averaged for one step of the optimiser, for batches that do not fit into memory."""
    seed: int = 42
    """Of weights, order and augmentation; a run with the same seed on the same machine gives the same numbers."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps; auto takes the first accelerator there is."""
    devices: int = 1
    """Processes on this machine, with a device each (DistributedDataParallel); torchrun says it itself."""
    nodes: int = 1
    """Machines; torchrun says it itself."""
    sync_batchnorm: bool = False
    """Whether batch norms take their statistics over the batches of all processes; on GPUs only."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Lightning's name of the arithmetic."""
    compile: bool = False
    """Whether torch.compile makes code for the network; the first steps are then slow, and a compiler is needed."""
    train_time_interval: float = 15.0
    """Minutes between two checkpoints within an epoch; one is saved at the end of each epoch anyway."""
    output: str | None = None
    """Run folder; runs/DATA-TIME when left out."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing} is impossible; use 0 up to below 1")
        if self.bce_target_thresh is not None:
            if self.loss != "binary_cross_entropy":
                raise ValueError(
                    "bce_target_thresh has a meaning with --loss binary_cross_entropy only; add or leave out"
                )
            if not 0 <= self.bce_target_thresh < 1:
                raise ValueError(f"bce_target_thresh={self.bce_target_thresh} is impossible; use 0 up to below 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} is impossible; use a share below 1, for example 0.9999")
        if self.accumulate_grad_batches < 1:
            raise ValueError(f"accumulate_grad_batches={self.accumulate_grad_batches} is impossible; use 1 or more")
        if not 0 <= self.freeze_epochs <= self.schedule.epochs:
            raise ValueError(
                f"freeze_epochs={self.freeze_epochs} does not fit into schedule.epochs={self.schedule.epochs}"
            )
        if self.freeze_epochs and self.init_from is None:
            raise ValueError("freeze_epochs would freeze random weights; name trained ones with --init_from")
        for name in ("devices", "nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is impossible; use 1 or more")
        if not self.train_time_interval >= 0:
            raise ValueError(f"train_time_interval={self.train_time_interval} is impossible; use 0 or more minutes")


def recipe_names() -> list[str]:
    """The recipes that are shipped."""
    folder = files("epsanet") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def recipe_path(name: str) -> Path:
    """Path of a shipped recipe, or of the user's own file.

    Raises:
        ValueError: when there is neither, or its values have no end.
    """
    if name in recipe_names():
        return Path(str(files("epsanet") / "recipes" / f"{name}.yaml"))
    if Path(name).is_file():
        refuse_endless(Path(name))
        return Path(name)
    raise ValueError(f"there is no recipe {name!r}: shipped are {', '.join(recipe_names())}, or name a YAML file")


def refuse_endless(path: Path) -> None:
    """A YAML file may name a value and put it into itself; a parser follows that without end.

    Raises:
        ValueError: when aliases unfold to more values than any recipe has.
    """
    try:
        waiting = [yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)]
    except (yaml.YAMLError, UnicodeDecodeError):
        return  # the parser says what is wrong
    seen = 0
    while waiting:
        node = waiting.pop()
        seen += 1
        if seen > _MAX_RECIPE_VALUES:
            raise ValueError(
                f"{path} unfolds to more than {_MAX_RECIPE_VALUES:,} values, or one of its aliases (*NAME) is part of "
                "what it stands for; write the values out"
            )
        if isinstance(node, yaml.MappingNode):
            waiting.extend(part for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            waiting.extend(node.value)


def train_parser(*, skip: set[str] | None = None, resume: bool = True) -> ArgumentParser:
    """The parser of a training run: one flag for every field, and ``--config`` for a YAML file.

    Args:
        skip: fields that have no flag.
        resume: whether there is ``--resume``.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of the flags below, the same as naming it RECIPE")
    if resume:
        parser.add_argument(
            "--resume",
            type=str | None,
            default=None,
            help="Run folder to go on from, in the same folder; auto: go on in --output if a run is there, else start.",
        )
    parser.add_class_arguments(TrainConfig, skip=set(skip or ()))
    return parser


def load_recipe(name: str = "digits", overrides: list[str] | None = None) -> TrainConfig:
    """The configuration of a recipe.

    Args:
        name: a shipped recipe, or a YAML file.
        overrides: flags as on the command line, for example ``["--schedule.epochs=5"]``.

    Raises:
        ValueError: when there is no such recipe, or a key or value in it does not fit.
    """
    from jsonargparse import ArgumentError

    parser, words = train_parser(), [f"--config={recipe_path(name)}", *(overrides or [])]
    try:
        namespace = parser.parse_args(words)
        refuse_empty(parser, namespace)
        values = parser.instantiate(namespace)
    except ArgumentError as error:
        raise ValueError(file_at_fault(error, words) + " ".join(str(error).split())) from error
    values = {key: value for key, value in vars(values).items() if key not in ("config", "resume")}
    return TrainConfig(**values)
