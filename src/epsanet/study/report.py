"""What came out of a study: means with intervals, paired tests with Holm's correction, and plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from epsanet._files import atomic_file
from epsanet.study.rows import ABLATION_REFERENCE
from epsanet.study.running import read_results, read_study
from epsanet.study.statistics import Difference, Mean, holm, mean, paired_difference
from epsanet.study.tables import Table, printed
from epsanet.tasks.console import counted, duration
from epsanet.tasks.figures import save_figure

__all__ = ["Report", "write_report"]

_SCALES = ("top1_at_0.5", "top1_at_1", "top1_at_1.5")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is in the folder."""

    folder: Path
    """``report/`` of the study."""
    tables: tuple[Table, ...]
    """Accuracy, comparisons, object scales, and attention where there is any."""
    notes: tuple[str, ...]
    """What was run, and what is lacking."""


@dataclass(frozen=True, kw_only=True)
class _Network:
    """The runs of one row by seed."""

    name: str
    title: str
    runs: dict[int, dict[str, Any]]

    def of(self, column: str) -> Mean:
        return mean([run[column] for _, run in sorted(self.runs.items())])

    def has(self, column: str) -> bool:
        return all(isinstance(run.get(column), int | float) for run in self.runs.values())


def write_report(folder: str | Path, reference: str | None = None) -> Report:
    """Tables (text on return; CSV and Markdown on disk) and plots of a study, into its ``report/``.

    Args:
        folder: of the study; it may still be running.
        reference: the row that others are tested against; the study's own when left out.

    Raises:
        ValueError: when there is no result, or no row of that name.
    """
    folder = Path(folder)
    networks = _networks(read_results(folder))
    study = read_study(folder)
    reference = reference or str(study.get("reference") or ABLATION_REFERENCE)
    if reference not in networks:
        raise ValueError(
            f"{folder} has no finished run of {reference!r}, only of {', '.join(networks)}; use --reference"
        )
    rows = sorted(networks.values(), key=lambda network: -network.of("score").value)
    tables = {"accuracy": _accuracy(rows), "comparisons": _comparisons(rows, networks, reference)}
    if all(network.has(scale) for network in rows for scale in _SCALES):
        tables["scales"] = _scales(rows)
    listening = [network for network in rows if network.has("attention_spread")]
    if listening:
        tables["attention"] = _attention(listening)
    report = Report(
        folder=folder / "report", tables=tuple(tables.values()), notes=_notes(rows, networks[reference], study)
    )
    _write(report, list(tables), rows)
    return report


def _networks(results: list[dict[str, Any]]) -> dict[str, _Network]:
    networks: dict[str, _Network] = {}
    for run in results:
        network = networks.setdefault(run["network"], _Network(name=run["network"], title=run["title"], runs={}))
        network.runs[run["seed"]] = run
    return networks


def _notes(rows: Sequence[_Network], reference: _Network, study: dict[str, Any]) -> tuple[str, ...]:
    runs = [run for network in rows for run in network.runs.values()]
    most = max(len(network.runs) for network in rows)
    lacking = [f"{network.name} ({len(network.runs)})" for network in rows if len(network.runs) < most]
    hardware = sorted({f"{run['processor']}, {counted(run['threads'], 'thread')} a run" for run in runs})
    first, last = (pick(run["finished"] for run in runs)[:10] for pick in (min, max))
    notes = [
        f"{counted(len(runs), 'run')} of {counted(len(rows), 'network')}, {study['schedule']['epochs']} epochs each, "
        f"on {study['data']['source']}; matched by: {study.get('match')}",
        f"measured on {'; '.join(hardware)}, {first if first == last else f'{first} to {last}'}",
    ]
    if all("train_seconds" in run for run in runs):
        notes.append(f"training took {duration(sum(run['train_seconds'] for run in runs))}, all runs added up")
    if lacking:
        notes.append(f"fewer than {counted(most, 'run')}: {', '.join(lacking)}")
    alone = [network.name for network in rows if not network.runs.keys() & reference.runs.keys()]
    if alone:
        notes.append(f"not tested against {reference.name}, with which they share no seed: {', '.join(alone)}")
    return tuple(notes)


def _interval(found: Mean, sign: str = "") -> str:
    return "" if math.isinf(found.low) else f"{found.low:{sign}.2f} to {found.high:{sign}.2f}"


def _accuracy(rows: Sequence[_Network]) -> Table:
    cells = []
    for network in rows:
        score, first = network.of("score"), next(iter(network.runs.values()))
        cells.append(
            (
                network.name,
                network.title,
                str(score.runs),
                f"{score.value:.2f}",
                _interval(score),
                "" if math.isnan(score.deviation) else f"{score.deviation:.2f}",
                f"{first['parameters']:,}",
                f"{first['gmacs']:.4f}" if "gmacs" in first else "",
                f"{network.of('milliseconds').value:.3f}" if network.has("milliseconds") else "",
                f"{network.of('train_seconds').value / 60:.1f}" if network.has("train_seconds") else "",
            )
        )
    return Table(
        title="Score of the last epoch [%], mean over seeds",
        columns=(
            *("row", "network", "runs", "mean", "95 % interval", "deviation", "parameters", "GMACs", "ms an image"),
            "training [min]",
        ),
        rows=cells,
    )


def _pairs(networks: dict[str, _Network], reference: str) -> list[tuple[str, str]]:
    """Each row with the reference; a row of two settings also with either of them, where that is not the same pair."""
    pairs = [(name, reference) for name in networks if name != reference]
    parts = [(name, part) for name in networks if "+" in name for part in name.split("+") if part in networks]
    return pairs + [pair for pair in parts if reference not in pair]


def _comparisons(rows: Sequence[_Network], networks: dict[str, _Network], reference: str) -> Table:
    order = {network.name: place for place, network in enumerate(rows)}
    pairs = sorted(_pairs(networks, reference), key=lambda pair: (pair[1] != reference, order[pair[0]]))
    found: list[tuple[str, str, Difference]] = []
    for one, other in pairs:
        seeds = sorted(networks[one].runs.keys() & networks[other].runs.keys())
        if seeds:
            scores = [[networks[name].runs[seed]["score"] for seed in seeds] for name in (one, other)]
            found.append((one, other, paired_difference(*scores)))
    adjusted = holm([difference.p for _, _, difference in found])
    tests = sum(not math.isnan(p) for p in adjusted)
    cells = [
        (
            one,
            other,
            str(difference.mean.runs),
            f"{difference.mean.value:+.2f}",
            _interval(difference.mean, "+"),
            "" if math.isnan(difference.p) else f"{difference.p:.4f}",
            "" if math.isnan(p) else f"{p:.4f}",
            "" if math.isnan(p) else ("yes" if p < 0.05 else "no"),
        )
        for (one, other, difference), p in zip(found, adjusted, strict=True)
    ]
    return Table(
        title="Differences, paired by seed [points]",
        columns=("row", "less", "pairs", "mean", "95 % interval", "p", "p, Holm", "significant"),
        rows=cells,
        notes=(
            f"Paired t-tests, two-sided; {counted(tests, 'test')} corrected together by Holm; significant: below 0.05. "
            "Intervals are of one comparison each.",
        ),
    )


def _scales(rows: Sequence[_Network]) -> Table:
    cells = []
    for network in rows:
        found = [network.of(scale) for scale in _SCALES]
        lost = [found[1].value - value.value for value in (found[0], found[2])]
        cells.append((network.name, *(f"{value.value:.2f}" for value in found), *(f"{value:.2f}" for value in lost)))
    return Table(
        title="Top-1 at other sizes of the objects [%], mean over seeds",
        columns=("row", "0.5×", "1×", "1.5×", "lost at 0.5×", "lost at 1.5×"),
        rows=cells,
        notes=("0.5×: the image made smaller on its mean colour; 1.5×: its middle enlarged. Trained at 1× only.",),
    )


def _attention(rows: Sequence[_Network]) -> Table:
    cells = [
        (network.name, f"{network.of('attention_spread').value:.3f}", f"{network.of('contribution_spread').value:.3f}")
        for network in rows
    ]
    return Table(
        title="How far the share of a scale varies from image to image [points]",
        columns=("row", "of attention", "of output energy"),
        rows=cells,
        notes=(
            "Standard deviation over images, mean over scales, modules and seeds. A softmax within channels gives each "
            "scale the mean attention 1/D for every image, so that its share cannot vary; its output's energy can.",
        ),
    )


def _write(report: Report, names: Sequence[str], rows: Sequence[_Network]) -> None:
    for name, table in zip(names, report.tables, strict=True):
        with atomic_file(report.folder / f"{name}.csv") as temporary:
            temporary.write_text(printed(table, "csv"), encoding="utf-8")
    with atomic_file(report.folder / "report.md") as temporary:
        text = "".join(printed(table, "markdown") for table in report.tables)
        temporary.write_text(text + "\n\n".join(report.notes) + "\n", encoding="utf-8")
    _plot_cost(report.folder / "accuracy.png", rows)
    if all(network.has(scale) for network in rows for scale in _SCALES):
        _plot_scales(report.folder / "scales.png", rows)


_MARKERS = "osDdv^<>PX*hp8H"


def _plot_cost(path: Path, rows: Sequence[_Network]) -> None:
    """Accuracy against what it costs; a legend, because labels would lie on one another at equal cost."""
    columns = [
        (column, title, factor)
        for column, title, factor in (
            ("parameters", "parameters [10⁶]", 1e-6),
            ("gmacs", "multiply-accumulates [10⁶]", 1e3),
            ("milliseconds", "time of an image [ms]", 1.0),
        )
        if all(network.has(column) for network in rows)
    ]
    figure = Figure(figsize=(4.2 * len(columns) + 2.6, 5), layout="constrained")
    axes = figure.subplots(1, len(columns), squeeze=False, sharey=True)[0]
    for axis, (column, title, factor) in zip(axes, columns, strict=True):
        for place, network in enumerate(rows):
            score, cost = network.of("score"), factor * network.of(column).value
            half = 0.0 if math.isinf(score.high) else score.high - score.value
            axis.errorbar(
                cost,
                score.value,
                yerr=half,
                fmt=_MARKERS[place % len(_MARKERS)],
                color=f"C{place % 10}",
                capsize=3,
                label=network.name,
            )
        axis.set(xlabel=title)
        axis.margins(x=0.12)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("score [%], 95 % interval")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    save_figure(figure, path)


def _plot_scales(path: Path, rows: Sequence[_Network]) -> None:
    """A panel for each size of the objects, a line for each network."""
    figure = Figure(figsize=(12, 1.2 + 0.32 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(_SCALES), sharey=True)
    places = range(len(rows))
    for axis, scale in zip(panels, _SCALES, strict=True):
        found = [network.of(scale) for network in rows]
        half = [0.0 if math.isinf(value.high) else value.high - value.value for value in found]
        axis.errorbar([value.value for value in found], places, xerr=half, fmt="o", capsize=3)
        axis.set(title=f"objects at {scale.rpartition('_')[2]}×", xlabel="top-1 [%], 95 % interval")
        axis.grid(alpha=0.3)
    panels[0].set_yticks(places, [network.name for network in rows])
    panels[0].invert_yaxis()
    save_figure(figure, path)
