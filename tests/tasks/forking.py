"""A process that has imported torch and epsanet once, and makes of each run a child of its own, which may be killed.

Started as a script, it reads a request a line from standard input, and answers with a line. A request is a list of
processes that belong together; each is a command line of epsanet, its environment, where its output goes, and where it
is to be killed. ``Forks`` is the other end.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(kw_only=True)
class Kill:
    """SIGKILL to itself at one call of a function, before or after it, or at some time."""

    function: str = ""
    """module:name, or module:Class.name."""
    seconds: float = 0.0
    """When, if there is no function."""
    call: int = 1
    """Which call, from 1."""
    after: bool = False
    """Whether the call is made first."""
    path: str = ""
    """Count only calls that have a path of this name among their arguments."""
    number: int = signal.SIGKILL
    """The signal."""


@dataclass(kw_only=True)
class Process:
    """One process to be forked."""

    words: list[str]
    output: str
    environment: dict[str, str] = field(default_factory=dict)
    kill: dict[str, Any] | None = None


def together(words: list[str], output: Path, size: int = 1, kill: dict[int, Kill] | None = None) -> list[Process]:
    """As many processes as torchrun would start, without it.

    Args:
        words: of the command line.
        output: file of what the first process says; those of the others have their number behind.
        size: how many.
        kill: where to kill which.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    numbers = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0}
    return [
        Process(
            words=words,
            output=f"{output}.{rank}" if rank else str(output),
            environment={}
            if size == 1
            else shared | {key: str(value) for key, value in (numbers | {"RANK": rank, "LOCAL_RANK": rank}).items()},
            kill=asdict(kill[rank]) if kill and rank in kill else None,
        )
        for rank in range(size)
    ]


class Forks:
    """Runs processes by a server of its own."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, processes: list[Process], limit: float = 900) -> list[int]:
        """Exit codes of processes that ran at the same time; a signal is negative, and -1000 took too long."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        request = {"processes": [asdict(process) for process in processes], "limit": limit}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def close(self) -> None:
        self.server.kill()  # the end of its input may be held open by what a test has forked since
        self.server.communicate()


def _serve() -> None:
    import jsonargparse
    import lightning
    import torch
    import torch.utils.tensorboard
    from matplotlib.figure import Figure

    import epsanet.cli
    import epsanet.tasks.detection.run
    import epsanet.tasks.evaluate
    import epsanet.tasks.train

    sys.path.append(str(Path(__file__).parents[1]))
    from making import one_pixel

    del jsonargparse, lightning
    torch.set_num_threads(1)
    Figure.savefig = one_pixel  # type: ignore[assignment, method-assign]
    for line in sys.stdin:
        request = json.loads(line)
        children = [_fork(process, epsanet.cli.main) for process in request["processes"]]
        print(json.dumps(_wait(children, request["limit"])), flush=True)


def _fork(process: dict[str, Any], main: Any) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        descriptor = os.open(process["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        os.environ.update(process["environment"])
        if process["kill"] is not None:
            arm(Kill(**process["kill"]))
        code = main(process["words"])
        sys.stdout.flush()
    except BaseException:  # noqa: BLE001 - the child says it, and ends
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def arm(kill: Kill) -> None:
    """Let this process kill itself."""
    import importlib
    import threading

    if not kill.function:
        timer = threading.Timer(kill.seconds, os.kill, (os.getpid(), kill.number))
        timer.daemon = True
        timer.start()
        return
    module, _, name = kill.function.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original, calls = getattr(owner, name), [0]

    def armed(*arguments: Any, **options: Any) -> Any:
        counted = not kill.path or any(Path(str(argument)).name == kill.path for argument in arguments)
        calls[0] += counted
        due = counted and calls[0] == kill.call
        if due and not kill.after:
            os.kill(os.getpid(), kill.number)
        result = original(*arguments, **options)
        if due and kill.after:
            os.kill(os.getpid(), kill.number)
        return result

    setattr(owner, name, armed)


def _wait(children: list[int], limit: float) -> list[int]:
    codes: dict[int, int] = {}
    end = time.monotonic() + limit
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            for child in set(children) - codes.keys():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                codes[child] = -1000
        time.sleep(0.01)
    return [codes[child] for child in children]


if __name__ == "__main__":
    _serve()
