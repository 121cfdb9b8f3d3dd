"""How fast the networks run on this machine's CPU, against others and other engines: tables, bars, a plot.

Contenders take turns inside one run, so that a busy moment hits all; figures are medians with the quartiles' distance.
``--quick`` measures what the bars need in a few minutes. Everything takes about two hours; ``--compile bars``
compiles the two networks of the bars only, ``--compile none`` none. On a machine that others use too,
``--threads 1 --clock cpu`` counts this process's processor time instead of the clock on the wall.

Usage: python benchmarks/speed.py [--quick] [--compile all|bars|none] [--batches N ...] [--threads N]
                                  [--clock wall|cpu] [--rounds N] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.util
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import epsanet
from epsanet import kernels
from epsanet.kernels import choice
from epsanet.network.psa import SPC
from epsanet.tasks.devices import keep_freed_memory

RIVALS = ("resnet50", "seresnet50", "ecaresnet50t", "skresnet50", "resnext50_32x4d")
NETWORKS = ("epsanet50_small", "epsanet50_large", "epsanet101_small", "epsanet101_large")
BAR_NETWORKS = ("epsanet50_small", "resnet50")
Run = Callable[[], object]


class Clock:
    """Times contenders in turns."""

    def __init__(self, kind: str, rounds: int) -> None:
        self.now = time.perf_counter if kind == "wall" else time.process_time
        self.rounds = rounds

    def race(self, contenders: dict[str, Run]) -> dict[str, tuple[float, float]]:
        """Median and quartiles' distance of each contender, milliseconds."""
        for run in contenders.values():
            run()
        times: dict[str, list[float]] = {name: [] for name in contenders}
        begin = time.perf_counter()
        for number in range(self.rounds):
            if number >= 5 and time.perf_counter() - begin > 60:
                break
            for name, run in contenders.items():
                start = self.now()
                run()
                times[name].append((self.now() - start) * 1e3)
        result = {}
        for name, values in times.items():
            low, middle, high = statistics.quantiles(values, n=4)
            result[name] = (middle, high - low)
        return result


def table(title: str, rows: dict[str, tuple[float, float]], divide: float = 1) -> None:
    print(f"\n### {title}\n\n| contender | median ms | quartiles apart |\n|---|---:|---:|")
    for name, (middle, spread) in rows.items():
        print(f"| {name} | {middle / divide:.2f} | {spread / divide:.2f} |")
    sys.stdout.flush()


def bar(name: str, value: float, limit: float, at_least: bool) -> None:
    met = value >= limit if at_least else value <= limit
    sign = "≥" if at_least else "≤"
    print(f"BAR {'met   ' if met else 'MISSED'} {name}: {value:.2f} (bar {sign} {limit})", flush=True)


def sgemm_peak(clock: Clock) -> float:
    """The machine's matrix product, GFLOP/s."""
    a = torch.randn(1536, 1536)
    times = clock.race({"sgemm": lambda: a @ a})
    return 2 * 1536**3 / times["sgemm"][0] / 1e6


# ------------------------------------------------------------------------------------------------------- convolutions


def packed_convolution(x: Tensor, weight: Tensor, groups: int) -> Run:
    """The kernel as an inference network calls it: weights packed before, channels in lane order."""
    made, seen, size = weight.shape[0], x.shape[1], weight.shape[-1]
    assert choice.native is not None
    orders = kernels.input_order(seen, (groups,), False), kernels.output_order(made, (groups,), False)
    native = choice.native.Layer(seen, made, [size], [groups], 1, False, *orders)
    packed = torch.empty(native.packed_size(False))
    native.pack([weight], packed, False, 1)
    x_NHWC = x.permute(0, 2, 3, 1)
    y, sums = torch.empty(*x_NHWC.shape[:3], made), torch.empty(len(x), made)
    return lambda: native.forward(x_NHWC, packed, y, sums, True, torch.get_num_threads())


def branches(clock: Clock, batch: int, peak: float) -> None:
    """Branch convolutions k = 5, 7, 9 of all blocks of EPSANet-50 Small."""
    total = {"NCHW": 0.0, "channels-last": 0.0, "ours": 0.0}
    work = 0.0
    print("\n### Branch convolutions, ms for one block\n")
    print("| layer | NCHW | channels-last | ours | ours GFLOP/s |\n|---|---:|---:|---:|---:|")
    for channels, size, blocks in ((64, 56, 3), (128, 28, 4), (256, 14, 6), (512, 7, 3)):
        for kernel_size, groups in ((5, 4), (7, 8), (9, 16)):
            x = torch.randn(batch, channels, size, size)
            x_last = x.contiguous(memory_format=torch.channels_last)
            weight = torch.randn(channels // 4, channels // groups, kernel_size, kernel_size)
            weight_last = weight.contiguous(memory_format=torch.channels_last)

            def plain(x: Tensor, weight: Tensor, k: int = kernel_size, g: int = groups) -> Run:
                return lambda: F.conv2d(x, weight, None, 1, k // 2, 1, g)

            with torch.no_grad():
                times = clock.race(
                    {
                        "NCHW": plain(x, weight),
                        "channels-last": plain(x_last, weight_last),
                        "ours": packed_convolution(x_last, weight, groups),
                    }
                )
            flops = 2.0 * weight.numel() * batch * size * size
            work += flops * blocks
            row = " | ".join(f"{times[name][0]:.2f}" for name in total)
            speed = flops / times["ours"][0] / 1e6
            print(f"| C={channels} {size}×{size} k={kernel_size} G={groups} | {row} | {speed:.0f} |", flush=True)
            for name in total:
                total[name] += times[name][0] * blocks
    print(
        f"| all 16 blocks | {' | '.join(f'{total[name]:.1f}' for name in total)} | {work / total['ours'] / 1e6:.0f} |"
    )
    print(f"\nShare of the sgemm peak: {work / total['ours'] / 1e6 / peak:.0%}")
    bar(f"branch convolutions, batch {batch}: NCHW / ours", total["NCHW"] / total["ours"], 5, at_least=True)


# ---------------------------------------------------------------------------------------------------------- inference


def eager(model: nn.Module, x: Tensor, channels_last: bool) -> Run:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network, images = copy.deepcopy(model).to(memory_format=layout), x.contiguous(memory_format=layout)

    def run() -> object:
        with torch.no_grad(), kernels.use("reference"):
            return network(images)

    return run


def frozen(model: nn.Module, x: Tensor) -> Run:
    images = x.contiguous(memory_format=torch.channels_last)
    network = copy.deepcopy(model).to(memory_format=torch.channels_last)
    compiled = torch.compile(network, options={"freezing": True})

    def run() -> object:
        with torch.no_grad(), kernels.use("reference"):
            return compiled(images)

    return run


def onnx_file(model: nn.Module, x: Tensor, folder: Path) -> Path:
    path = folder / "network.onnx"
    with kernels.use("reference"):
        torch.onnx.export(model, (x,), str(path), dynamo=True, external_data=False, verbose=False)
    return path


def onnx_runtime(path: Path, x: Tensor) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options)
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def openvino_engine(path: Path, x: Tensor) -> Run:
    import openvino

    network = openvino.Core().read_model(path)
    config = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(network, "CPU", config)
    images = x.numpy()
    return lambda: compiled(images)


def on_instruction_set(network: nn.Module, x: Tensor, name: str) -> Run:
    before = kernels.instruction_set()
    assert before is not None

    def run() -> object:
        kernels.set_instruction_set(name)
        try:
            return network(x)
        finally:
            kernels.set_instruction_set(before)

    return run


def engines(name: str, model: nn.Module, x: Tensor, compiled: bool) -> dict[str, Run]:
    """The contenders of one network; what is not installed is said and left out."""
    found: dict[str, Run] = {
        f"{name} NCHW": eager(model, x, channels_last=False),
        f"{name} channels-last": eager(model, x, channels_last=True),
    }
    optimized = epsanet.optimize(model, x)
    found[f"{name} optimize"] = lambda: optimized(x)
    if name == BAR_NETWORKS[0]:
        known = kernels.instruction_sets()
        slower = known[known.index(str(kernels.instruction_set())) + 1 :]
        for older in (other for other in slower if other != "portable"):  # which is none to race with
            found[f"{name} on {older}"] = on_instruction_set(optimized, x, older)
    if compiled:
        found[f"{name} torch.compile, frozen"] = frozen(model, x)
    if compiled and name in BAR_NETWORKS:
        fast = epsanet.optimize(model, x, compile=True)
        found[f"{name} optimize, compiled"] = lambda: fast(x)
    if any(importlib.util.find_spec(module) is None for module in ("onnxruntime", "openvino", "onnxscript")):
        print("ONNX Runtime and OpenVINO are skipped: pip install 'epsanet[deploy]'")
        return found
    with tempfile.TemporaryDirectory() as folder:
        path = onnx_file(model, x, Path(folder))
        found[f"{name} ONNX Runtime"] = onnx_runtime(path, x)
        found[f"{name} OpenVINO"] = openvino_engine(path, x)
    return found


def inference(clock: Clock, batch: int, others: tuple[str, ...], compiled: str) -> None:
    """The two networks of the bars in one race; each other one in a race of its own, for memory, with ours in it."""
    x = torch.randn(batch, 3, 224, 224)
    title = f"Inference, batch {batch}, ms an image"

    def contenders(name: str) -> dict[str, Run]:
        chosen = compiled == "all" or (compiled == "bars" and name in BAR_NETWORKS)
        return engines(name, timm.create_model(name).eval(), x, chosen)

    small = contenders("epsanet50_small")
    times = clock.race(small | contenders("resnet50"))
    table(title, times, divide=batch)
    ours = min(value[0] for name, value in times.items() if name.startswith("epsanet50_small optimize"))
    engine_times = {name: value[0] for name, value in times.items() if " optimize" not in name and " on " not in name}
    rival = min(value for name, value in engine_times.items() if name.startswith("resnet50 "))
    own = min(value for name, value in engine_times.items() if name.startswith("epsanet50_small "))
    print(f"\nours / EPSANet-50 Small's best other engine: {ours / own:.2f}")
    print(f"ours / ResNet-50 after `optimize`: {ours / times['resnet50 optimize'][0]:.2f}")
    if batch in (1, 16):
        plain = times["epsanet50_small NCHW"][0]
        bar(f"inference, batch {batch}: plain NCHW / ours", plain / ours, 3 if batch == 1 else 3.5, at_least=True)
        limit = 1.25 if batch == 1 else 1.10
        bar(f"inference, batch {batch}: ours / ResNet-50's best engine", ours / rival, limit, at_least=False)
    reference = {"epsanet50_small optimize": small["epsanet50_small optimize"]}
    for name in others:
        table(title, clock.race(reference | contenders(name)), divide=batch)


# ----------------------------------------------------------------------------------------------------------- training


def training_step(name: str, x: Tensor, channels_last: bool, chosen: kernels.Choice, classes: int) -> Run:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = timm.create_model(name, num_classes=classes).train().to(memory_format=layout)
    images, target = x.contiguous(memory_format=layout), torch.arange(len(x)) % classes
    optimiser = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)

    def run() -> object:
        with kernels.use(chosen):
            optimiser.zero_grad()
            F.cross_entropy(model(images), target).backward()
            optimiser.step()

    return run


def training(clock: Clock, others: tuple[str, ...]) -> None:
    """The two networks of the bars in one race; each other one in a race of its own, with ours in it."""
    x = torch.randn(16, 3, 224, 224)
    times = clock.race(
        {
            "epsanet50_small NCHW": training_step("epsanet50_small", x, False, "reference", 1000),
            "epsanet50_small channels-last": training_step("epsanet50_small", x, True, "reference", 1000),
            "epsanet50_small ours": training_step("epsanet50_small", x, True, "native", 1000),
            "resnet50 channels-last": training_step("resnet50", x, True, "reference", 1000),
        }
    )
    table("Training step, batch 16, 224×224", times)
    ours = times["epsanet50_small ours"][0]
    bar("training step, batch 16: plain NCHW / ours", times["epsanet50_small NCHW"][0] / ours, 2.2, at_least=True)
    rival = times["resnet50 channels-last"][0]
    bar("training step: ours / ResNet-50 channels-last", ours / rival, 1.35, at_least=False)
    for name in others:
        contenders = {
            "epsanet50_small ours": training_step("epsanet50_small", x, True, "native", 1000),
            f"{name} channels-last": training_step(name, x, True, "reference", 1000),
        }
        if name in NETWORKS:
            contenders[f"{name} ours"] = training_step(name, x, True, "native", 1000)
        table("Training step, batch 16, 224×224", clock.race(contenders))


def small_training(clock: Clock) -> None:
    x = torch.randn(128, 3, 32, 32)
    for name in ("epsanet14_tiny", "epsanet26_tiny", "epsanet26_tiny_x2"):
        times = clock.race(
            {
                f"{name} channels-last": training_step(name, x, True, "reference", 10),
                f"{name} ours": training_step(name, x, True, "native", 10),
            }
        )
        table("Training step, batch 128, 32×32", times)
        ratio = times[f"{name} channels-last"][0] / times[f"{name} ours"][0]
        bar(f"training step of {name}: channels-last without kernels / ours", ratio, 2, at_least=True)


# ------------------------------------------------------------------------------------------------------------- growth


def layer(channels: int, kernel_choice: kernels.Choice) -> Callable[[Tensor], object]:
    spc = SPC(channels, channels).to(memory_format=torch.channels_last)

    def run(x: Tensor) -> object:
        with torch.no_grad(), kernels.use(kernel_choice):
            return spc(x)

    return run


def growth(clock: Clock, peak: float, output: Path) -> None:
    """Time of one layer against batch, size and threads, with the time its arithmetic needs at the sgemm peak."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot, ticker

    threads = torch.get_num_threads()
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    run, reference = layer(128, "native"), layer(128, "reference")
    multiplications = sum(128 // 4 * 128 // g * k * k for k, g in ((3, 1), (5, 4), (7, 8), (9, 16)))
    for axis, label, points in (
        (axes[0], "batch", [(batch, 28, threads) for batch in (1, 2, 4, 8, 16, 32)]),
        (axes[1], "height and width", [(8, size, threads) for size in (7, 14, 28, 42, 56)]),
        (axes[2], "threads", [(8, 28, count) for count in range(1, threads + 1)]),
    ):
        ours, theirs, floor = [], [], []
        for batch, size, count in points:
            torch.set_num_threads(count)
            x = torch.randn(batch, 128, size, size).contiguous(memory_format=torch.channels_last)
            times = clock.race({"ours": lambda x=x: run(x), "conv2d": lambda x=x: reference(x)})
            ours.append(times["ours"][0])
            theirs.append(times["conv2d"][0])
            floor.append(2 * multiplications * batch * size * size / peak / 1e6 * threads / count)
        torch.set_num_threads(threads)
        at = [point[{"batch": 0, "height and width": 1, "threads": 2}[label]] for point in points]
        axis.plot(at, theirs, "o-", label="conv2d, channels-last")
        axis.plot(at, ours, "o-", label="kernels")
        axis.plot(at, floor, "k:", label="arithmetic at the sgemm peak")
        axis.set(xlabel=label, ylabel="ms", xscale="log", yscale="log")
        axis.set_xticks(at, labels=map(str, at))
        axis.set_xticks([], minor=True)
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which(ticker.LogFormatter(minor_thresholds=(1.5, 0.6)))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle("The four branches of a PSA module with 128 channels")
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(output / "speed-growth.svg")
    print(f"\nwrote {output / 'speed-growth.svg'}")


# ------------------------------------------------------------------------------------------------------------- memory

MEMORY = """
import sys, torch, timm, epsanet
from pathlib import Path
from epsanet import kernels
from epsanet.kernels import choice
with kernels.use(sys.argv[1]):
    model = timm.create_model('epsanet50_small').train().to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        model(x).sum().backward()
status = Path("/proc/self/status").read_text()  # getrusage would give this process's parent's, if that is larger
print(int(status.split("VmHWM:")[1].split()[0]) / 1024)
"""


def memory() -> None:
    print("\n### Largest memory of a process, training EPSANet-50 Small at batch 8\n\n| kernels | MiB |\n|---|---:|")
    for chosen in ("reference", "native"):
        run = subprocess.run([sys.executable, "-c", MEMORY, chosen], capture_output=True, text=True, check=True)
        print(f"| {chosen} | {float(run.stdout):.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only what the bars need, without torch.compile")
    parser.add_argument("--compile", choices=("all", "bars", "none"), default="all", help="what with torch.compile")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64], help="of inference (default: 1 16 64)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "pictures")
    arguments = parser.parse_args()
    if arguments.clock == "cpu" and arguments.threads != 1:
        parser.error("--clock cpu adds up the time of all threads; use it with --threads 1")
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as the commands do; for every contender
    clock = Clock(arguments.clock, arguments.rounds or (5 if arguments.quick else 9))
    print(
        f"{datetime.date.today()} · {platform.machine()} · {kernels.instruction_set()} · {arguments.threads} threads · "
        f"{arguments.clock} time · torch {torch.__version__}"
    )
    peak = sgemm_peak(clock)
    print(f"sgemm: {peak:.0f} GFLOP/s")
    branches(clock, 4 if arguments.quick else 16, peak)
    small_training(clock)
    if arguments.quick:
        for batch in (1, 16):
            inference(clock, batch, (), compiled="none")
        training(clock, ())
        return
    others = tuple(name for name in (*NETWORKS, *RIVALS) if name not in BAR_NETWORKS)
    for batch in arguments.batches:
        inference(clock, batch, others, arguments.compile)
    training(clock, others)
    growth(clock, peak, arguments.output)
    memory()
    print(f"\nlargest memory of this run: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
