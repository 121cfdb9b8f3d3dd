"""The cost table has the figures of the paper, typed in here from its tables."""

from __future__ import annotations

import csv
import io

import pytest
import timm
import torch
from torch import nn

from epsanet import cli
from epsanet.network.rivals import RIVALS
from epsanet.study.cost import Cost, cost, detector_table

# parameters, 10⁹ multiply-accumulates at 224×224; published: millions, 10⁹, top-1, top-5
FIGURES = {
    "epsanet50_small": (22_561_715, 3.598, 22.56, 3.62, 77.49, 93.54),
    "epsanet101_small": (38_900_279, 6.788, 38.90, 6.82, 78.43, 94.11),
    "epsanet50_large_g32": (30_100_094, 5.053, 27.90, 4.72, 78.64, 94.18),
    "epsanet50_large": (27_899_518, 4.693, 27.90, 4.72, 78.64, 94.18),
    "epsanet101_large_g32": (53_742_470, 9.666, 49.59, 8.97, 79.38, 94.58),
    "epsanet101_large": (49_592_198, 8.924, 49.59, 8.97, 79.38, 94.58),
}


def test_the_table_has_the_papers_figures_beside_ours(costs: list[Cost]) -> None:
    rows = {row.name: row for row in costs}
    assert set(rows) == set(timm.list_models("epsanet*"))
    for name, (parameters, gmacs, *published) in FIGURES.items():
        row = rows[name]
        assert row.parameters == parameters
        assert row.macs / 1e9 == pytest.approx(gmacs, abs=0.0005)
        assert row.input_size == 224
        assert row.published is not None
        paper = row.published
        assert [paper.parameters, paper.gmacs, paper.top1, paper.top5] == published
    assert {name for name, row in rows.items() if row.published} == set(FIGURES)
    assert list(rows)[: len(FIGURES)] == sorted(FIGURES, key=lambda name: FIGURES[name][0]), "the paper's come first"


def test_multiply_accumulates_are_counted_layer_by_layer() -> None:
    """Longhand: each output value of a convolution costs its kernel's taps."""
    model = timm.create_model("epsanet14_tiny", num_classes=10).eval()
    counted = 0

    def count(layer: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal counted
        counted += output.numel() * layer.weight[0].numel()  # one image; the shared squeeze sees its 4 scales as 4

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert counted > 1e6
    found = cost("epsanet14_tiny")
    assert found.macs == counted
    assert found.published is None


def test_the_command_tells_the_cost_of_the_networks_for_small_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["study", "cost", "--task", "small-images", "--format", "csv"]) == 0
    rows = {row["title"]: row for row in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    assert rows.keys() == {rival.title for rival in RIVALS.values()}
    for rival in RIVALS.values():
        name, row = rival.models["tiny"], rows[rival.title]
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=10, **rival.model_args)
        assert row["network"] == name
        assert int(row["parameters"].replace(",", "")) == sum(p.numel() for p in model.parameters())
    name = RIVALS["epsanet"].models["tiny"]
    assert float(rows[RIVALS["epsanet"].title]["MACs"]) == pytest.approx(cost(name).macs / 1e6, abs=0.05)


def test_a_network_that_is_unknown_is_named() -> None:
    with pytest.raises(ValueError, match="no network 'epsanet51_small'; near it: epsanet50_small"):
        cost("epsanet51_small")


def test_the_detectors_stand_beside_the_papers() -> None:
    rows = {(row.architecture, row.backbone): row for row in detector_table()}
    assert len(rows) == 6
    row = rows["mask_rcnn", "epsanet50_large"]
    assert row.parameters == 46_499_685
    paper = row.published
    assert (paper.parameters, paper.box_ap, paper.box_ap50, paper.box_ap75, paper.mask_ap) == (
        46.50,
        41.4,
        62.3,
        45.3,
        37.1,
    )
    assert rows["retinanet", "epsanet50_small"].published.mask_ap is None
