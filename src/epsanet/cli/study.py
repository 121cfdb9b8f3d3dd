"""The paper's experiments: cost tables, comparison, ablation, and the report of both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from epsanet.cli.flags import EXIT_INTERRUPTED, describe_data, looked_up

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["add_parts", "arrange", "parser", "run"]

_HELP = {
    "cost": "the paper's tables of cost for ImageNet and COCO, counted, beside what was published",
    "compare": "train networks × seeds under one recipe: epsanet study compare [STUDY or YAML file] --output FOLDER",
    "ablation": "train the settings of PSA × seeds: epsanet study ablation [STUDY or YAML file] --output FOLDER",
    "report": "tables, tests and plots of a comparison or an ablation, finished or not",
}


def parser() -> ArgumentParser:
    """The flags of the command."""
    from jsonargparse import ArgumentParser

    return ArgumentParser(exit_on_error=False)


def add_parts(parser: ArgumentParser) -> dict[str, ArgumentParser]:
    """Add the commands of this command; the parser of each."""
    from jsonargparse import ArgumentParser

    from epsanet.study.config import CompareConfig, StudyConfig, study_parser, study_recipe_names

    parts = parser.add_subcommands(required=True, dest="part")
    cost = ArgumentParser(exit_on_error=False)
    cost.add_argument(
        "--task",
        type=Literal["classification", "detection", "small-images"],
        default="classification",
        help="small-images: the forms for images of about 32×32.",
    )
    cost.add_argument("--format", type=Literal["text", "csv", "markdown"], default="text", help="Of what is printed.")
    report = ArgumentParser(exit_on_error=False)
    report.add_argument("folder", type=str, help="Of a study; the report goes into its report/.")
    report.add_argument("--reference", type=str | None, default=None, help="Row to test against; the study's own.")
    report.add_argument("--format", type=Literal["text", "csv", "markdown"], default="text", help="Of what is printed.")
    made = {
        "cost": cost,
        "compare": describe_data(study_parser(CompareConfig)),
        "ablation": describe_data(study_parser(StudyConfig)),
        "report": report,
    }
    for name, text in _HELP.items():
        if name in ("compare", "ablation"):
            made[name].usage = (
                f"epsanet study {name} [STUDY] --output FOLDER [flags]\n\n"
                f"STUDY is {', '.join(n for n in study_recipe_names() if name in n)} or a YAML file. The same command "
                "goes on with a study that was stopped."
            )
        made[name].description = text
        parts.add_subcommand(name, made[name], help=text)
    return made


def arrange(words: list[str]) -> list[str]:
    """``study compare STUDY`` is ``study compare --config PATH``."""
    from epsanet.study.config import PARTS, refuse_unfit, study_recipe_path

    words, place = looked_up(words, study_recipe_path), words.index("study") + 2
    named = place < len(words) and not words[place].startswith("-")
    for part in PARTS:
        if named and words[place - 1] == part:
            path = study_recipe_path(words[place])
            refuse_unfit(part, path)
            return [*words[:place], f"--config={path}", *words[place + 1 :]]
    return words


def run(values: dict[str, Any]) -> int:
    """Do it with the flags\' values; the exit code."""
    part = values["part"]
    given = vars(values[part])
    if part == "cost":
        return _cost(**given)
    if part == "report":
        return _report(**given)
    return _train(part, given)


def _cost(task: str, format: Literal["text", "csv", "markdown"]) -> int:
    from epsanet.study.tables import detection_costs, imagenet_costs, printed, small_costs
    from epsanet.tasks.console import console

    tables = {"classification": imagenet_costs, "detection": detection_costs, "small-images": small_costs}
    console.print(printed(tables[task](), format), end="")
    return 0


def _train(part: str, given: dict[str, Any]) -> int:
    import shlex

    from epsanet.study.config import CompareConfig, StudyConfig, split_values
    from epsanet.study.plan import plan
    from epsanet.study.running import StudyInterrupted, run_study
    from epsanet.tasks.console import console
    from epsanet.tasks.report import shown

    study, train = split_values(given, CompareConfig if part == "compare" else StudyConfig)
    rows = plan(study, train)
    try:
        table = run_study(part, study, train, rows)
    except StudyInterrupted as stop:
        print(stop)
        return EXIT_INTERRUPTED
    console.print(f"\nreport  epsanet study report {shlex.quote(shown(table.parent))}")
    return 0


def _report(folder: str, reference: str | None, format: Literal["text", "csv", "markdown"]) -> int:
    from epsanet.study.report import write_report
    from epsanet.study.tables import printed
    from epsanet.tasks.console import console

    report = write_report(folder, reference)
    between = "\n" if format == "csv" else ""  # the other forms end with it
    console.print(between.join(printed(table, format) for table in report.tables), end="")
    if format == "text":
        console.print("\n".join((*report.notes, f"report: {report.folder}")))
    return 0
