"""SEWeight, SPC and PSA against the paper written out with loops (``longhand.py``), in float64, with gradients."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import longhand
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from epsanet import kernels
from epsanet.network import psa as psa_module
from epsanet.network.psa import PSA, SPC, SEWeight, fit_groups, psa_like, scale_attention, squeeze_excite_weight

MODES = ("multiplex", "split")
SOFTMAXES = ("scales", "channels")


def leaves_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in module.state_dict().items()}


def randomised(module: nn.Module) -> nn.Module:
    """Weights of the size of one, so that attention differs clearly between scales and channels."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.7)
    return module.double()


def assert_same_output_and_gradients(module: PSA, x: Tensor, **options: Any) -> None:
    leaves, x_longhand = leaves_of(module), x.clone().requires_grad_()
    expected = longhand.psa_of(leaves, x_longhand, **options)
    x = x.clone().requires_grad_()
    output = module(x)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)

    weighting = torch.randn_like(expected)
    (expected * weighting).sum().backward()
    (output * weighting).sum().backward()
    torch.testing.assert_close(x.grad, x_longhand.grad, rtol=1e-9, atol=1e-11)
    parameters = dict(module.named_parameters())
    assert parameters.keys() == leaves.keys()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert leaf.grad.abs().sum() > 0, f"the longhand gradient of {name} is zero, so comparing it proves nothing"
        torch.testing.assert_close(parameters[name].grad, leaf.grad, rtol=1e-9, atol=1e-11, msg=name)


# --- against the longhand reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("softmax", SOFTMAXES)
@pytest.mark.parametrize("mode", MODES)
def test_psa_equals_the_longhand_module_forward_and_backward(
    mode: str, softmax: str, stride: int, dilation: int
) -> None:
    groups = [1, 2, 4, 1]
    module = randomised(
        PSA(16, 16, groups=groups, stride=stride, dilation=dilation, spc=mode, softmax=softmax, reduction=2)
    )
    x = torch.randn(2, 16, 5, 4, dtype=torch.float64)
    assert_same_output_and_gradients(
        module, x, groups=groups, stride=stride, dilation=dilation, mode=mode, softmax=softmax
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kernel_sizes", "groups", "in_channels", "out_channels"),
    [
        ((5, 1), (2, 3), 12, 12),
        ((3, 3, 7), (1, 2, 2), 12, 18),
        ((9, 3, 5, 1), (2, 1, 2, 2), 8, 16),
        ((1, 3, 5, 7, 9), (1, 2, 1, 2, 1), 20, 10),
    ],
    ids=["2 branches", "3 branches", "4 branches out of order", "5 branches"],
)
def test_any_number_of_branches_kernels_and_groups_equals_the_longhand_module(
    kernel_sizes: tuple[int, ...], groups: tuple[int, ...], in_channels: int, out_channels: int, mode: str
) -> None:
    module = randomised(PSA(in_channels, out_channels, kernel_sizes, groups, spc=mode, reduction=1))
    x = torch.randn(2, in_channels, 4, 3, dtype=torch.float64)
    assert_same_output_and_gradients(module, x, groups=list(groups), mode=mode)


def test_the_published_configuration_equals_the_longhand_module_stage_width_64() -> None:
    """Kernels 3-5-7-9, groups 1-4-8-16, reduction 16: the defaults, typed here from the paper."""
    module = randomised(PSA(64))
    assert [branch.kernel_size for branch in module.spc.branches] == [(3, 3), (5, 5), (7, 7), (9, 9)]
    assert module.se.fc1.weight.shape == (1, 16, 1, 1)
    x = torch.randn(1, 64, 2, 2, dtype=torch.float64)
    assert_same_output_and_gradients(module, x, groups=[1, 4, 8, 16])


def test_spc_returns_the_longhand_features_with_the_smallest_kernel_first() -> None:
    spc = randomised(SPC(8, 8, (1, 3, 5, 7), (1, 2, 2, 1)))
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    weights = [spc.state_dict()[f"branches.{i}.weight"] for i in range(4)]
    expected = torch.stack(longhand.spc(x, weights, [1, 2, 2, 1], 1, 1, "multiplex"), dim=1)
    torch.testing.assert_close(spc(x), expected, rtol=1e-10, atol=1e-12)


def test_a_branch_of_a_split_layer_sees_only_its_own_channels_and_of_a_multiplex_layer_all() -> None:
    for mode, sees_others in (("multiplex", True), ("split", False)):
        spc = randomised(SPC(8, 8, groups=(1, 1, 1, 1), spc=mode))
        x = torch.randn(1, 8, 3, 3, dtype=torch.float64)
        changed = x.clone()
        changed[:, 2:4] += 1  # the channels of branch 1
        moved = (spc(changed) - spc(x)).abs().amax(dim=(0, 2, 3, 4)) > 1e-9
        assert moved.tolist() == [sees_others, True, sees_others, sees_others]


def test_se_weight_equals_the_longhand_excitation() -> None:
    se = randomised(SEWeight(6, reduction=2))
    feats = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    w1, b1, w2, b2 = (se.state_dict()[name] for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"))
    expected = longhand.se_weight(feats, w1[:, :, 0, 0], b1, w2[:, :, 0, 0], b2)
    torch.testing.assert_close(se(feats)[:, :, 0, 0], expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        squeeze_excite_weight(feats.mean((2, 3)), w1[:, :, 0, 0], b1, w2[:, :, 0, 0], b2), expected
    )


def test_a_module_small_enough_for_pencil_and_paper_gives_what_the_equations_give() -> None:
    """One pixel, two branches of one channel: every number below comes from ``math``."""
    module = PSA(2, 2, (1, 3), (1, 1), reduction=16).double()
    with torch.no_grad():
        module.spc.branches[0].weight.copy_(torch.tensor([[[[2.0]], [[-1.0]]]]))
        module.spc.branches[1].weight.zero_()
        module.spc.branches[1].weight[0, 0, 1, 1] = 0.5
        module.spc.branches[1].weight[0, 1, 1, 1] = 3.0
        for parameter, value in zip(module.se.parameters(), (1.5, -0.25, 2.0, -1.0), strict=True):
            parameter.fill_(value)
    first, second = 2.0 * 3.0 - 1.0 * 1.0, 0.5 * 3.0 + 3.0 * 1.0
    z = [
        1 / (1 + math.exp(-(2.0 * max(0.0, 1.5 * feature - 0.25) - 1.0)))
        for feature in (first, second)
    ]  # fmt: skip
    total = sum(math.exp(value) for value in z)
    expected = [first * math.exp(z[0]) / total, second * math.exp(z[1]) / total]
    output = module(torch.tensor([3.0, 1.0], dtype=torch.float64).reshape(1, 2, 1, 1))
    assert output.flatten().tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("softmax", SOFTMAXES)
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_confirms_the_gradients_of_input_and_every_parameter(mode: str, softmax: str) -> None:
    module = randomised(PSA(4, 4, (1, 3), (1, 2), stride=2, spc=mode, softmax=softmax, reduction=1))
    names, values = zip(*leaves_of(module).items(), strict=True)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, *values))


# --- structure ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branches", [2, 3, 4, 5])
def test_one_se_weight_serves_all_branches_so_its_parameters_are_counted_once(branches: int) -> None:
    width, reduction = 32, 16
    module = PSA(width * branches, kernel_sizes=(3,) * branches, groups=(1,) * branches, reduction=reduction)
    hidden = width // reduction
    convolutions = branches * width * width * branches * 9
    assert sum(p.numel() for p in module.parameters()) == convolutions + 2 * width * hidden + hidden + width


@pytest.mark.parametrize(("channels", "reduction", "hidden"), [(128, 16, 8), (16, 16, 1), (8, 16, 1), (40, 16, 2)])
def test_the_hidden_width_of_the_se_weight_is_channels_over_reduction_and_at_least_one(
    channels: int, reduction: int, hidden: int
) -> None:
    parameters = sum(p.numel() for p in SEWeight(channels, reduction).parameters())
    assert parameters == 2 * channels * hidden + hidden + channels


def test_every_branch_is_registered_so_that_it_is_saved_moved_and_trained() -> None:
    module = PSA(64)
    assert set(module.state_dict()) == {
        *(f"spc.branches.{i}.weight" for i in range(4)),
        *(f"se.{fc}.{kind}" for fc in ("fc1", "fc2") for kind in ("weight", "bias")),
    }
    assert {p.dtype for p in module.to(torch.bfloat16).parameters()} == {torch.bfloat16}


# --- properties -----------------------------------------------------------------------------------------------------


@st.composite
def modules(draw: st.DrawFn, mode: str | None = None) -> tuple[PSA, Tensor, dict[str, Any]]:
    branches = draw(st.integers(2, 5))
    groups = [draw(st.sampled_from([1, 2, 4])) for _ in range(branches)]
    mode = mode or draw(st.sampled_from(MODES))
    share = 4 * draw(st.integers(1, 2))
    options: dict[str, Any] = {
        "kernel_sizes": [draw(st.sampled_from([1, 3, 5])) for _ in range(branches)],
        "groups": groups,
        "spc": mode,
        "softmax": draw(st.sampled_from(SOFTMAXES)),
        "stride": draw(st.integers(1, 2)),
        "reduction": draw(st.sampled_from([1, 2, 16])),
    }
    torch.manual_seed(draw(st.integers(0, 10**6)))
    module = randomised(PSA(share * branches, 4 * branches, **options))
    return module, torch.randn(2, share * branches, 4, 5, dtype=torch.float64), options


@given(modules())
def test_attention_is_positive_and_sums_to_one_over_scales_or_channels(drawn: tuple[PSA, Tensor, Any]) -> None:
    module, x, options = drawn
    branches = len(options["groups"])
    attention = module.attention(module.spc(x))
    assert attention.shape[:2] == (2, branches)
    assert (attention > 0).all()
    axis = 1 if options["softmax"] == "scales" else 2
    torch.testing.assert_close(attention.sum(axis), torch.ones_like(attention.sum(axis)), rtol=0, atol=1e-12)
    other = attention.sum(3 - axis)
    assert (other - 1).abs().max() > 1e-6, "sums to one over both axes, so the axis was not told apart"


@given(modules(), st.randoms(use_true_random=False))
def test_permuting_the_branches_permutes_the_output(drawn: tuple[PSA, Tensor, Any], random: Any) -> None:
    module, x, options = drawn
    branches = len(options["groups"])
    order = list(range(branches))
    random.shuffle(order)
    moved = {
        **options,
        "kernel_sizes": [options["kernel_sizes"][i] for i in order],
        "groups": [options["groups"][i] for i in order],
    }
    other = PSA(x.shape[1], 4 * branches, **moved).double()
    state = module.state_dict()
    other.load_state_dict(
        {
            name: state[f"spc.branches.{order[int(name.split('.')[2])]}.weight"] if "branches" in name else tensor
            for name, tensor in state.items()
        }
    )
    if options["spc"] == "split":
        parts = x.chunk(branches, 1)
        x_moved = torch.cat([parts[i] for i in order], 1)
    else:
        x_moved = x
    expected = torch.cat([module(x).chunk(branches, 1)[i] for i in order], 1)
    torch.testing.assert_close(other(x_moved), expected, rtol=1e-10, atol=1e-12)


@given(st.integers(1, 4), st.integers(2, 5), st.integers(1, 8))
def test_scale_attention_is_torchs_softmax_along_the_named_axis(batch: int, branches: int, channels: int) -> None:
    z = torch.randn(batch, branches, channels, dtype=torch.float64) * 3
    exponentials = z.exp()
    torch.testing.assert_close(scale_attention(z), exponentials / exponentials.sum(1, keepdim=True))
    torch.testing.assert_close(scale_attention(z, "channels"), exponentials / exponentials.sum(2, keepdim=True))


@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=5),
    st.integers(1, 24),
    st.integers(1, 24),
    st.sampled_from(MODES),
)
def test_fit_groups_takes_the_largest_count_that_divides_all_three_numbers(
    groups: list[int], seen: int, made: int, mode: str
) -> None:
    branches = len(groups)
    in_channels = seen if mode == "multiplex" else seen * branches
    fitted = fit_groups(groups, in_channels, made * branches, mode)
    for wanted, got in zip(groups, fitted, strict=True):
        assert got == max(d for d in range(1, wanted + 1) if wanted % d == seen % d == made % d == 0)
    PSA(in_channels, made * branches, (1,) * branches, fitted, spc=mode)  # and such a module exists


@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_fit_groups_leaves_the_published_groups_as_they_are_where_they_fit(width: int) -> None:
    assert fit_groups((1, 4, 8, 16), width, width) == (1, 4, 8, 16)
    assert fit_groups((32, 32, 32, 32), 2 * width, 2 * width) == (32, 32, 32, 32)
    assert fit_groups((4, 8, 16, 16), 2 * width, 2 * width, "split") == (4, 8, 16, 16)


@pytest.mark.parametrize("groups", [(), (1, 0, 1, 1), (1, -2, 1, 1)])
@pytest.mark.parametrize("mode", MODES)
def test_fit_groups_refuses_counts_that_mean_nothing(groups: tuple[int, ...], mode: str) -> None:
    with pytest.raises(ValueError, match="groups="):
        fit_groups(groups, 16, 16, mode)


# --- psa_like -------------------------------------------------------------------------------------------------------


def test_psa_like_takes_the_convolutions_channels_stride_dilation_type_and_group_count() -> None:
    conv = nn.Conv2d(32, 64, 3, stride=2, padding=2, dilation=2, groups=8, bias=False, dtype=torch.float64)
    module = psa_like(conv)
    assert [branch.groups for branch in module.spc.branches] == [8, 8, 8, 16]
    randomised(module)
    x = torch.randn(1, 32, 4, 4, dtype=torch.float64)
    expected = longhand.psa_of(leaves_of(module), x, groups=[8, 8, 8, 16], stride=2, dilation=2)
    torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-12)
    assert module(x).shape == conv(x).shape


def test_psa_like_reduces_groups_that_a_narrow_convolution_cannot_hold() -> None:
    assert [b.groups for b in psa_like(nn.Conv2d(16, 16, 3)).spc.branches] == [1, 4, 4, 4]
    assert [b.groups for b in psa_like(nn.Conv2d(24, 24, 3)).spc.branches] == [1, 2, 2, 2]


# --- branches that someone has changed ------------------------------------------------------------------------------

CHANGED: dict[str, tuple[nn.Module, str]] = {
    "a bias": (nn.Conv2d(64, 16, 5, padding=2, groups=4), "5×5 branch has a bias"),
    "circular padding": (
        nn.Conv2d(64, 16, 5, padding=2, groups=4, bias=False, padding_mode="circular"),
        "another padding",
    ),
    "a dilation of its own": (
        nn.Conv2d(64, 16, 5, padding=4, dilation=2, groups=4, bias=False),
        "another padding, stride or dilation",
    ),
    "a long kernel": (nn.Conv2d(64, 16, (5, 3), padding=(2, 1), groups=4, bias=False), "another padding"),
    "a wrapper": (nn.Sequential(nn.Conv2d(64, 16, 5, padding=2, groups=4)), "has been wrapped"),
}


@pytest.mark.parametrize(("branch", "reason"), CHANGED.values(), ids=CHANGED)
def test_a_changed_branch_is_computed_as_it_says_and_refused_by_the_kernels(branch: nn.Module, reason: str) -> None:
    spc, x = SPC(64, 64), torch.randn(2, 64, 7, 6)
    spc.branches[1] = branch
    expected = torch.stack([branch(x) for branch in spc.branches], dim=1)
    torch.testing.assert_close(spc(x), expected)
    torch.testing.assert_close(spc.forward_and_squeeze(x)[1], expected.mean((-2, -1)))
    if kernels.available():
        with kernels.use("native"), pytest.raises(ValueError, match=reason):
            spc(x)


@pytest.mark.skipif(not kernels.available(), reason="built without the native kernels")
@pytest.mark.parametrize(
    "watch",
    [
        nn.Module.register_forward_hook,
        nn.Module.register_forward_pre_hook,
        nn.Module.register_full_backward_hook,
        nn.Module.register_full_backward_pre_hook,
    ],
)
def test_a_watched_branch_is_called_and_refused_by_the_kernels(watch: Callable[..., Any]) -> None:
    spc, x, seen = SPC(64, 64), torch.randn(2, 64, 7, 6, requires_grad=True), []
    handle = watch(spc.branches[2], lambda *_: seen.append("called"))
    spc(x).sum().backward()
    assert seen == ["called"]
    with kernels.use("native"):
        with pytest.raises(ValueError, match="has a hook"):
            spc(x)
        handle.remove()
        spc(x)


class Doubled(nn.Conv2d):
    """A wrapper, as adapters and quantisation-aware training put them in."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def wrap(se: SEWeight) -> None:
    doubled = Doubled(se.fc2.in_channels, se.fc2.out_channels, 1)
    doubled.load_state_dict(se.fc2.state_dict())
    se.fc2 = doubled


CHANGED_MAPS: dict[str, Callable[[SEWeight], Any]] = {
    "pruned": lambda se: prune.random_unstructured(se.fc1, "weight", 0.5),
    "normalised": lambda se: parametrizations.weight_norm(se.fc1),
    "wrapped": wrap,
    "watched": lambda se: se.fc2.register_forward_hook(lambda _, __, y: y * 3),
}


@pytest.mark.parametrize("change", CHANGED_MAPS.values(), ids=CHANGED_MAPS)
@pytest.mark.parametrize("se", ["shared", "branches"])
def test_changed_maps_of_the_se_weight_are_called_and_train(change: Callable[[SEWeight], Any], se: Any) -> None:
    psa, x = randomised(PSA(64, reduction=2, se=se)), torch.randn(2, 64, 5, 5, dtype=torch.float64)
    weights = [psa.se] if se == "shared" else list(psa.se)
    for weight in weights:
        change(weight)
    psa.double()
    features = psa.spc(x)
    averages = features.mean((-2, -1))
    z = [
        torch.sigmoid(own.fc2(torch.relu(own.fc1(averages[:, place, :, None, None])))).flatten(1)
        for place, own in enumerate(weights * (4 // len(weights)))
    ]
    expected = (features * torch.stack(z, dim=1).softmax(1)[..., None, None]).flatten(1, 2)
    torch.testing.assert_close(psa(x), expected)
    optimizer = torch.optim.SGD(psa.parameters(), 0.1)
    for _ in range(2):  # a pruned weight is made anew for each step
        optimizer.zero_grad()
        psa(x).square().mean().backward()
        optimizer.step()


class Halved(nn.Module):
    """A wrapper around a whole part of the module."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inside(x)
        return y / 2


@pytest.mark.parametrize("how", ["watched", "wrapped"])
@pytest.mark.parametrize("se", ["shared", "branches"])
def test_spc_and_se_weights_that_are_watched_or_wrapped_are_called(se: Any, how: str) -> None:
    psa, x = PSA(64, reduction=2, se=se), torch.randn(2, 64, 5, 6)
    features = torch.stack([branch(x) for branch in psa.spc.branches], 1) / 2
    weights = [psa.se] * 4 if se == "shared" else list(psa.se)
    z = [weight(features[:, place]).flatten(1) / 2 for place, weight in enumerate(weights)]
    expected = (features * torch.stack(z, 1).softmax(1)[..., None, None]).flatten(1, 2)
    seen: list[Tensor] = []

    def halve(_: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        seen.extend(inputs)
        return y / 2

    if how == "watched":
        for part in (psa.spc, *dict.fromkeys(weights)):
            part.register_forward_hook(halve)
    else:
        psa.spc = Halved(psa.spc)
        psa.se = Halved(psa.se) if se == "shared" else nn.ModuleList(map(Halved, psa.se))
    torch.testing.assert_close(psa(x), expected)
    assert not psa.standard
    if how == "watched":
        assert seen[0] is x
        torch.testing.assert_close(torch.stack(seen[1:], 1), features)


@pytest.mark.parametrize("fusion", ["concat", "sum"])
def test_features_of_16_bits_stay_so_where_the_softmax_is_of_32(fusion: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As autocast has it on GPUs; else all that follows would be of 32 bits too."""
    softmax = psa_module.scale_attention
    monkeypatch.setattr(psa_module, "scale_attention", lambda z, mode: softmax(z.float(), mode))
    psa, x = PSA(64, fusion=fusion).bfloat16(), torch.randn(2, 64, 5, 5)
    found = psa(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), psa.float()(x), rtol=0.05, atol=0.05)


def test_a_pruned_se_weight_takes_loaded_weights() -> None:
    one, other = (PSA(64, reduction=2) for _ in range(2))
    for psa in (one, other):
        prune.l1_unstructured(psa.se.fc1, "weight", 0.5)
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 64, 5, 5)
    torch.testing.assert_close(other(x), one(x))


# --- what cannot be built -------------------------------------------------------------------------------------------

IMPOSSIBLE: dict[str, tuple[dict[str, Any], str, list[dict[str, Any]]]] = {
    "output channels": (
        {"out_channels": 18, "groups": (1, 1, 1, 1)},
        r"out_channels=18 is not divisible by 4 branches; use 16 or 20",
        [{"out_channels": 16}, {"out_channels": 20}],
    ),
    "fewer output channels than branches": (
        {"out_channels": 3, "groups": (1, 1, 1, 1)},
        r"out_channels=3 is not divisible by 4 branches; use 4$",
        [{"out_channels": 4}],
    ),
    "input channels of a split layer": (
        {"in_channels": 30, "out_channels": 32, "groups": (1, 1, 1, 1), "spc": "split"},
        r"in_channels=30 is not divisible by 4 branches; use 28 or 32",
        [{"in_channels": 28}, {"in_channels": 32}],
    ),
    "groups that do not divide": (
        {"groups": (1, 4, 8, 3)},
        r"groups=3 of the 9×9 branch does not divide both the 64 channels it sees and the 16 it makes; use 2 or 4",
        [{"groups": (1, 4, 8, 2)}, {"groups": (1, 4, 8, 4)}],
    ),
    "more groups than channels": (
        {"groups": (32, 4, 8, 16)},
        r"groups=32 of the 3×3 branch .* 64 channels .* 16 it makes; use 16, or",
        [{"groups": (16, 4, 8, 16)}],
    ),
    "groups that divide only the whole input of a split layer": (
        {"in_channels": 8, "out_channels": 64, "groups": (1, 1, 1, 8), "spc": "split"},
        r"groups=8 of the 9×9 branch .* 2 channels .* 16 it makes; use 2, or",
        [{"groups": (1, 1, 1, 2)}],
    ),
    "no groups": ({"groups": (0, 4, 8, 16)}, r"groups=0 of the 3×3 .* use 1, or", [{"groups": (1, 4, 8, 16)}]),
    "negative groups": ({"groups": (-4, 4, 8, 16)}, r"groups=-4 of the 3×3 .* use 1, or", [{"groups": (1, 4, 8, 16)}]),
    "even kernel": (
        {"kernel_sizes": (3, 5, 6, 9)},
        r"kernel size 6 in kernel_sizes=\(3, 5, 6, 9\) is not odd; use 5 or 7",
        [{"kernel_sizes": (3, 5, 5, 9)}, {"kernel_sizes": (3, 5, 7, 9)}],
    ),
    "no kernel": (
        {"kernel_sizes": (0, 5, 7, 9)},
        r"kernel size 0 in .* is not odd; use 1 or 3",
        [{"kernel_sizes": (1, 5, 7, 9)}, {"kernel_sizes": (3, 5, 7, 9)}],
    ),
    "fewer groups than kernels": (
        {"groups": (1, 4)},
        r"kernel_sizes=\(3, 5, 7, 9\) has 4 branches but groups=\(1, 4\) has 2; .* groups=\(1, 4, 1, 1\)",
        [{"groups": (1, 4, 1, 1)}],
    ),
    "more groups than kernels": (
        {"kernel_sizes": (3, 5)},
        r"kernel_sizes=\(3, 5\) has 2 branches but groups=\(1, 4, 8, 16\) has 4; .* groups=\(1, 4\)",
        [{"groups": (1, 4)}],
    ),
    "no branches": ({"kernel_sizes": (), "groups": ()}, r"kernel_sizes is empty; .*\(3, 5, 7, 9\)", []),
    "unknown spc": (
        {"spc": "divide"},
        r"spc='divide' is unknown; use 'multiplex' or 'split'",
        [{"spc": "multiplex"}, {"spc": "split"}],
    ),
    "unknown softmax": (
        {"softmax": "space"},
        r"softmax='space' is unknown; use 'scales' or 'channels'",
        [{"softmax": "scales"}, {"softmax": "channels"}],
    ),
    "no reduction": ({"reduction": 0}, r"reduction=0 is impossible; use 1 or more", [{"reduction": 1}]),
    "no stride": ({"stride": 0}, r"stride=0 is impossible; use 1 or more", [{"stride": 1}]),
    "no dilation": ({"dilation": 0}, r"dilation=0 is impossible; use 1 or more", [{"dilation": 1}]),
    "no input": ({"in_channels": 0, "out_channels": 64}, r"in_channels=0 is impossible; use 1", []),
    "no output": ({"out_channels": 0}, r"out_channels=0 is impossible; use 1", []),
}


@pytest.mark.parametrize(("arguments", "message", "remedies"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_cannot_be_built_raises_with_the_values_and_remedies_that_work(
    arguments: dict[str, Any], message: str, remedies: list[dict[str, Any]]
) -> None:
    arguments = {"in_channels": 64, "reduction": 16, **arguments}
    with pytest.raises(ValueError, match=message) as raised:
        PSA(**arguments)
    assert "\n" not in str(raised.value)
    for remedy in remedies:
        fixed = {**arguments, **remedy}
        if "kernel_sizes" in arguments and "groups" not in fixed:
            fixed["groups"] = (1, 4, 8, 16)
        output = PSA(**fixed)(torch.randn(1, fixed["in_channels"], 3, 3))
        assert output.shape[1] == fixed.get("out_channels", 64)
        assert output.std() > 0


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.lists(st.integers(-1, 20), min_size=2, max_size=4),
    st.sampled_from(MODES),
)
def test_following_the_suggestions_of_the_messages_always_ends_in_a_module(
    in_channels: int, out_channels: int, groups: list[int], mode: str
) -> None:
    branches = len(groups)
    kernel_sizes = tuple(2 * i + 1 for i in range(branches))
    values: dict[str, Any] = {"in_channels": in_channels, "out_channels": out_channels}

    def complaint() -> str:
        try:
            SPC(values["in_channels"], values["out_channels"], kernel_sizes, groups, spc=mode)
        except ValueError as error:
            return str(error)
        return ""

    assume(complaint())
    for _ in range(branches + 2):
        if message := complaint():
            suggested = [int(number) for number in re.findall(r"\d+", message.split("; use ")[1])]
            if match := re.match(r"groups=(-?\d+) of the (\d+)×", message):
                groups[kernel_sizes.index(int(match[2]))] = suggested[-1]
            else:
                values[message.split("=")[0]] = suggested[-1]
    assert complaint() == ""
    # what was suggested is near: the nearest multiple above, at most one step away
    assert 0 <= values["out_channels"] - out_channels < branches
    assert 0 <= values["in_channels"] - in_channels < branches


@pytest.mark.parametrize("groups", [(), (0, 4, 8, 16)])
def test_psa_like_refuses_counts_that_mean_nothing(groups: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="groups="):
        psa_like(nn.Conv2d(64, 64, 3), groups=groups)
