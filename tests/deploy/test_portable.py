"""Networks in plain operators: every form of a branch computes the same."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from trained import trained_looking

from epsanet import PSA, kernels
from epsanet.deploy.portable import PortablePSA, branch_forms, branch_in_form, portable


@pytest.mark.parametrize(
    ("channels", "made", "kernel_size", "groups", "stride", "dilation"),
    [(64, 16, 9, 16, 1, 1), (32, 8, 5, 4, 2, 1), (24, 24, 7, 8, 1, 2), (16, 32, 3, 16, 1, 1)],
)
def test_every_form_of_a_branch_is_the_same_convolution(
    channels: int, made: int, kernel_size: int, groups: int, stride: int, dilation: int
) -> None:
    padding = dilation * (kernel_size - 1) // 2
    conv = nn.Conv2d(channels, made, kernel_size, stride, padding, dilation, groups, bias=False)
    x = torch.randn(2, channels, 13, 11)
    expected = F.conv2d(x.double(), conv.weight.double(), None, stride, padding, dilation, groups)
    forms = branch_forms(conv)
    assert forms[0] == groups
    assert len(forms) >= 3 - (channels == groups)
    for form in forms:
        assert (branch_in_form(conv, form)(x) - expected).abs().max() < 2e-6


def test_forms_do_not_multiply_much_more_often_than_the_branch() -> None:
    conv = nn.Conv2d(512, 128, 9, groups=16, bias=False)
    assert branch_forms(conv) == [16, 8, 4, 2]  # a group for each input channel would be 32 times the maps
    assert branch_forms(nn.Conv2d(64, 16, 9, groups=16, bias=False)) == [16, 8, 4, 2, 64]
    assert branch_forms(nn.Conv2d(64, 16, 3, bias=False)) == [1]


@pytest.mark.parametrize("name", ["epsanet14_tiny", "epsanet18", "epsanet50_large"])
def test_a_portable_network_has_no_norms_and_the_same_logits_in_every_form(name: str) -> None:
    model = trained_looking(name)
    x = torch.randn(2, 3, 40, 33)
    with torch.no_grad(), kernels.use("reference"):
        expected = model(x)
    modules = {key: module for key, module in model.named_modules() if isinstance(module, PSA)}
    for last in (False, True):
        forms = {
            key: [branch_forms(conv)[-1 if last else 0] for conv in module.spc.branches]  # type: ignore[arg-type]
            for key, module in modules.items()
        }
        network = portable(model, forms)
        assert not any(isinstance(module, (PSA, nn.BatchNorm2d)) for module in network.modules())
        assert sum(isinstance(module, PortablePSA) for module in network.modules()) == len(modules)
        assert (network(x) - expected).abs().max() <= 2e-5 * max(1.0, expected.abs().max().item())


class Twice(nn.Module):
    """One PSA module in two places, with a norm after each, as a network of shared weights has it."""

    def __init__(
        self, bias: bool = False, padding_mode: str = "zeros", wrapped: bool = False, watched: str = ""
    ) -> None:
        super().__init__()
        self.psa = PSA(32, groups=(1, 2, 4, 8))
        if watched:
            self.psa.get_submodule(watched).register_forward_hook(lambda _, __, y: y.square())
        for index, branch in enumerate(self.psa.spc.branches):
            branch.padding_mode = padding_mode  # type: ignore[assignment]
            if bias:
                branch.bias = nn.Parameter(torch.randn(8))  # type: ignore[assignment]
            if wrapped:
                self.psa.spc.branches[index] = nn.Sequential(branch, nn.Tanh())
        self.norm = nn.BatchNorm2d(32)
        nn.init.uniform_(self.norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.psa(self.norm(self.psa(x)))).mean((2, 3))


@pytest.mark.parametrize(
    "subject",
    [{}, {"bias": True}, {"padding_mode": "circular"}, {"wrapped": True}, {"watched": "spc"}, {"watched": "se"}],
    ids=str,
)
def test_modules_that_are_shared_or_changed_are_portable_too(subject: dict[str, bool]) -> None:
    torch.manual_seed(3)
    model, x = Twice(**subject).eval(), torch.randn(2, 32, 9, 9)  # type: ignore[arg-type]
    branches = [branch for branch in model.psa.spc.branches if isinstance(branch, nn.Conv2d)]
    forms = {"psa": [branch_forms(conv)[-1] for conv in branches]} if branches else None
    with kernels.use("reference"):
        expected = model(x)
        network = portable(model, forms)
        torch.testing.assert_close(network(x), expected, atol=1e-6, rtol=1e-5)
    assert isinstance(network.get_submodule("psa"), PSA if {"wrapped", "watched"} & subject.keys() else PortablePSA)


def test_other_softmax_and_a_network_that_cannot_be_traced_are_portable_too() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.psa = PSA(32, groups=(1, 2, 4, 8), softmax="channels")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.psa(x)
            return (y if y.sum() > 0 else -y).mean((2, 3))

    model, x = Branching().eval(), torch.randn(2, 32, 9, 9)
    network = portable(model)
    assert isinstance(network.get_submodule("psa"), PortablePSA)
    assert isinstance(model.psa, PSA)
    torch.testing.assert_close(network(x), model(x), atol=1e-6, rtol=0)


def test_the_network_itself_stays_as_it_is() -> None:
    model = timm.create_model("epsanet14_tiny").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    portable(model)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
