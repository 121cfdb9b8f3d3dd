"""The networks behind the page: what they are spared, and what cannot be shown of them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image

from epsanet.network.weights import save_model
from epsanet.tasks.detection.predict import detect, draw
from epsanet.web import models
from epsanet.web.models import ServedClassifier, ServedDetector


def test_objects_of_a_large_picture_are_those_of_the_reduced_one(
    detector_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(models, "_LONGER_SIDE", 100)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 10, 3)).astype(np.uint8))
    noise.resize((400, 241)).save(tmp_path / "large.png")
    noise.resize((100, 60)).save(tmp_path / "small.png")
    with Image.open(tmp_path / "large.png") as picture:
        picture.thumbnail((100, 100))
        picture.save(tmp_path / "reduced.png")
    served = ServedDetector("finder", str(detector_folder))
    for given, seen in (("large.png", "reduced.png"), ("small.png", "small.png")):
        found = served.detect(tmp_path / given, 0.3)
        (wanted,) = detect(detector_folder, [tmp_path / seen], score_thresh=0.3, note=lambda _: None)
        assert (found.width, found.height) == (100, 60)
        assert found.masks
        assert {tuple(mask["size"]) for mask in found.masks} == {(60, 100)}
        np.testing.assert_allclose(found.boxes, wanted.boxes, atol=1e-3)
        assert np.array_equal(np.asarray(served.draw(found)), np.asarray(draw(wanted)))
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_network_whose_maps_have_channels_last_shows_its_classes_only(tmp_path: Path) -> None:
    sizes = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
    network = timm.create_model("swin_tiny_patch4_window7_224", num_classes=2, **sizes)
    save_model(tmp_path / "swin", network, ["ant", "bee"], {"input_size": (3, 32, 32)})
    Image.new("RGB", (40, 30), "teal").save(tmp_path / "a.png")
    served = ServedClassifier("swin", str(tmp_path / "swin"))
    assert served.explain(tmp_path / "a.png") is None
    assert not served.explains
    assert {name for name, _ in served.classify(tmp_path / "a.png")} == {"ant", "bee"}
