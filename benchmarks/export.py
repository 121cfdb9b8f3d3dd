"""What tuning and int8 gain in each runtime: milliseconds an image and top-1 on the digits, in one run.

A trained model folder is measured with its accuracy; an untrained network by name for its speed alone. Contenders take
turns, the best time of each counts.

Usage: python benchmarks/export.py MODEL [--formats onnx openvino pt2] [--rounds N] [--no-tune]
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
from pathlib import Path

import timm
import torch
from timm.data import resolve_model_data_config

from epsanet import kernels
from epsanet.deploy.config import ExportConfig
from epsanet.deploy.export import Exported, export
from epsanet.deploy.tune import race
from epsanet.network.bundle import NETWORK_NAMES, open_runtime
from epsanet.network.weights import LoadedModel, load_model


def opened(name: str) -> tuple[LoadedModel, bool]:
    """A trained model, or an untrained network; and which of the two."""
    if Path(name).exists():
        return load_model(name), True
    model = timm.create_model(name).eval()
    names = [str(number) for number in range(model.num_classes)]
    return LoadedModel(model=model, class_names=names, data_config=resolve_model_data_config(model)), False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder that knows the digits, or a network's name")
    parser.add_argument("--formats", nargs="+", default=list(NETWORK_NAMES), choices=list(NETWORK_NAMES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-tune", action="store_true")
    arguments = parser.parse_args()
    loaded, trained = opened(arguments.model)
    shape = loaded.data_config["input_size"]
    print(
        f"{datetime.date.today()} · {loaded.architecture} {shape[1]}×{shape[2]} · {kernels.instruction_set()} · "
        f"{torch.get_num_threads()} threads · torch {torch.__version__}\n"
    )
    print("| runtime | network | batch 1 ms | batch 16 ms an image | top-1 % | MB | modules changed |")
    print("|---|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as scratch:
        for form in arguments.formats:
            configs = {"float32": ExportConfig(format=form, images="digits" if trained else None)}
            if not arguments.no_tune:
                configs["tuned"] = ExportConfig(format=form, tune=True, images="digits" if trained else None)
            if trained and form != "pt2":
                configs["int8"] = ExportConfig(format=form, int8=True, calibrate="digits")
            exported: dict[str, Exported] = {}
            for title, config in configs.items():
                exported[title] = export(loaded, Path(scratch) / f"{form}-{title}", config, note=lambda _: None)
            runs = [open_runtime(form, found.folder / NETWORK_NAMES[form], (1, *shape)) for found in exported.values()]
            one = race(runs, torch.randn(1, *shape), arguments.rounds)
            sixteen = race(runs, torch.randn(16, *shape), arguments.rounds)
            for place, (title, found) in enumerate(exported.items()):
                top1 = f"{found.agreement.top1[1]:.2f}" if found.agreement.top1 else ""
                row = f"{one[place]:.2f} | {sixteen[place] / 16:.2f} | {top1} | {found.bytes / 1e6:.2f}"
                print(f"| {form} | {title} | {row} | {len(found.forms) if title == 'tuned' else ''} |")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
