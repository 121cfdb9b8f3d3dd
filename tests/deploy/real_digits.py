"""The digits of scikit-learn as a network takes them."""

from __future__ import annotations

from epsanet.data.config import DataConfig
from epsanet.data.samples import Samples
from epsanet.data.sources import open_split
from epsanet.deploy.images import RealImages
from epsanet.network.weights import LoadedModel


def digits(split: str, loaded: LoadedModel, most: int) -> RealImages:
    samples, _, _ = open_split(DataConfig(source="digits"), split, loaded.class_names)
    assert isinstance(samples, Samples)
    return RealImages(samples, loaded.data_config, most)
