"""What ``epsanet predict --output x.parquet`` costs over many images, beside the forward pass alone.

The images are hard links to the files of a folder, as many as asked for. Each row is a process of its own, so that its
peak of memory is its own; a run over one image is taken off, so that the start does not count. If memory is constant,
the peak of the last row is that of the row before it.

Usage: python benchmarks/predict.py IMAGES [--model NAME] [--counts 1000 10000 100000] [--workers N] [--clock wall|cpu]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from epsanet.data.images import IMAGE_SUFFIXES

FORWARD = """
import sys, torch
from epsanet.network.weights import load_model
from epsanet.tasks.inference import inference_network
name, count, batch_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
loaded = load_model(name)
network = inference_network(loaded.model, loaded.data_config["input_size"], torch.device("cpu"))
network = network.to(memory_format=torch.channels_last)
images = torch.randn(batch_size, *loaded.data_config["input_size"]).to(memory_format=torch.channels_last)
with torch.inference_mode():
    for first in range(0, count, batch_size):
        network(images[: min(batch_size, count - first)])
"""


def links(source: Path, folder: Path, count: int) -> None:
    """So many hard links to the images of a folder, a thousand in each folder."""
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise SystemExit(f"{source} holds no images")
    for number in range(count):
        path = folder / f"{number // 1000:04d}" / f"{number:07d}{files[number % len(files)].suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(files[number % len(files)], path)
        except OSError:  # another file system
            path.write_bytes(files[number % len(files)].read_bytes())


def measure(command: list[str], clock: str) -> tuple[float, float]:
    """Seconds, and MiB at the peak."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(errors)
    seconds = time.perf_counter() - start if clock == "wall" else usage.ru_utime + usage.ru_stime
    return seconds, usage.ru_maxrss / 1024


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--model", default="epsanet14_tiny.digits")
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    options = parser.parse_args()
    table = Table(
        title=f"{options.model}, batch {options.batch_size}, {options.workers} workers, {options.clock} clock"
    )
    for name in ("images", "predict [images/s]", "forward alone [images/s]", "predict [MiB]", "forward alone [MiB]"):
        table.add_column(name, justify="right")
    flags = ["--batch_size", str(options.batch_size), "--workers", str(options.workers), "--device", "cpu"]

    def predict(count: int) -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as name:
            links(options.images, Path(name) / "images", count)
            output = Path(name) / "x.parquet"
            command = [sys.executable, "-m", "epsanet", "predict", options.model, f"{name}/images"]
            return measure([*command, "--output", str(output), *flags], options.clock)

    def forward(count: int) -> tuple[float, float]:
        words = [options.model, str(count), str(options.batch_size)]
        return measure([sys.executable, "-c", FORWARD, *words], options.clock)

    starts = [run(1)[0] for run in (predict, forward)]
    for count in options.counts:
        found = [run(count) for run in (predict, forward)]
        rates = [f"{count / (seconds - start):,.0f}" for (seconds, _), start in zip(found, starts, strict=True)]
        table.add_row(f"{count:,}", *rates, *(f"{peak:,.0f}" for _, peak in found))
    Console().print(table)


if __name__ == "__main__":
    main()
