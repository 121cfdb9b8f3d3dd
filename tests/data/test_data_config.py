"""A data configuration that cannot work is refused with the field's name and what to write instead."""

from __future__ import annotations

from typing import Any

import pytest

from epsanet.data.config import DataConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 0}, r"data\.val_fraction=0 .* between 0 and 1"),
        ({"val_fraction": 1.0}, r"data\.val_fraction=1\.0 .* between 0 and 1"),
        ({"batch_size": 0}, r"data\.batch_size=0 .* 1 or more"),
        ({"workers": -1}, r"data\.workers=-1 .* 0 or more"),
        ({"input_size": 7}, r"data\.input_size=7 .* 8 or more"),
        ({"crop_pct": 0}, r"data\.crop_pct=0 .* for example 0\.875"),
        ({"crop_pct": 1.1}, r"data\.crop_pct=1\.1"),
        ({"hflip": 1.5}, r"data\.hflip=1\.5 is no probability"),
        ({"vflip": -0.1}, r"data\.vflip=-0\.1 is no probability"),
        ({"re_prob": 2}, r"data\.re_prob=2 is no probability"),
        ({"scale": (0.9, 0.5)}, r"data\.scale=\(0\.9, 0\.5\) .* rising shares"),
        ({"scale": (0, 1)}, r"data\.scale"),
        ({"scale": (0.5, 1.5)}, r"data\.scale"),
        ({"ratio": (2, 1)}, r"data\.ratio=\(2, 1\) .* rising ratios"),
    ],
)
def test_an_impossible_value_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


def test_the_edges_of_what_is_possible_are_accepted() -> None:
    edge = DataConfig(
        batch_size=1, workers=0, input_size=8, crop_pct=1.0, hflip=1, vflip=0, scale=(1, 1), ratio=(1, 1), re_prob=1
    )
    assert (edge.crop_pct, edge.scale, edge.hflip) == (1.0, (1, 1), 1)
