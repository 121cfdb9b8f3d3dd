"""timm's Muon on a CPU, against its formula in float64."""

from __future__ import annotations

import torch
from timm.optim import muon
from torch import Tensor, nn

from epsanet.tasks.classification import Classifier
from epsanet.tasks.config import load_recipe

# Of five Newton-Schulz steps (leloykun.github.io/ponder/muon-opt-coeffs).
COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def orthogonalised(gradient: Tensor) -> Tensor:
    update = gradient.double() / gradient.double().norm()
    for a, b, c in COEFFICIENTS:
        gram = update @ update.T
        update = a * update + (b * gram + c * gram @ gram) @ update
    return update


def test_on_a_cpu_muon_orthogonalises_in_float32() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(4, 16, 3)
    flags = ["--optimizer.opt", "muon", "--optimizer.lr", "0.01", "--optimizer.weight_decay", "0"]
    module = Classifier(model, ["a", "b"], load_recipe("digits", flags))
    optimizer = module.configure_optimizers()["optimizer"]
    gradient, before = torch.randn(16, 36), model.weight.detach().clone()

    def closure() -> Tensor:
        model.weight.grad = gradient.view_as(model.weight)
        return torch.zeros(())

    rate = optimizer.param_groups[0]["lr"]
    module.optimizer_step(0, 0, optimizer, closure)
    step = (before - model.weight.detach()).flatten(1).double()
    expected = rate * 0.2 * 36**0.5 * orthogonalised(gradient)
    assert (step - expected).norm() / expected.norm() < 1e-4, "in bfloat16 it is a hundredth"
    assert muon.zeropower_via_newtonschulz.__module__ == "timm.optim.muon", "put back"
