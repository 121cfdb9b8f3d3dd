"""The command line. Each command imports what it needs when it runs, so that ``--help`` answers at once."""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from epsanet._flags import file_at_fault, refuse_empty
from epsanet.cli.flags import EXIT_INTERRUPTED, EXIT_USER

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "train": "train a network: epsanet train [RECIPE or YAML file] [flags]; digits without a recipe",
    "evaluate": "accuracy of a classifier, average precision of a detector on a data set",
    "predict": "class names and probabilities of images; of detectors, what is where in them",
    "shard": "pack an image folder into WebDataset shards",
    "export": "a network for ONNX Runtime, OpenVINO or torch.export, checked on real images",
    "explain": "what a network looks at in images: Grad-CAM, and the scale each block listens to",
    "study": "the paper's experiments: cost tables, comparison, ablation, their report",
    "serve": "a page in the browser: drop a picture, see what networks make of it",
    "models": "the networks, their cost, the published figures beside, and the weights in this package",
    "convert": "released checkpoint to model folder, or back",
    "publish": "a model folder to the Hugging Face Hub",
}
"""Each is the module of its name here, with ``parser``, ``run`` and, where argparse is too narrow, ``arrange``; one
that has commands of its own adds them in ``add_parts``, which returns the parser of each."""


_OWN_SIGTERM = {"train", "evaluate", "study", "serve"}
"""Commands that handle SIGTERM themselves; Lightning would call another handler beside its own."""
_MOST_CHARACTERS = 300
"""Of what a library says that is not to fill a screen."""
_REMEDIES = (
    (
        {"InvalidCxxCompiler", "BackendCompilerFailed", "InductorError"},
        None,
        "torch.compile does not work here: leave --compile out",
    ),
    (
        set[str](),
        r"shared memory|DataLoader worker \(pid",  # an error in a worker has no number of the process
        "use fewer --data.workers (predict: --workers), or a container with more memory",
    ),
    (
        {"OutOfMemoryError", "MemoryError"},
        r"can't allocate memory|out of memory",
        "use a smaller --data.batch_size (predict: --batch_size)",
    ),
)
"""What to do about errors of the machine, by name of their type or by text."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 2 for the user's mistakes, 130 after Ctrl-C, and SIGTERM to train or evaluate.

    Args:
        arguments: of the command line, without the program's name. When left out, this is the program, and SIGTERM ends
            it as ``SystemExit``, so that temporary files are removed.
    """
    _print_whatever_comes()
    words = _normalised(list(sys.argv[1:] if arguments is None else arguments))
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        if arguments is None and _chosen(words) not in _OWN_SIGTERM:
            with _ended_by_sigterm():
                return _run(words)
        return _run(words)
    except KeyboardInterrupt:
        print("epsanet: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone
        return 0
    except (ValueError, OSError) as error:
        if debug:
            raise
        _print_error(error)
        return EXIT_USER
    except (RuntimeError, MemoryError) as error:
        remedy = _remedy(error)
        if debug or remedy is None:
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        _print_error(ValueError(f"{first[:_MOST_CHARACTERS]}; {remedy}"))
        return EXIT_USER


def _print_whatever_comes() -> None:
    """A terminal that does not know a character must not cost the result that it is in."""
    for stream in (sys.stdout, sys.stderr):
        encoding, reconfigure = getattr(stream, "encoding", None), getattr(stream, "reconfigure", None)
        if reconfigure is not None and str(encoding).lower() not in ("utf-8", "utf8"):
            reconfigure(errors="backslashreplace")


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # timeout sends it twice, and the second would end the cleaning
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _remedy(error: Exception) -> str | None:
    """What to do about an error of the machine; nothing for a fault of this package."""
    names = {kind.__name__ for kind in type(error).__mro__}
    for kinds, pattern, remedy in _REMEDIES:
        if names & kinds or (pattern is not None and re.search(pattern, str(error))):
            return remedy
    return None


def _print_error(error: Exception) -> None:
    """One line, from the process that the error is of."""
    processes: Any = sys.modules.get("epsanet._processes")  # absent while torch has not been needed
    if processes is not None and isinstance(error, processes.OtherProcessError):
        return
    place = processes.rank() if processes is not None else 0
    print(f"epsanet: {f'process {place}: ' * (place > 0)}{' '.join(_said(error).split())}", file=sys.stderr)


def _said(error: Exception) -> str:
    """What the system says about a path, with what to do."""
    if not isinstance(error, OSError) or error.filename is None:
        return str(error)
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{error.filename} needs a folder where a file stands; choose another place"
    if isinstance(error, PermissionError):
        return f"{error.filename} may not be read or written by this user; change its rights or choose another place"
    return str(error)


def _normalised(words: list[str]) -> list[str]:
    """``--data.on-bad-image`` is ``--data.on_bad_image``, and ``--data X`` is short for ``--data.source X``."""
    result = []
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            flag = "--" + flag[2:].replace("-", "_")
            word = ("--data.source" if flag == "--data" else flag) + equals + value
        result.append(word)
    return result


def _chosen(words: list[str]) -> str:
    """The command; empty where there is none."""
    return next((word for word in words if word in COMMANDS), "")


def _run(words: list[str]) -> int:
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(
        prog="epsanet",
        description="EPSANet (Pyramid Squeeze Attention, ACCV 2022): train, evaluate, predict, convert, publish.",
        epilog="epsanet COMMAND --help lists a command's flags; --debug shows the traceback of an error.",
        exit_on_error=False,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subcommands(required=True, dest="command")
    chosen = _chosen(words)
    command: Any = import_module(f"epsanet.cli.{chosen}") if chosen else None
    flags: dict[str, ArgumentParser] = {}
    for name, text in COMMANDS.items():
        sub = command.parser() if name == chosen else ArgumentParser(exit_on_error=False)
        sub.description = text
        commands.add_subcommand(name, sub, help=text)
        if name == chosen:
            # jsonargparse wants the upper level first
            flags = command.add_parts(sub) if hasattr(command, "add_parts") else {"": sub}
    arrange = getattr(command, "arrange", None)
    words = arrange(words) if arrange else words
    try:
        namespace = parser.parse_args(words)
        if chosen:
            given = namespace[chosen]
            part = "" if "" in flags else given.part
            refuse_empty(flags[part], given[part] if part else given)
        values = parser.instantiate(namespace)
    except ArgumentError as error:
        see = f"epsanet {chosen + ' ' if chosen else ''}--help"
        raise ValueError(f"{file_at_fault(error, words)}{error}; see {see}") from error
    except SystemExit as end:
        return int(end.code or 0)
    code: int = command.run(vars(values[chosen]))
    return code


def _version() -> str:
    from epsanet import __version__

    return f"epsanet {__version__}"
