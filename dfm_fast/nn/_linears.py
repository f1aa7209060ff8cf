"""Linear layers: in float32 on AMD's processors by products of our own or oneDNN's, and on a GPU
with a bias's gradient of our own.

On a CPU torch's own products are MKL's, which use half of an AMD processor's vectors. From Zen 5 on
they take twice oneDNN's time (1024 rows, 384 -> 1152: 4.2 and 2.0 ms; the gradient of the input 4.2
and 2.2, of the weight 4.3 and 3.1 with two transpositions: not worth it). On Zen 4, where a wide
vector is two halves, ours (`ops.matrices`) takes a tenth to a third less time than MKL's, forward
and both gradients, from 8 rows on, as it reads weights as they lie. oneDNN's forward is 2 to 5 %
faster still, 10 % for few rows, but adds up products one by one: long sums had to be split, with
copies, to be exact. On a GPU a bias's gradient, the sum of 8192 rows, takes torch 2.3 times what
reading them does. Everywhere else these are `torch.nn.functional.linear`.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dfm_fast._library import INTERPRET, differentiable, load_extension
from dfm_fast.nn._hooks import hooked
from dfm_fast.ops.matrices import matrix_product

_ops = torch.ops.dfm_fast

# oneDNN orders the weights anew in every call, which few rows do not repay.
FEWEST_ROWS = 256
# Of our own product, which reads weights as they lie; and the multiplications that repay a call
# from Python, and an autograd function.
FEWEST_OWN, LEAST_OWN, LEAST_TRAINED = 8, 1 << 22, 1 << 24
# A sum of so many products at most: longer ones, which oneDNN adds up one by one, have more than
# twice the rounding error of MKL's.
LONGEST_SUM = 1024
# Up to so many rows MKL may add up some of them, the last few, one by one.
MOST_CHAINED = 64
# `amd_family`: of the first 512-bit vectors, and of multiply-adds of whole ones.
ZEN_4, ZEN_5 = 25, 26
# Fewer rows are summed by torch in one launch.
SUMMED_ROWS = 1024


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)`, x [..., K], weight [O, K]."""
    if not serves(x, weight):
        if bias is not None and bias.requires_grad and sums_serve(x, weight, bias):
            return _LinearWithSum.apply(x, weight, bias)
        return F.linear(x, weight, bias)
    given = (x, weight) if bias is None else (x, weight, bias)
    if differentiable(*given):
        if own_leads() and x.numel() * len(weight) < LEAST_TRAINED:
            return F.linear(x, weight, bias)
        return _Linear.apply(x, weight, bias)
    return _forward(x, weight, bias)


def called(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x): by `linear` where nobody replaced the layer or looks on."""
    if type(layer) is not nn.Linear or hooked(layer):
        return layer(x)
    return linear(x, layer.weight, layer.bias)


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of ours or oneDNN's, x [..., K] and weight [O, K], is faster, and the
    tensors are plain enough."""
    return (
        single_on_cpu(x, weight)
        and x.numel() >= FEWEST_OWN * x.shape[-1] > 0
        and not torch.compiler.is_compiling()
        and (
            x.numel() * len(weight) >= LEAST_OWN
            if own_leads()
            else onednn_leads() and x.numel() >= FEWEST_ROWS * x.shape[-1]
        )
    )


def sums_serve(x: Tensor, *weights: Tensor) -> bool:
    """Whether the gradient of a bias is better summed by ours, and the tensors are plain."""
    return (
        (x.is_cuda or INTERPRET)
        and type(x) is Tensor
        and plain_weights(*weights)
        and all(w.dtype == x.dtype for w in weights)
        and x.numel() >= SUMMED_ROWS * x.shape[-1] > 0
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x.device.type)
    )


def plain_weights(*weights: Tensor) -> bool:
    """Whether they are torch's own, and not those of a subclass: quantized, sharded."""
    return all(type(w) in (Tensor, torch.nn.Parameter) for w in weights)


def single_on_cpu(x: Tensor, *weights: Tensor) -> bool:
    """Whether they are there, plain, and in float32."""
    return (
        x.device.type == "cpu"
        and type(x) is Tensor
        and plain_weights(*weights)
        and all(v.dtype == torch.float32 for v in (x, *weights))
        and not torch.is_autocast_enabled("cpu")
    )


def whole_weight(weight: Tensor) -> Tensor:
    """The values of a quantized weight, which knows linear layers and little else."""
    return weight if type(weight).dequantize is Tensor.dequantize else weight.dequantize()


def sum_of_rows(rows: Tensor) -> Tensor:
    """[M, N] -> [N]"""
    if rows.is_cuda or INTERPRET:
        return _ops.bias_backward(rows if rows.stride(-1) == 1 else rows.contiguous())
    return rows.sum(0)


def own_leads() -> bool:
    """On a Zen 4: others of that family have no 512-bit vectors."""
    return amd_family() == ZEN_4 and load_extension().module == "_C_avx512"


def onednn_leads() -> bool:
    """On a processor where MKL's products are slow, unless oneDNN is turned off."""
    return (
        amd_family() > 0
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )


def repays_transposing(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's product x [M, O] times weight [O, K] is faster with the copy it takes."""
    return amd_family() >= ZEN_5 and serves(x, weight.t())


def gradient_of_input(dy: Tensor, weight: Tensor) -> Tensor:
    """dy [M, O] times weight [O, K]."""
    if own_leads() and serves(dy, weight.t()):
        return matrix_product(dy, weight)
    if repays_transposing(dy, weight):
        return product(dy, weight.t())
    rows, size = dy.shape
    if rows > MOST_CHAINED or size <= LONGEST_SUM or not single_on_cpu(dy, weight):
        return dy @ weight
    count, rest = divmod(size, LONGEST_SUM // 2)  # sums of so many, and then over them
    parts, weights = dy[:, : size - rest], weight[: size - rest]
    dx = gradients_of_inputs(parts.unflatten(1, (count, -1)).transpose(0, 1), weights).sum(0)
    return dx if rest == 0 else dx.add_(dy[:, -rest:] @ weight[-rest:])


def gradients_of_inputs(dy: Tensor, weight: Tensor) -> Tensor:
    """[L, N, K] of dy [L, N, O], weight [L * O, K]: that of each of L layers."""
    return torch.bmm(dy, weight.unflatten(0, (len(dy), -1)))


def gradient_of_weight(dy: Tensor, x: Tensor, more: Tensor | None = None) -> Tensor:
    """The transpose of dy [M, O] times x [M, K], plus `more` [O, K], which is not used again."""
    if own_leads() and serves(x, dy.t()):
        return matrix_product(dy.t(), x, more)
    return dy.t() @ x if more is None else more.addmm_(dy.t(), x)


@functools.cache
def amd_family() -> int:
    """Of the processor; 0 where it is no AMD's."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="replace")[:1000] if info.exists() else ""
    family = re.search(r"^cpu family\s*: (\d+)$", text, re.MULTILINE)
    return int(family[1]) if family and "AuthenticAMD" in text else 0


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [M, K] times the transpose of b [N, K], plus bias [N], in sums of LONGEST_SUM at most, by
    what leads."""
    if own_leads():
        return matrix_product(a, b.t(), bias)
    call, size = torch.ops.mkldnn._linear_pointwise, a.shape[1]  # what Inductor calls
    width = -(-size // -(-size // LONGEST_SUM))
    y: Tensor | None = None
    for start in range(0, size, width):
        # Strided operands are very slow.
        part = slice(start, start + width)
        left, right = a[:, part].contiguous(), b[:, part].contiguous()
        if y is None:
            y = call(left, right, bias, "none", [], "")
        else:
            y = call.binary(left, y, right, None, "add")
    assert y is not None  # a size of 0 has raised
    return y


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return product(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        need_dx, need_dweight, need_dbias = ctx.needs_input_grad
        rows = dy.flatten(0, -2)
        return (
            gradient_of_input(rows, weight).view(x.shape) if need_dx else None,
            gradient_of_weight(rows, x.flatten(0, -2)) if need_dweight else None,
            rows.sum(0) if need_dbias else None,
        )


class _LinearWithSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        need_dx, need_dweight, _ = ctx.needs_input_grad
        rows = dy.flatten(0, -2)
        return (
            (rows @ weight).view(x.shape) if need_dx else None,
            rows.t() @ x.flatten(0, -2) if need_dweight else None,
            sum_of_rows(rows),
        )
