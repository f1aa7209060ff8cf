"""Activation bytes of the 17 residual blocks of SnapGen's UNet.

    python -m benchmarks.activation_bytes

One picture of 1024 px in bfloat16. Nothing is computed: tensors are fake and have their full size.

Moved, in the forward: what operators read and write, parameters left out, each tensor once for
every operator that takes it. With i and o channels in and out, 2 o between, and P pixels, the least
is P (2 i + 5 o) numbers: x for the first convolution (i), h written and read (4 o), x for the
shortcut (i) and y written (o); the statistics of x come with x. In all 628 MB; torch's own
operators take P (7 i + 24 o), and P (i + o) more where the shortcut is a convolution: 2,839 MB.
What an operator writes for itself is not seen: the depthwise maps of our Triton kernels, which are
two launches, are another P (2 i + 4 o).

Kept for the backward: x and h, so P (i + 2 o) numbers at least, 276 MB: norm, SiLU and depthwise
convolution can be computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dfm_fast.nn import SeparableConvBlock
from dfm_fast.ops import ChannelStatistics, channel_statistics

WIDTHS, SIDES, TIME = (256, 512, 896), (128, 64, 32), 1024


class Size(NamedTuple):
    """A residual block: channels in and out, side of its map."""

    inputs: int
    outputs: int
    side: int

    def least_moved(self) -> int:
        return self.side**2 * (2 * self.inputs + 5 * self.outputs)

    def least_kept(self) -> int:
        return self.side**2 * (self.inputs + 2 * self.outputs)


def blocks() -> Iterator[Size]:
    """Two a stage going down, two in the middle, three a stage going up, where what came down lies
    beside the map: that of the first convolution, of every block and of two stride-2 ones."""
    down, width = [WIDTHS[0]], WIDTHS[0]
    for stage, (outputs, side) in enumerate(zip(WIDTHS, SIDES, strict=True)):
        for _ in range(2):
            yield Size(width, outputs, side)
            width = outputs
            down.append(width)
        if stage < 2:
            down.append(width)
    yield from [Size(width, width, SIDES[-1])] * 2
    for outputs, side in zip(reversed(WIDTHS), reversed(SIDES), strict=True):
        for _ in range(3):
            yield Size(width + down.pop(), outputs, side)
            width = outputs


# --- Counting -------------------------------------------------------------------------------------


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage(x: Tensor) -> StorageWeakRef:
    return StorageWeakRef(x.untyped_storage())


def kept_bytes(call: Callable[[], Any], but: list[Tensor]) -> int:
    """Of all storages saved for the backward of what `call` computes, those of `but` left out."""
    left_out, found = set(map(storage, but)), {}

    def pack(x: Tensor) -> Tensor:
        found[storage(x)] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        keep = call()
    del keep
    return sum(n for at, n in found.items() if at not in left_out)


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write; views move none."""

    def __init__(self, but: list[Tensor]) -> None:
        super().__init__()
        self.left_out, self.bytes = set(map(storage, but)), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        read, written = tensors((args, kwargs)), tensors(results)
        given = set(map(storage, read))
        if func._schema.is_mutable or not all(storage(y) in given for y in written):
            moved = [x for x in (*read, *written) if storage(x) not in self.left_out]
            self.bytes += sum(x.numel() * x.element_size() for x in moved)
        return results


def moved_bytes(call: Callable[[], Any], but: list[Tensor]) -> int:
    with Traffic(but) as traffic:
        call()
    return traffic.bytes


# --- The blocks -----------------------------------------------------------------------------------


def ours(size: Size) -> nn.Module:
    return SeparableConvBlock(size.inputs, size.outputs, TIME)


def of_diffusers(size: Size) -> nn.Module:
    from diffusers.models.unets.unet_dreamlite import ResnetBlock2DDreamLite

    widths = {"in_channels": size.inputs, "out_channels": size.outputs, "temb_channels": TIME}
    return ResnetBlock2DDreamLite(**widths, eps=1e-5, use_sep_conv=True)


def in_dtype(dtype: torch.dtype, make: Callable[[], nn.Module]) -> nn.Module:
    """Fake parameters cannot be converted."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return make()
    finally:
        torch.set_default_dtype(before)


class Count(NamedTuple):
    """Bytes of one block, or of several."""

    least_moved: int
    moved: int
    least_kept: int
    kept: int


Call = Callable[[], Tensor | tuple[Tensor, ChannelStatistics]]


def forward(
    make: Callable[[Size], nn.Module], size: Size, dtype: torch.dtype, given: bool = False
) -> tuple[Call, list[Tensor]]:
    """(a block's forward in training, its parameters); `given`: the statistics of x come with it,
    and those of y are asked for."""
    block = in_dtype(dtype, lambda: make(size))
    shape = 1, size.inputs, size.side, size.side
    x = torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    temb = torch.randn(1, TIME, dtype=dtype, requires_grad=True)
    options: dict[str, Any] = {}
    if given:
        options = {"statistics": channel_statistics(x.detach()), "with_statistics": True}
    return lambda: block(x, temb, **options), [p.detach() for p in block.parameters()]


def count(size: Size, dtype: torch.dtype, call: Call, parameters: list[Tensor]) -> Count:
    least = size.least_moved() * dtype.itemsize, size.least_kept() * dtype.itemsize
    return Count(least[0], moved_bytes(call, parameters), least[1], kept_bytes(call, parameters))


def total(
    make: Callable[[Size], nn.Module], dtype: torch.dtype = torch.bfloat16, given: bool = False
) -> Count:
    """Of all 17, without memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        counts = [count(s, dtype, *forward(make, s, dtype, given)) for s in blocks()]
    return Count(*map(sum, zip(*counts, strict=True)))


def main() -> None:
    names = {"ours": ours, "ours, statistics handed on": ours, "diffusers": of_diffusers}
    print(f"{'17 blocks, MB':28}{'moved':>8}{'of least':>10}{'kept':>8}{'of least':>10}")
    for name, make in names.items():
        c = total(make, given="handed on" in name)
        print(
            f"{name:28}{c.moved / 1e6:8.0f}{c.moved / c.least_moved:9.2f}x"
            f"{c.kept / 1e6:8.0f}{c.kept / c.least_kept:9.2f}x"
        )
    print(f"{'least':28}{c.least_moved / 1e6:8.0f}{'':10}{c.least_kept / 1e6:8.0f}")


if __name__ == "__main__":
    main()
