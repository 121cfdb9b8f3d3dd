from collections.abc import Sequence

from torch import Tensor

def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def set_instruction_set(name: str) -> None: ...
def threads_used() -> int: ...
def fingerprint(weights: Sequence[Tensor]) -> int: ...
def prefer_large_pages(memory: Tensor) -> None: ...
def batch_norm(
    x: Tensor,
    factors: Tensor | None,
    matrix: Tensor | None,
    z: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    epsilon: float,
    relu: bool,
    y: Tensor,
    mean: Tensor,
    variance: Tensor,
    threads: int,
) -> None: ...
def batch_norm_gradient(
    dy: Tensor,
    dshortcut: Tensor | None,
    shortcut_stride: int,
    x: Tensor,
    factors: Tensor | None,
    matrix: Tensor | None,
    z: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    y: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    epsilon: float,
    relu: bool,
    dx: Tensor,
    dfactors: Tensor | None,
    dmatrix: Tensor | None,
    dresidual: Tensor | None,
    dweight: Tensor,
    dbias: Tensor,
    threads: int,
) -> None: ...

class Layer:
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_sizes: Sequence[int],
        groups: Sequence[int],
        stride: int,
        split: bool,
        in_order: Sequence[int],
        out_order: Sequence[int],
    ) -> None: ...
    def packed_size(self, backward: bool) -> int: ...
    def pack(self, weights: Sequence[Tensor], packed: Tensor, backward: bool, threads: int) -> None: ...
    def forward(self, x: Tensor, packed: Tensor, y: Tensor, sums: Tensor, ordered: bool, threads: int) -> None: ...
    def infer_pointwise(
        self, x: Tensor, packed: Tensor, bias: Tensor, residual: Tensor | None, y: Tensor, relu: bool, threads: int
    ) -> None: ...
    def infer(
        self,
        x: Tensor,
        packed: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
        scale: Tensor,
        shift: Tensor,
        y: Tensor,
        over_scales: bool,
        relu: bool,
        ordered: bool,
        threads: int,
    ) -> None: ...
    def input_gradient(
        self, dy: Tensor, dsums: Tensor | None, packed: Tensor, dx: Tensor, ordered: bool, threads: int
    ) -> None: ...
    def weight_gradient(
        self,
        x: Tensor,
        dy: Tensor,
        dsums: Tensor | None,
        gradients: Sequence[Tensor],
        ordered: bool,
        threads: int,
    ) -> None: ...

class Chain:
    def __init__(self) -> None: ...
    def add_pointwise(
        self, layer: Layer, packed: Tensor, bias: Tensor, relu: bool, source: int, residual: int
    ) -> None: ...
    def add_attention(
        self,
        layer: Layer,
        packed: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
        scale: Tensor,
        shift: Tensor,
        over_scales: bool,
        relu: bool,
        ordered: bool,
        source: int,
    ) -> None: ...
    def result_size(self, height: int, width: int) -> tuple[int, int, int]: ...
    def run(self, x: Tensor, y: Tensor, threads: int) -> None: ...
