"""Show what a network looks at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from epsanet.cli.flags import EXIT_USER, MODEL_HELP, describe_data, names_first

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["arrange", "parser", "run"]


def parser() -> ArgumentParser:
    """The flags of the command."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    from epsanet.data.config import DataConfig

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("model", type=str, help=MODEL_HELP)
    parser.add_argument("images", type=str, nargs="*", help="Files, folders or glob patterns: a picture of each.")
    parser.add_argument("-o", "--output", type=str, default="explained", help="Folder to write.")
    parser.add_argument("--topk", type=int, default=5, help="Classes to show.")
    parser.add_argument("--layer", type=str | None, default=None, help="For Grad-CAM; a fitting one if left out.")
    parser.add_argument("--split", type=str | None, default=None, help="Of --data; test or val if left out.")
    parser.add_class_arguments(DataConfig, "data")
    parser.set_defaults({"data.source": ""})
    return describe_data(parser)


arrange = names_first


def run(values: dict[str, Any]) -> int:
    """Do it with the flags\' values; the exit code."""
    from epsanet.insight.explain import explain, explain_data, save_explanations
    from epsanet.network.weights import load_model
    from epsanet.tasks.console import messages, track
    from epsanet.tasks.predict import find_images

    data, folder = values["data"], values["output"]
    if not values["images"] and not data.source:
        raise ValueError("nothing to explain; name images, or a data set with --data")
    paths = find_images(values["images"])
    loaded = load_model(values["model"])
    found = explain(loaded, paths, topk=values["topk"], layer=values["layer"]) if paths else iter(())
    if data.source:
        explain_data(loaded, data, folder, split=values["split"], progress=track)
        print(f"{folder}/scales.csv and scales.png: the scales that each block prefers, by class")
    failed = 0
    pictures = save_explanations(folder, found)
    for explanation, place in track(pictures, len(paths), "explaining") if paths else pictures:
        failed += bool(explanation.error)
        if explanation.error:
            print(f"{explanation.image}: {explanation.error}")
        else:
            print(f"{place}  {explanation.classes[0]} {explanation.probabilities[0]:.1%}")
    if failed:
        messages.print(f"{failed:,} of {len(paths):,} images could not be read")
    return EXIT_USER if paths and failed == len(paths) else 0
