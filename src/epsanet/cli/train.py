"""Train a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from epsanet.cli.flags import EXIT_INTERRUPTED, describe_data, looked_up

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["arrange", "parser", "run"]


def parser() -> ArgumentParser:
    """The flags of the command."""
    from epsanet.tasks.config import recipe_names, train_parser

    parser = describe_data(train_parser())
    parser.usage = f"epsanet train [RECIPE] [flags]\n\nRECIPE is {', '.join(recipe_names())} or a YAML file."
    return parser


def arrange(words: list[str]) -> list[str]:
    """``train RECIPE`` is ``train --config PATH``; ``--resume RUN`` reads the run's own; ``digits`` is the default."""
    from epsanet.tasks.config import recipe_path

    words, place = looked_up(words, recipe_path), words.index("train") + 1
    named = place < len(words) and not words[place].startswith("-")
    flags = words[place + named :]
    resume = next((_flag_value(flags, place) for place, word in enumerate(flags) if word.startswith("--resume")), None)
    resume = None if resume == "auto" else resume
    if resume is not None and named:
        raise ValueError("--resume goes on with the run's own recipe; leave the recipe out")
    if any(word.startswith(("--config", "-h", "--help")) for word in flags) and not named:
        return words
    if resume is None:
        return [*words[:place], f"--config={recipe_path(words[place] if named else 'digits')}", *flags]
    from pathlib import Path

    if not (Path(resume) / "config.yaml").is_file():
        raise ValueError(f"{resume} is no run folder: it has no config.yaml; --resume takes a folder made by training")
    return [*words[:place], f"--config={Path(resume) / 'config.yaml'}", *flags]


def _flag_value(words: list[str], place: int) -> str:
    _, equals, value = words[place].partition("=")
    if not equals:
        value = words[place + 1] if place + 1 < len(words) else ""
    return value


def run(values: dict[str, Any]) -> int:
    """Do it with the flags\' values; the exit code."""
    from epsanet._processes import rank
    from epsanet.tasks.config import TrainConfig
    from epsanet.tasks.devices import keep_freed_memory
    from epsanet.tasks.train import TrainingInterrupted, train

    resume = values.pop("resume")
    values.pop("config")
    keep_freed_memory()
    try:
        train(TrainConfig(**values), resume=resume)
    except TrainingInterrupted as stop:
        if rank() == 0:
            print(stop)
        return EXIT_INTERRUPTED
    return 0
