"""Networks whose norms do something, as after training."""

from __future__ import annotations

import timm
from torch import nn

import epsanet.network.epsanet  # noqa: F401 - registers the variants


def trained_looking(name: str, **kwargs: object) -> nn.Module:
    """A model whose norms do something, so that folding them wrongly shows."""
    model = timm.create_model(name, num_classes=17, **kwargs).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model
