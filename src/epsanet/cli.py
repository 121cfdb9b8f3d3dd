"""The command line. Each command imports what it needs when it runs, so that ``--help`` answers at once."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["main"]

_HELP = {
    "train": "train a network: epsanet train [RECIPE or YAML file] [flags]; digits without a recipe",
    "evaluate": "accuracy of a classifier, average precision of a detector on a data set",
    "predict": "class names and probabilities of images; of detectors, what is where in them",
    "shard": "pack an image folder into WebDataset shards",
    "export": "a network for ONNX Runtime, OpenVINO or torch.export, checked on real images",
    "explain": "what a network looks at in images: Grad-CAM, and the scale each block listens to",
    "models": "the networks, their cost, the published figures beside, and the weights in this package",
    "convert": "released checkpoint to model folder, or back",
    "publish": "a model folder to the Hugging Face Hub",
}
_MODEL_HELP = "Model or run folder, checkpoint, hf-hub:USER/NAME, or name in timm."
_EXIT_USER, _EXIT_INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 2 for the user's mistakes, 130 after Ctrl-C.

    Args:
        arguments: of the command line, without the program's name.
    """
    words = _normalised(list(sys.argv[1:] if arguments is None else arguments))
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _run(words)
    except KeyboardInterrupt:
        print("epsanet: interrupted", file=sys.stderr)
        return _EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone
        return 0
    except (ValueError, OSError) as error:
        if debug:
            raise
        _print_error(error)
        return _EXIT_USER


def _print_error(error: Exception) -> None:
    """One line, from the process that the error is of."""
    processes: Any = sys.modules.get("epsanet._processes")  # absent while torch has not been needed
    if processes is not None and isinstance(error, processes.OtherProcessError):
        return
    place = processes.rank() if processes is not None else 0
    print(f"epsanet: {f'process {place}: ' * (place > 0)}{' '.join(str(error).split())}", file=sys.stderr)


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
    chosen = next((word for word in words if word in _HELP), None)
    for name, text in _HELP.items():
        sub = _PARSERS[name]() if name == chosen else ArgumentParser(exit_on_error=False)
        sub.description = text
        commands.add_subcommand(name, sub, help=text)
    if chosen == "train":
        words = _recipe_as_config(words)
    if chosen == "explain":
        words = _flags_last(words)
    try:
        namespace = parser.parse_args(words)
        values = parser.instantiate(namespace)
    except ArgumentError as error:
        raise ValueError(f"{error}; see epsanet {chosen + ' ' if chosen else ''}--help") from error
    except SystemExit as end:
        return int(end.code or 0)
    return _COMMANDS[namespace.command](vars(values[namespace.command]))


def _version() -> str:
    from epsanet import __version__

    return f"epsanet {__version__}"


def _describe_data(parser: ArgumentParser) -> ArgumentParser:
    """Say in ``--help`` what ``--data`` means here."""
    for action in parser._actions:
        if "--data" in action.option_strings:
            action.metavar, action.help = "SOURCE", "Short for --data.source."
    return parser


def _flags_last(words: list[str]) -> list[str]:
    """Model and images before the flags: argparse takes no images after a flag where there may be none at all.

    Every flag here but ``--help`` has a value.
    """
    names, flags, waiting = [], [], iter(words)
    for word in waiting:
        if not word.startswith("-"):
            names.append(word)
            continue
        flags.append(word)
        if "=" not in word and word not in ("-h", "--help"):
            flags.extend(value for value in [next(waiting, None)] if value is not None)
    return names + flags


def _train_parser() -> ArgumentParser:
    from epsanet.tasks.config import recipe_names, train_parser

    parser = _describe_data(train_parser())
    parser.usage = f"epsanet train [RECIPE] [flags]\n\nRECIPE is {', '.join(recipe_names())} or a YAML file."
    return parser


def _data_parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser, set_parsing_settings

    from epsanet.data.config import DataConfig

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(
        "model", type=str, help="Model, run or bundle folder, checkpoint, hf-hub:USER/NAME, or name in timm."
    )
    parser.add_class_arguments(DataConfig, "data")
    return _describe_data(parser)


def _evaluate_parser() -> ArgumentParser:
    parser = _data_parser()
    parser.add_argument("--split", type=str | None, default=None, help="train, val or test; test or val if left out.")
    _add_device(parser)
    parser.add_argument("--json", action="store_true", help="Print the result as JSON.")
    parser.add_argument("--output", type=str | None, default=None, help="Detectors: write COCO results into x.json.")
    return parser


def _predict_parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("model", type=str, help=f"{_MODEL_HELP[:-1]}, or an exported bundle.")
    parser.add_argument("images", type=str, nargs="+", help="Files, folders or glob patterns.")
    parser.add_argument("--output", type=str | None, default=None, help="Write x.csv, x.json or x.parquet instead.")
    parser.add_argument("--topk", type=int, default=5, help="Classes an image.")
    parser.add_argument("--score_thresh", type=float, default=0.5, help="Detectors: the least score.")
    parser.add_argument("--pictures", type=str | None, default=None, help="Detectors: draw the images into a folder.")
    parser.add_argument("--batch_size", type=int | None, default=None, help="Images at a time; 32, detectors 4.")
    parser.add_argument("--workers", type=int, default=0, help="Processes that read images.")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:N or mps.")
    return parser


def _shard_parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("source", type=str, help="Image folder, as for training, or whatever else --data takes.")
    parser.add_argument("destination", type=str, help="Folder to make; train on it with --data wds/FOLDER.")
    parser.add_argument("--shard_size", type=int, default=1000, help="Images a shard, at most.")
    parser.add_argument(
        "--on_bad_image", type=Literal["skip", "raise"], default="skip", help="Leave damaged images out, or stop."
    )
    return parser


def _export_parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser, set_parsing_settings

    from epsanet.deploy.config import ExportConfig

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("model", type=str, help=_MODEL_HELP)
    parser.add_class_arguments(ExportConfig, skip={"int8", "tune"})
    parser.add_argument("--int8", action="store_true", help="Quantise to eight bits; needs --calibrate.")
    parser.add_argument(
        "--tune", action="store_true", help="Measure which form of each grouped convolution is fastest here."
    )
    parser.add_argument(
        "-o", "--output", type=str | None, default=None, help="Folder to write; ARCHITECTURE-FORMAT if left out."
    )
    return parser


def _explain_parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser, set_parsing_settings

    from epsanet.data.config import DataConfig

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("model", type=str, help=_MODEL_HELP)
    parser.add_argument("images", type=str, nargs="*", help="Files, folders or glob patterns: a picture of each.")
    parser.add_argument("-o", "--output", type=str, default="explained", help="Folder to write.")
    parser.add_argument("--topk", type=int, default=5, help="Classes to show.")
    parser.add_argument("--layer", type=str | None, default=None, help="For Grad-CAM; a fitting one if left out.")
    parser.add_argument("--split", type=str | None, default=None, help="Of --data; test or val if left out.")
    parser.add_class_arguments(DataConfig, "data")
    parser.set_defaults({"data.source": ""})
    return _describe_data(parser)


def _models_parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    task = Literal["classification", "detection"]
    parser.add_argument("--task", type=task, default="classification", help="Networks, or the paper's detectors.")
    parser.add_argument("--json", action="store_true", help="Print the table as JSON.")
    return parser


def _convert_parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("source", type=str, help="Checkpoint of the released code, or a model folder.")
    parser.add_argument("destination", type=str, help="Folder to write, or a file that ends in .pth or .pth.tar.")
    parser.add_argument("--data_parallel", action="store_true", help="Put module. before each name of a checkpoint.")
    return parser


def _publish_parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("model", type=str, help="Model or run folder, or weights of this package.")
    parser.add_argument("repo", type=str, help="USER/NAME on the Hub; made if it is not there.")
    parser.add_argument("--dry_run", action="store_true", help="Check and list what would be uploaded, and stop.")
    parser.add_argument("--private", action="store_true", help="Make a new repository for its owner only.")
    return parser


def _add_device(parser: ArgumentParser) -> None:
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:N or mps.")
    parser.add_argument("--precision", type=str, default="32-true", help="32-true, bf16-mixed or 16-mixed.")


def _recipe_as_config(words: list[str]) -> list[str]:
    """``train RECIPE`` is ``train --config PATH``; ``--resume RUN`` reads the run's own; ``digits`` is the default."""
    from epsanet.tasks.config import recipe_path

    place = words.index("train") + 1
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


def _train(values: dict[str, Any]) -> int:
    from epsanet._processes import rank
    from epsanet.tasks.config import TrainConfig
    from epsanet.tasks.train import TrainingInterrupted, train

    resume = values.pop("resume")
    values.pop("config")
    try:
        train(TrainConfig(**values), resume=resume)
    except TrainingInterrupted as stop:
        if rank() == 0:
            print(stop)
        return _EXIT_INTERRUPTED
    return 0


def _evaluate(values: dict[str, Any]) -> int:
    from rich.table import Table

    from epsanet._processes import rank
    from epsanet.network.model_folder import is_detector
    from epsanet.tasks.console import console
    from epsanet.tasks.evaluate import evaluate

    as_json = values.pop("json")
    if is_detector(values["model"]):
        return _evaluate_detector(values, as_json=as_json)
    if values.pop("output") is not None:
        raise ValueError(f"--output writes what a detector found, and {values['model']} is none; leave it out")
    result = evaluate(values.pop("model"), values.pop("data"), **values)
    if rank() > 0:
        return 0
    if as_json:
        print(json.dumps(result.as_dict(), indent=2, ensure_ascii=False))
        return 0
    table = Table("class", "images", "top-1 [%]", title=f"{result.images:,} images")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, (images, accuracy) in result.per_class.items():
        table.add_row(name, f"{images:,}", f"{accuracy:.2f}")
    console.print(table)
    console.print(f"{result}; top-5 {result.top5:.2f} %, loss {result.loss:.4f}")
    return 0


def _evaluate_detector(values: dict[str, Any], *, as_json: bool) -> int:
    from rich.table import Table

    from epsanet._processes import rank
    from epsanet.tasks.console import console
    from epsanet.tasks.detection.evaluate import evaluate_detector

    result = evaluate_detector(values.pop("model"), values.pop("data"), **values)
    if rank() > 0:
        return 0
    if as_json:
        print(json.dumps(result.as_dict(), indent=2, ensure_ascii=False))
        return 0
    kinds = [(kind, found) for kind, found in (("box", result.box), ("mask", result.mask)) if found is not None]
    table = Table("class", "objects", title=f"{result.images:,} images")
    for kind, _ in kinds:
        table.add_column(f"{kind} AP", justify="right")
        table.add_column("AP50", justify="right")
    table.columns[1].justify = "right"
    for name, (objects, *_) in result.box.per_class.items():
        numbers = [number for _, found in kinds for number in found.per_class[name][1:]]
        table.add_row(name, f"{objects:,}", *(f"{number:.3f}" for number in numbers))
    console.print(table)
    for kind, found in kinds:
        sizes = f"small {found.ap_small:.3f}, medium {found.ap_medium:.3f}, large {found.ap_large:.3f}"
        console.print(
            f"{kind}: AP {found.ap:.3f}, AP50 {found.ap50:.3f}, AP75 {found.ap75:.3f}; AP of {sizes}; "
            f"AR {found.ar100:.3f}"
        )
    console.print("-1 where there is no object to find" if result.objects else "there is no object to find")
    return 0


def _predict(values: dict[str, Any]) -> int:
    from epsanet.network.model_folder import is_detector

    pictures, score_thresh = values.pop("pictures"), values.pop("score_thresh")
    detector = is_detector(values["model"])
    if values["batch_size"] is None:
        values["batch_size"] = 4 if detector else 32
    if detector:
        return _detect(values, pictures, score_thresh)
    if pictures is not None:
        raise ValueError(f"--pictures draws what a detector found, and {values['model']} is none; leave it out")
    return _classify(values)


def _detect(values: dict[str, Any], pictures: str | None, score_thresh: float) -> int:
    from collections import Counter

    from rich.table import Table

    from epsanet.tasks.console import console, messages, track
    from epsanet.tasks.detection.predict import detect, draw_detections, write_detections
    from epsanet.tasks.predict import find_images

    output = values.pop("output")
    values.pop("topk")
    paths = find_images(values.pop("images"))
    rows = detect(values.pop("model"), paths, score_thresh=score_thresh, **values)
    if pictures is not None:
        rows = draw_detections(pictures, rows)
    if output is not None:
        rows = write_detections(output, rows)
    table = Table("image", "found")
    failed = 0
    for row in track(rows, len(paths), "detecting"):
        failed += bool(row.error)
        counts = Counter(row.classes)
        text = row.error or ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "nothing"
        table.add_row(row.image, text, style="red" if row.error else "")
    if output is None:
        console.print(table)
    for place in filter(None, (output, pictures)):
        messages.print(f"{len(paths):,} images in {place}")
    if failed:
        messages.print(f"{failed:,} of {len(paths):,} images could not be read")
    return _EXIT_USER if failed == len(paths) else 0


def _classify(values: dict[str, Any]) -> int:
    from epsanet.tasks.console import messages
    from epsanet.tasks.parquet import predict_to_parquet, process_of_many
    from epsanet.tasks.predict import find_images

    output, paths = values.pop("output"), find_images(values.pop("images"))
    if output is not None and output.endswith(".parquet"):
        result = predict_to_parquet(values.pop("model"), paths, output, **values)
        if result is None:
            return 0
        failed, resumed = result.errors, f", {result.resumed:,} of them from before" if result.resumed else ""
        messages.print(f"{result.rows:,} rows in {output}{resumed}")
    elif process_of_many()[1] > 1:
        raise ValueError("several processes write one Parquet file; add --output x.parquet, or start one process")
    else:
        failed = _predict_at_once(values.pop("model"), paths, output, values)
    if failed:
        messages.print(f"{failed:,} of {len(paths):,} images could not be read")
    return _EXIT_USER if failed == len(paths) else 0


def _predict_at_once(model: str, paths: list[str], output: str | None, values: dict[str, Any]) -> int:
    """Predict into a table on the screen, a CSV or a JSON file; the number of images that could not be read."""
    from rich.table import Table

    from epsanet.tasks.console import console, messages, track
    from epsanet.tasks.predict import predict, write_predictions

    topk = values["topk"]
    rows = predict(model, paths, **values)
    if output is not None:
        rows = write_predictions(output, rows, topk)
    table = Table("image", *(f"{place}." for place in range(1, topk + 1)))
    failed = 0
    for row in track(rows, len(paths), "predicting"):
        failed += bool(row.error)
        cells = [f"{name} {value:.1%}" for name, value in zip(row.classes, row.probabilities, strict=True)]
        if output is None:
            table.add_row(
                f"{row.image}\n  {row.error}" if row.error else row.image, *cells, style="red" if row.error else ""
            )
    if output is None:
        console.print(table)
    else:
        messages.print(f"{len(paths):,} rows in {output}")
    return failed


def _shard(values: dict[str, Any]) -> int:
    from epsanet.data.shard import write_shards
    from epsanet.tasks.console import console, counted, messages, track

    report = write_shards(**values, progress=lambda names, total: track(names, total, "packing"))
    for name, reason in report.bad.items():
        messages.print(f"skipped {name}: {reason}", style="yellow")
    for split, files in report.shards.items():
        console.print(f"{split}: {counted(sum(files.values()), 'image')} in {counted(len(files), 'shard')}")
    console.print(f"\ntrain  epsanet train folder --data {shlex.quote('wds/' + values['destination'])}")
    return 0


def _export(values: dict[str, Any]) -> int:
    from epsanet.deploy.config import ExportConfig
    from epsanet.deploy.export import export
    from epsanet.network.weights import load_model
    from epsanet.tasks.console import console, messages, track

    output, source = values.pop("output"), values.pop("model")
    config = ExportConfig(**values)
    loaded = load_model(source)
    if output is None:
        output = f"{loaded.architecture}-{config.format}{'-int8' if config.int8 else ''}"
    result = export(
        loaded,
        output,
        config,
        progress=track,
        note=messages.print,
    )
    for batch, (before, after) in result.milliseconds.items():
        console.print(f"batch {batch}: {before:.2f} ms an image as it is, {after:.2f} ms tuned")
    if config.tune:
        console.print(f"tuned: {len(result.forms)} PSA modules take another form")
    console.print(str(result.agreement))
    sizes = "any number and size of images" if result.dynamic_size else "any number of images, of one size"
    console.print(f"{result.folder}: {result.bytes / 1e6:.2f} MB, {sizes}")
    console.print(f"predict   epsanet predict {shlex.quote(str(output))} IMAGES")
    return 0


def _explain(values: dict[str, Any]) -> int:
    from epsanet.insight.explain import explain, explain_data, save_explanations
    from epsanet.network.weights import load_model
    from epsanet.tasks.console import messages, track
    from epsanet.tasks.predict import find_images

    data, folder = values["data"], values["output"]
    if not values["images"] and not data.source:
        raise ValueError("nothing to explain; name images, or a data set with --data")
    paths = find_images(values["images"])
    loaded = load_model(values["model"])
    failed = 0
    if paths:
        found = explain(loaded, paths, topk=values["topk"], layer=values["layer"])
        for explanation, place in track(save_explanations(folder, found), len(paths), "explaining"):
            failed += bool(explanation.error)
            if explanation.error:
                print(f"{explanation.image}: {explanation.error}")
            else:
                print(f"{place}  {explanation.classes[0]} {explanation.probabilities[0]:.1%}")
        if failed:
            messages.print(f"{failed:,} of {len(paths):,} images could not be read")
    if data.source:
        explain_data(loaded, data, folder, split=values["split"], progress=track)
        print(f"{folder}/scales.csv and scales.png: the scales that each block prefers, by class")
    return _EXIT_USER if paths and failed == len(paths) else 0


def _models(values: dict[str, Any]) -> int:
    if values["task"] == "detection":
        return _detectors(as_json=values["json"])
    from rich import box
    from rich.table import Table

    from epsanet.network.shipped import shipped_weights
    from epsanet.study.cost import cost_table
    from epsanet.tasks.console import console

    rows, shipped = cost_table(), shipped_weights()
    if values["json"]:
        weights = {row.name: [dataclasses.asdict(found) for found in shipped if found.of == row.name] for row in rows}
        print(json.dumps([{**dataclasses.asdict(row), "weights": weights[row.name]} for row in rows], indent=2))
        return 0
    table = Table(title="EPSANets in timm, and what the paper says of them", box=box.SIMPLE_HEAD)
    for title in ("network", "input", "parameters", "paper", "GMACs", "paper", "top-1", "top-5"):
        table.add_column(title, justify="left" if title == "network" else "right", no_wrap=True)
    for row in rows:
        paper = row.published
        table.add_row(
            row.name,
            f"{row.input_size}²",
            f"{row.parameters:,}",
            f"{paper.parameters:.2f} M" if paper else "",
            f"{row.macs / 1e9:.3f}",
            f"{paper.gmacs:.2f}" if paper else "",
            f"{paper.top1:.2f}" if paper else "",
            f"{paper.top5:.2f}" if paper else "",
        )
    console.print(table)
    console.print(
        "GMACs: convolutions and linear layers, one image; the paper's also count norms, activations and pools.\n"
        "Large: the paper's text has groups of 32 (…_large_g32), its cost is that of split branches (…_large);\n"
        "which of the two reached its accuracy is unknown.\n"
        "top-1 and top-5 are the paper's, on ImageNet; its weights were never published."
    )
    table = Table(title="Weights in this package", box=box.SIMPLE_HEAD)
    for title in ("name", "input", "classes", "KiB", "top-1", "measured on"):
        table.add_column(title, justify="left" if title in ("name", "measured on") else "right", no_wrap=True)
    for found in shipped:
        top1 = "" if found.top1 is None else f"{found.top1:.2f}"
        size, kibibytes = f"{found.input_size}²", f"{found.file_bytes / 1024:,.0f}"
        table.add_row(found.name, size, str(found.classes), kibibytes, top1, found.measured_on or "")
    console.print(table)
    console.print("epsanet predict NAME IMAGES, or timm.create_model(NAME, pretrained=True); no download.")
    return 0


def _detectors(*, as_json: bool) -> int:
    from rich import box
    from rich.table import Table

    from epsanet.study.cost import detector_table
    from epsanet.tasks.console import console

    rows = detector_table()
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return 0
    table = Table(title="The paper's detectors on COCO", box=box.SIMPLE_HEAD)
    for title in ("detector", "backbone", "trained parameters", "paper", "box AP", "AP50", "AP75", "mask AP"):
        table.add_column(title, justify="left" if title in ("detector", "backbone") else "right", no_wrap=True)
    for row in rows:
        paper = row.published
        table.add_row(
            row.architecture,
            row.backbone,
            f"{row.parameters:,}",
            f"{paper.parameters:.2f} M",
            *(f"{value:.1f}" for value in (paper.box_ap, paper.box_ap50, paper.box_ap75)),
            f"{paper.mask_ap:.1f}" if paper.mask_ap else "",
        )
    console.print(table)
    console.print(
        "Parameters: 80 classes, stem and first stage frozen, scale and shift of the other norms trained.\n"
        "AP is the paper's, on COCO val2017 after the 1x schedule; nobody has trained these with this package yet."
    )
    return 0


def _convert(values: dict[str, Any]) -> int:
    from epsanet.network.weights import convert

    loaded = convert(values["source"], values["destination"], data_parallel=values["data_parallel"])
    print(f"{loaded.model.pretrained_cfg['architecture']}, {len(loaded.class_names)} classes → {values['destination']}")
    return 0


def _publish(values: dict[str, Any]) -> int:
    from rich.table import Table

    from epsanet.tasks.console import console
    from epsanet.tasks.publish import publish

    result = publish(values.pop("model"), values.pop("repo"), **values)
    table = Table("file", "bytes", title=f"{result.folder} → {result.repo}")
    table.columns[1].justify = "right"
    for name, size in result.files.items():
        table.add_row(name, f"{size:,}")
    console.print(table)
    names = result.config.get("label_names", [])
    shown = {key: value for key, value in result.config.items() if key != "label_names"}
    console.print(f"config.json: {json.dumps(shown)}")
    console.print(f"{len(names)} classes: {', '.join(names[:20])}{', …' if len(names) > 20 else ''}")
    console.print("read back by timm: the same logits")
    for note in result.notes:
        console.print(f"note: {note}")
    console.print(result.url or "nothing was uploaded: --dry-run")
    return 0


_PARSERS: dict[str, Callable[[], ArgumentParser]] = {
    "train": _train_parser,
    "evaluate": _evaluate_parser,
    "predict": _predict_parser,
    "shard": _shard_parser,
    "export": _export_parser,
    "explain": _explain_parser,
    "models": _models_parser,
    "convert": _convert_parser,
    "publish": _publish_parser,
}
_COMMANDS: dict[str, Callable[[dict[str, Any]], int]] = {
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "shard": _shard,
    "export": _export,
    "explain": _explain,
    "models": _models,
    "convert": _convert,
    "publish": _publish,
}

if __name__ == "__main__":
    sys.exit(main())
