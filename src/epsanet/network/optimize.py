"""A network for inference on CPUs: what training needs is folded away, what remains runs once over memory.

Norms go into the convolutions before them; a PSA module, its norm and its activation become one operator; the order in
which the native kernels hold channels goes into the 1×1 convolutions on both sides; convolutions take their activation
and the residual sum along; native layers that follow one another become one call. The network is traced with
``torch.fx``, so that timm's blocks need no copies here.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from epsanet import kernels
from epsanet.kernels import choice
from epsanet.network.graph import Rewriter, Tracer, fold_norms, foldable, scale_and_shift
from epsanet.network.psa import PSA, hooked

__all__ = ["OptimizedNetwork", "optimize"]

TOLERANCE = 1e-4


class OptimizedNetwork(nn.Module):
    """What ``optimize`` returns: channels-last input, no gradients.

    Args:
        network: the optimised layers.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_NCHW: Tensor) -> Any:
        """Logits of shape ``N, classes`` for images of shape ``N, 3, H, W``; the feature maps of a backbone."""
        with torch.no_grad():
            return self.network(x_NCHW.contiguous(memory_format=torch.channels_last))


def optimize(model: nn.Module, example_input: Tensor, *, compile: bool = False) -> OptimizedNetwork:
    """Make an inference network for CPUs; the model itself stays as it is.

    EPSANet of every variant gains most. Of other networks whatever applies is done: norms folded, channels-last,
    activations and sums fused. Layers that are called in several places, or watched by a hook, stay as they are. The
    result is compared, on the example, with the model on torch's own convolutions. Under
    ``epsanet.kernels.use("reference")`` it has none of the native kernels. The memory between its layers, less than
    two maps of the first stage for the largest batch so far, is kept for the next call; threads that call it
    meanwhile get memory for their call only.

    Args:
        model: a classifier, or a backbone (timm's ``features_only``), on the CPU, float32.
        example_input: images of shape ``N, 3, H, W``, as they will come; other batches and sizes work too.
        compile: also ``torch.compile`` with frozen weights. That takes a minute, and each new shape another.

    Returns:
        A module that gives the model's logits, or each of its feature maps, to 1e-4 of the largest value.

    Raises:
        ValueError: for a model or an example that is not float32 on the CPU, or whose outputs come out different.
    """
    for name, tensor in (("example_input", example_input), *model.named_parameters()):
        if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}; optimize is for float32 on the CPU, "
                "use model.float().cpu()"
            )
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    with torch.no_grad(), kernels.use("reference"):
        expected = _as_list(frozen(example_input))
    network: nn.Module = frozen
    try:
        traced = Tracer().trace_module(frozen)
    except Exception:  # noqa: BLE001 - a model may check its input in any way, and has run on the example
        pass  # control flow that depends on data cannot be traced
    else:
        network = _fuse(traced, example_input, fuse_convolutions=not compile)
    network = network.to(memory_format=torch.channels_last)
    if compile:
        network = torch.compile(network, options={"freezing": True})  # type: ignore[assignment]
    optimized = OptimizedNetwork(network).eval()
    for found, wanted in zip(_as_list(optimized(example_input)), expected, strict=True):
        difference = (found - wanted).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, wanted.abs().max().item()):
            raise ValueError(f"the optimised network's outputs differ by {difference:.2g}; please report this model")
    return optimized


def _as_list(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]


# --------------------------------------------------------------------------------------------------------------- layers


class _Attention(nn.Module):
    """A PSA module with the norm and ReLU after it, computed by one native operator."""

    packed: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(self, psa: PSA, norm: nn.BatchNorm2d | None, relu: bool) -> None:
        super().__init__()
        convs = [conv for conv in psa.spc.branches if isinstance(conv, nn.Conv2d)]
        self.split = psa.spc.mode == "split"
        self.in_channels = convs[0].in_channels * (len(convs) if self.split else 1)
        self.kernel_sizes = [conv.kernel_size[0] for conv in convs]
        self.groups = [conv.groups for conv in convs]
        self.stride = convs[0].stride[0]
        self.over_scales = psa.softmax == "scales"
        self.relu, self.ordered = relu, False
        weights = [conv.weight for conv in convs]
        out_channels = sum(conv.out_channels for conv in convs)
        self.register_buffer("packed", kernels.pack_for_inference(weights, self.in_channels, self.groups, self.split))
        for name, fc in (("fc1", psa.se.fc1), ("fc2", psa.se.fc2)):
            bias = fc.bias if fc.bias is not None else fc.weight.new_zeros(fc.out_channels)
            self.register_buffer(f"{name}_weight", fc.weight.detach().flatten(1).contiguous())
            self.register_buffer(f"{name}_bias", bias.detach().contiguous())
        scale, shift = scale_and_shift(norm, out_channels)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def keep_lane_order(self) -> None:
        """Take and give channels in the kernels' order from now on."""
        order = self.output_order()
        self.scale, self.shift = self.scale[order].contiguous(), self.shift[order].contiguous()
        self.ordered = True

    def input_order(self) -> Tensor:
        return torch.tensor(kernels.input_order(self.in_channels, tuple(self.groups), self.split), device="cpu")

    def output_order(self) -> Tensor:
        return torch.tensor(kernels.output_order(len(self.scale), tuple(self.groups), self.split), device="cpu")

    def arguments(
        self,
    ) -> tuple[Tensor, list[Tensor], Tensor, Tensor, list[int], list[int], int, bool, bool, bool, bool]:
        """Those of ``pyramid_attention`` after its input."""
        return (
            self.packed,
            [self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias],
            self.scale,
            self.shift,
            self.kernel_sizes,
            self.groups,
            self.stride,
            self.split,
            self.over_scales,
            self.relu,
            self.ordered,
        )

    def add_to(self, chain: kernels.InferenceChain, source: int, residual: int | None) -> None:
        assert residual is None
        chain.add_attention(*self.arguments(), self.in_channels, source)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.epsanet.pyramid_attention(x, *self.arguments())
        return y


class _FusedConvolution(nn.Module):
    """A convolution that adds a residual and applies ReLU before its result leaves the cache."""

    def __init__(self, conv: nn.Conv2d, relu: bool) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.layer = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        self.relu = relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        fused = torch.ops.mkldnn._convolution_pointwise
        y: Tensor
        if residual is None:
            y = fused(x, self.weight, self.bias, *self.layer, "relu" if self.relu else "none", [], "")
        else:
            after = "relu" if self.relu else None
            y = fused.binary(x, residual, self.weight, self.bias, *self.layer, "add", 1.0, after, [], None)
        return y


class _NativeConvolution(nn.Module):
    """The same for 1×1 convolutions on the native kernels, whose weights are packed once."""

    packed: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, relu: bool) -> None:
        super().__init__()
        bias = conv.bias if conv.bias is not None else conv.weight.new_zeros(conv.out_channels)
        self.register_buffer("packed", kernels.pack_for_inference([conv.weight], conv.in_channels, [1], False))
        self.register_buffer("bias", bias.detach().contiguous())
        self.in_channels, self.stride, self.relu = conv.in_channels, conv.stride[0], relu

    def add_to(self, chain: kernels.InferenceChain, source: int, residual: int | None) -> None:
        chain.add_pointwise(self.packed, self.bias, self.in_channels, self.stride, self.relu, source, residual)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.epsanet.pointwise_convolution(x, self.packed, self.bias, residual, self.stride, self.relu)
        return y


class _Chain(nn.Module):
    """Native layers that follow one another, in one call: to return to Python between them costs as much as some do.

    Args:
        layers: in the order in which they run.
        inputs: of each layer, its source and its residual: 0 is the chain's input, ``i`` the ``i``-th layer's result.
    """

    def __init__(
        self, layers: Sequence[_NativeConvolution | _Attention], inputs: Sequence[tuple[int, int | None]]
    ) -> None:
        super().__init__()
        self.layers, self.inputs = nn.ModuleList(layers), list(inputs)
        packed = kernels.in_large_pages([layer.packed for layer in layers])
        for layer, weights in zip(layers, packed, strict=True):
            layer.packed = weights
        self.native: kernels.InferenceChain | None = None

    def forward(self, x: Tensor) -> Tensor:
        # What records the network wants to see its operators.
        if type(x) is not Tensor or torch.compiler.is_compiling() or torch._C._is_tracing() or not x.numel():
            results = [x]
            for layer, (source, residual) in zip(self.layers, self.inputs, strict=True):
                results.append(layer(results[source], *(() if residual is None else (results[residual],))))
            return results[-1]
        native = self.native
        if native is None:
            native = kernels.InferenceChain()
            for layer, (source, residual) in zip(self.layers, self.inputs, strict=True):
                layer.add_to(native, source, residual)  # type: ignore[operator]
            self.native = native  # whole: other threads may be here too
        return native(x)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "native": None}  # a copy has weights of its own

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.native = None  # whatever is done to the weights, they may lie elsewhere then
        return super()._apply(fn, recurse)


def _fused(conv: nn.Conv2d, relu: bool) -> nn.Module:
    plain = conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
    if plain and conv.stride[0] == conv.stride[1] and kernels.available() and choice.chosen() != "reference":
        return _NativeConvolution(conv, relu)
    return _FusedConvolution(conv, relu)


# ---------------------------------------------------------------------------------------------------------------- graph


def _fuse(network: fx.GraphModule, example_input: Tensor, fuse_convolutions: bool) -> nn.Module:
    with torch.no_grad():
        ShapeProp(network).propagate(example_input)
    rewriter = Rewriter(network)
    for node in [*rewriter.nodes(nn.Identity), *rewriter.nodes(nn.Dropout)]:
        layer = rewriter.layer(node)
        if layer is not None and not hooked(layer):
            rewriter.drop(node)
    fold_norms(rewriter)
    if choice.chosen() != "reference":
        _fuse_attention(rewriter)
    if fuse_convolutions and torch.backends.mkldnn.is_available():
        _fuse_residuals(rewriter)
        _join(rewriter)
    network.graph.lint()
    network.recompile()
    network.delete_all_unused_submodules()
    return network


def _fuse_attention(rewriter: Rewriter) -> None:
    for node in rewriter.nodes(PSA):
        psa = rewriter.layer(node)
        if type(psa) is not PSA or not psa.standard or not rewriter.free(node):
            continue  # a setting of an ablation, say; the module computes it itself, on the native kernels too
        channels = node.args[0].meta["tensor_meta"].shape[1]  # type: ignore[union-attr]
        like_input = torch.empty(1, channels, 1, 1, dtype=torch.float32, device="cpu")
        if psa.spc.reason_against_kernels(like_input) is not None:
            continue
        norm = relu = None
        after = rewriter.only_user(node)
        if after is not None and foldable(rewriter.layer(after)):
            norm = rewriter.layer(after)
            rewriter.drop(after)
            after = rewriter.only_user(node)
        if after is not None and _is_relu(rewriter.layer(after)):
            relu = True
            rewriter.drop(after)
        attention = _Attention(psa, norm, bool(relu))  # type: ignore[arg-type]
        rewriter.replace(node, attention)
        _fold_order(rewriter, node, attention)


def _fold_order(rewriter: Rewriter, node: fx.Node, attention: _Attention) -> None:
    """Let the convolutions on both sides write and read the lane order, where they are the only ones concerned."""
    before = node.args[0]
    while _is_relu(rewriter.layer(before)) and len(before.users) == 1:  # type: ignore[union-attr]
        before = before.args[0]  # type: ignore[union-attr]
    after = rewriter.only_user(node)
    writer, reader = rewriter.layer(before), rewriter.layer(after)
    if not (type(writer) is nn.Conv2d and type(reader) is nn.Conv2d and writer.groups == reader.groups == 1):
        return
    if rewriter.only_user(before) is None or not rewriter.free(after):  # type: ignore[arg-type]
        return
    attention.keep_lane_order()
    into, out = attention.input_order(), attention.output_order()
    writer.weight = nn.Parameter(writer.weight[into].contiguous(), requires_grad=False)
    if writer.bias is not None:
        writer.bias = nn.Parameter(writer.bias[into].contiguous(), requires_grad=False)
    reader.weight = nn.Parameter(reader.weight[:, out].contiguous(), requires_grad=False)


def _is_relu(layer: nn.Module | None) -> bool:
    return isinstance(layer, nn.ReLU) and not hooked(layer)


def _same_shape(first: fx.Node, second: fx.Node) -> bool:
    """Whether they have the same shape for images of any size; maps of 1×1 may only look alike on this example."""
    shape = first.meta["tensor_meta"].shape
    return bool(shape == second.meta["tensor_meta"].shape) and min(shape[2:]) > 1


def _fuse_residuals(rewriter: Rewriter) -> None:
    """Give convolutions the sum and the ReLU that follow them."""
    additions = (operator.add, operator.iadd, torch.add)
    for node in rewriter.nodes(nn.Conv2d):
        conv = rewriter.layer(node)
        if type(conv) is not nn.Conv2d or isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            continue
        after, residual, last = rewriter.only_user(node), None, node
        if after is None:
            continue
        if after.op == "call_function" and after.target in additions and len(after.args) == 2 and not after.kwargs:
            others = [argument for argument in after.args if argument is not node]
            if (
                len(others) == 1
                and isinstance(others[0], fx.Node)
                and others[0] < node
                and _same_shape(others[0], node)
            ):
                residual, last = others[0], after
                after = next(iter(after.users)) if len(after.users) == 1 else None
        relu = after is not None and _is_relu(rewriter.layer(after))
        if relu and after is not None:
            rewriter.drop(after)
        if residual is not None:
            last.replace_all_uses_with(node)
            rewriter.network.graph.erase_node(last)
            node.args = (*node.args, residual)
        rewriter.replace(node, _fused(conv, relu))


def _join(rewriter: Rewriter) -> None:
    """Make chains of native layers that follow one another."""
    graph = rewriter.network.graph
    run: list[fx.Node] = []
    runs = [run]
    for node in graph.nodes:
        if isinstance(rewriter.layer(node), _NativeConvolution | _Attention) and rewriter.free(node):
            run.append(node)
        else:
            run = []
            runs.append(run)
    for run in runs:
        while len(run) > 1:
            count = next((count for count in range(len(run), 1, -1) if _is_chain(run[:count])), 1)
            if count > 1:
                _make_chain(rewriter, run[:count])
            run = run[count:]


def _inputs(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """What these take from elsewhere."""
    return list(dict.fromkeys(value for node in nodes for value in node.all_input_nodes if value not in nodes))


def _is_chain(nodes: Sequence[fx.Node]) -> bool:
    """Whether one value goes into these and one comes out."""
    inside = all(node.users and all(user in nodes for user in node.users) for node in nodes[:-1])
    return inside and len(_inputs(nodes)) == 1


def _make_chain(rewriter: Rewriter, nodes: Sequence[fx.Node]) -> None:
    (taken,), graph = _inputs(nodes), rewriter.network.graph
    number = {value: at for at, value in enumerate([taken, *nodes])}
    layers: list[Any] = [rewriter.layer(node) for node in nodes]
    inputs = [(number[node.args[0]], number[node.args[1]] if len(node.args) > 1 else None) for node in nodes]  # type: ignore[index]
    name = f"chain_of_{nodes[-1].name}"
    rewriter.network.add_submodule(name, _Chain(layers, inputs))
    with graph.inserting_after(nodes[-1]):
        joined = graph.call_module(name, (taken,))
    nodes[-1].replace_all_uses_with(joined)
    for node in reversed(nodes):
        graph.erase_node(node)
