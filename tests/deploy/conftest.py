"""A small network that really knows the digits, made in seconds, and its bundles."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from real_digits import digits
from torch import nn

from epsanet.deploy.config import ExportConfig
from epsanet.deploy.export import Exported, export
from epsanet.network.weights import LoadedModel, load_model, save_model


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random features, norms with the statistics of the digits, and a classifier fitted to them."""
    from sklearn.linear_model import LogisticRegression

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("digits") / "model"
    overlay = {"input_size": (3, 16, 16), "crop_pct": 1.0}
    model = timm.create_model("epsanet14_tiny", pretrained_cfg_overlay=overlay)
    save_model(folder, model, [f"digit {number}" for number in range(10)], {"input_size": (3, 16, 16)})
    loaded = load_model(folder)
    names = [str(number) for number in range(10)]
    train = digits("train", LoadedModel(model=model, class_names=names, data_config=loaded.data_config), 700)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(train.images)
        features = model.eval().forward_head(model.forward_features(train.images), pre_logits=True)
        fitted = LogisticRegression(C=1.0, max_iter=300).fit(features.numpy(), train.labels.numpy())
        model.fc.weight.copy_(torch.from_numpy(fitted.coef_.astype(np.float32)))
        model.fc.bias.copy_(torch.from_numpy(fitted.intercept_.astype(np.float32)))
    save_model(folder, model, names, {"input_size": (3, 16, 16), "crop_pct": 1.0})
    return folder


@pytest.fixture(scope="session")
def bundles(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """The network in each format, by the name of the format."""
    folder = tmp_path_factory.mktemp("bundles")
    said: list[str] = []
    with contextlib.chdir(folder):
        return {
            kind: export(digits_folder, folder / kind, ExportConfig(format=kind), note=said.append)
            for kind in ("onnx", "openvino", "pt2")
        }
