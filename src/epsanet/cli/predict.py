"""Classes of images, or what is where in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from epsanet.cli.flags import EXIT_USER, MODEL_HELP

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["parser", "run"]


def parser() -> ArgumentParser:
    """The flags of the command."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("model", type=str, help=f"{MODEL_HELP[:-1]}, or an exported bundle.")
    parser.add_argument("images", type=str, nargs="+", help="Files, folders or glob patterns.")
    parser.add_argument("--output", type=str | None, default=None, help="Write x.csv, x.json or x.parquet instead.")
    parser.add_argument("--topk", type=int | None, default=None, help="Classifiers: classes an image; 5.")
    parser.add_argument("--score_thresh", type=float | None, default=None, help="Detectors: the least score; 0.5.")
    parser.add_argument("--pictures", type=str | None, default=None, help="Detectors: draw the images into a folder.")
    parser.add_argument("--batch_size", type=int | None, default=None, help="Images at a time; 32, detectors 4.")
    parser.add_argument("--workers", type=int, default=0, help="Processes that read images.")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:N or mps.")
    return parser


def run(values: dict[str, Any]) -> int:
    """Do it with the flags\' values; the exit code."""
    from epsanet.network.model_folder import is_detector
    from epsanet.tasks.devices import keep_freed_memory
    from epsanet.tasks.tables import check_output

    keep_freed_memory()
    if values["output"] is not None:
        check_output(values["output"])
    detector = is_detector(values["model"])
    _refuse_other_task(values, detector=detector)
    if values["batch_size"] is None:
        values["batch_size"] = 4 if detector else 32
    pictures, score_thresh, topk = values.pop("pictures"), values.pop("score_thresh"), values.pop("topk")
    if detector:
        return _detect(values, pictures, 0.5 if score_thresh is None else score_thresh)
    return _classify({**values, "topk": 5 if topk is None else topk})


def _refuse_other_task(values: dict[str, Any], *, detector: bool) -> None:
    if detector and values["topk"] is not None:
        raise ValueError(f"--topk is for classifiers, and {values['model']} holds a detector; leave it out")
    for flag in ("score_thresh", "pictures"):
        if not detector and values[flag] is not None:
            raise ValueError(f"--{flag} is for detectors, and {values['model']} holds none; leave it out")


def _detect(values: dict[str, Any], pictures: str | None, score_thresh: float) -> int:
    from collections import Counter

    from rich.table import Column, Table

    from epsanet.tasks.console import console, messages, track
    from epsanet.tasks.detection.predict import detect, draw_detections, write_detections
    from epsanet.tasks.parquet import process_of_many
    from epsanet.tasks.predict import find_images

    if process_of_many()[1] > 1:
        raise ValueError("a detector predicts in one process; give each its own images and --output")
    output = values.pop("output")
    paths = find_images(values.pop("images"))
    rows = detect(values.pop("model"), paths, score_thresh=score_thresh, **values)
    if pictures is not None:
        rows = draw_detections(pictures, rows)
    if output is not None:
        rows = write_detections(output, rows)
    table = Table(Column("image", overflow="fold"), "found")
    failed = 0
    for row in track(rows, len(paths), "detecting"):
        failed += bool(row.error)
        if output is None:
            counts = Counter(row.classes)
            text = row.error or ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "nothing"
            table.add_row(row.image, text, style="red" if row.error else "")
    if output is None:
        console.print(table)
    for place in filter(None, (output, pictures)):
        messages.print(f"{len(paths):,} images in {place}")
    if failed:
        messages.print(f"{failed:,} of {len(paths):,} images could not be read")
    return EXIT_USER if failed == len(paths) else 0


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
    return EXIT_USER if failed == len(paths) else 0


def _predict_at_once(model: str, paths: list[str], output: str | None, values: dict[str, Any]) -> int:
    """Predict into a table on the screen, a CSV or a JSON file; the number of images that could not be read."""
    from rich.table import Column, Table

    from epsanet.tasks.console import console, messages, track
    from epsanet.tasks.predict import predict, write_predictions

    topk = values["topk"]
    rows = predict(model, paths, **values)
    if output is not None:
        rows = write_predictions(output, rows, topk)
    table = Table(Column("image", overflow="fold"), *(f"{place}." for place in range(1, topk + 1)))
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
