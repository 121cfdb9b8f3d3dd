"""A study as data: which networks, how often, under which recipe. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from epsanet.tasks.config import TrainConfig, refuse_endless, train_parser

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = [
    "PARTS",
    "CompareConfig",
    "StudyConfig",
    "refuse_unfit",
    "split_values",
    "study_parser",
    "study_recipe_names",
    "study_recipe_path",
]

Part = Literal["compare", "ablation"]
PARTS: tuple[Part, ...] = ("compare", "ablation")
"""The commands that train."""


@dataclass(kw_only=True)
class StudyConfig:
    """What the runs of a study have in common besides how they are trained."""

    networks: list[str] = field(default_factory=list)
    """Names of the rows; all of them when left out."""
    seeds: int = 5
    """Runs of each network. Run n of every network has the same data order and augmentation."""
    match: Literal["none", "parameters", "macs"] = "parameters"
    """Give all networks the reference's number of parameters or multiply-accumulates, by other widths of their
    stages; none: the widths as they are."""
    at_once: int = 1
    """Runs at a time, each in a process with its share of the cores."""
    threads: int = 1
    """Processor threads of a run. Another number rounds differently and gives other scores: a study keeps its own."""

    def __post_init__(self) -> None:
        for name in ("seeds", "at_once", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is impossible; use 1 or more")
        if len(set(self.networks)) < len(self.networks):
            raise ValueError(f"networks={self.networks} names a network twice; name each once")


@dataclass(kw_only=True)
class CompareConfig(StudyConfig):
    """A comparison of networks."""

    size: Literal["tiny", "50", "101"] = "tiny"
    """Small-image form, or depth."""
    reference: str = "epsanet"
    """The network that all others are matched to and tested against."""


def study_recipe_names() -> list[str]:
    """The study recipes that are shipped."""
    folder = files("epsanet") / "study" / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def study_recipe_path(name: str) -> Path:
    """Path of a shipped study recipe, or of the user's own file.

    Raises:
        ValueError: when there is neither, or its values have no end.
    """
    if name in study_recipe_names():
        return Path(str(files("epsanet") / "study" / "recipes" / f"{name}.yaml"))
    if Path(name).is_file():
        refuse_endless(Path(name))
        return Path(name)
    raise ValueError(f"there is no study {name!r}: shipped are {', '.join(study_recipe_names())}, or name a YAML file")


def refuse_unfit(part: Part, path: Path) -> None:
    """Read a study's file with the flags that it may set, because errors inside a subcommand name neither.

    Args:
        part: the command that the file is given to.
        path: of the file.

    Raises:
        ValueError: for a key or a value that does not fit, and for a file of the other command.
    """
    reason = _unfit(part, path)
    if reason:
        other: Part = "ablation" if part == "compare" else "compare"
        hint = "" if _unfit(other, path) else f"; it is a study for epsanet study {other}"
        raise ValueError(f"{path}: {reason}{hint}")


def _unfit(part: Part, path: Path) -> str:
    from jsonargparse import ArgumentError

    try:
        values = study_parser({"compare": CompareConfig, "ablation": StudyConfig}[part]).parse_path(path)
    except ArgumentError as error:
        return " ".join(str(error).split())
    return "a comparison has networks, and no model" if part == "compare" and values["model"] != "auto" else ""


def study_parser(kind: type[StudyConfig]) -> ArgumentParser:
    """The flags of a study: its own, and those of ``epsanet train`` but for ``--seed`` and ``--resume``."""
    parser = train_parser(skip={"seed"}, resume=False)
    parser.add_class_arguments(kind)
    return parser


def split_values(values: dict[str, object], kind: type[StudyConfig]) -> tuple[StudyConfig, TrainConfig]:
    """The parsed flags as the two configurations."""
    own = {name: values[name] for name in kind.__dataclass_fields__}
    rest = {name: value for name, value in values.items() if name not in own and name != "config"}
    return kind(**own), TrainConfig(**rest)  # type: ignore[arg-type]
