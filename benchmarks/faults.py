"""Kill runs at random times, let them go on, and compare them with one that was not killed.

python benchmarks/faults.py --kills 100 --processes 1
python benchmarks/faults.py --kills 20 --processes 2
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "tasks"))
from forking import Forks, Kill, together

from epsanet.tasks.checkpoints import read
from epsanet.tasks.devices import processor_name

# 1,293 digits: 21 steps an epoch.
FLAGS = ["--data.input_size=8", "--device=cpu", "--schedule.epochs=2", "--data.workers=0", "--train_time_interval=0"]
BATCH = 64
LIMIT = 600
"""Seconds after which a piece of a run is taken to hang."""


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Weights, statistics of the norms and momentum of a run."""
    last = read(run / "checkpoints" / "last.ckpt")
    momentum = last["optimizer_states"][0]["state"]
    return last["state_dict"] | {f"momentum {key}": value["momentum_buffer"] for key, value in momentum.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=60, help="Start no further kill after so long.")
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    dice, forks, started = random.Random(wanted.seed), Forks(), time.monotonic()
    words = ["train", "digits", *FLAGS, f"--data.batch_size={BATCH // wanted.processes}"]
    runs = kills = identical = failed = damaged = 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)

        def piece(run: str, kill: dict[int, Kill]) -> list[int]:
            said = root / f"{run}.txt"
            codes = forks.run(
                together([*words, f"--output={root / run}", "--resume=auto"], said, wanted.processes, kill), LIMIT
            )
            nonlocal damaged, failed
            damaged += "is damaged" in said.read_text()
            failed += not kill and any(codes)
            return codes

        piece("whole", {})  # the first is slower
        begin = time.monotonic()
        piece("again", {})
        length = time.monotonic() - begin
        reference = weights(root / "again")
        while kills < wanted.kills and time.monotonic() - started < 60 * wanted.minutes:
            runs += 1
            for _ in range(min(3, wanted.kills - kills)):  # up to three kills a run
                kill = Kill(seconds=dice.uniform(0.0, length))
                codes = piece(f"run{runs}", {dice.randrange(wanted.processes): kill})
                kills += any(codes)
                if not any(codes):
                    break
            else:
                piece(f"run{runs}", {})
            found = weights(root / f"run{runs}")
            identical += all(torch.equal(found[key], value) for key, value in reference.items())
    forks.close()
    table = Table(title=f"SIGKILL at random times; one thread a process, {processor_name()}")
    rows = {
        "processes": wanted.processes,
        "kills": kills,
        "runs": runs,
        "runs that went on to the end": runs - failed,
        "runs with the bits of one not killed": identical,
        "damaged checkpoints met": damaged,
        "seconds of a run not killed": round(length, 1),
    }
    table.add_column("what")
    table.add_column("count", justify="right")
    for what, count in rows.items():
        table.add_row(what, str(count))
    Console().print(table)


if __name__ == "__main__":
    main()
