"""What a call of an operator must move and compute, from its arguments and results alone.

Bytes: every tensor that is read and every one that is written, once. That is the definition of the
operators' own `cost` (see `_library.Operator`), for torch's operators as for ours. FLOPs: the
formulas registered for `torch.utils.flop_counter`, where `_library.define` puts ours, and a few
here that torch lacks or has wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
# In place, with no look at what was there.
OVERWRITES = {
    getattr(_aten, name)
    for name in (
        "bernoulli_", "copy_", "exponential_", "fill_", "normal_", "random_", "uniform_", "zero_"
    )
}  # fmt: skip
# Memory that nothing is written to.
ALLOCATES = {
    getattr(_aten, name)
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
}
# Read as many elements of their first tensor as they write.
GATHERS = {_aten.embedding, _aten.gather, _aten.index, _aten.index_select}


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def held_bytes(t: Tensor) -> int:
    """Of the elements that have memory of their own: an expanded dimension has one. 0 for tensors
    that are not strided."""
    if t.layout != torch.strided:
        return 0
    sizes = (n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or not n)
    return math.prod(sizes) * t.element_size()


def moved_bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Least bytes read and written by the call; 0 for views and allocations."""
    packet = func._overloadpacket
    if packet in ALLOCATES:
        return 0
    read, written = _arguments(func, args, kwargs)
    own = {_memory(t) for t in tensors((args, kwargs))}
    fresh = [t for t in tensors(out) if _memory(t) not in own]
    if not fresh and not written:  # a view, or the argument itself
        return 0
    result = _total(fresh)
    if packet in GATHERS and read:
        return min(held_bytes(read[0]), result) + _total(read[1:]) + result
    return _total(read) + _total(written) + result


def call_flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """By the formula registered for the operator, 0 where there is none: then it is bound by
    memory."""
    packet = func._overloadpacket
    formula = OWN_FORMULAS.get(packet) or flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0


def _arguments(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """(read, written); what is updated in place is both."""
    packet, read, written = func._overloadpacket, [], []
    for argument, value in _bound(func._schema, args, kwargs):
        found = tensors(value)
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += found
            updated = not argument.is_out and packet not in OVERWRITES
            read += found if updated else []
        elif not _gives_shape_alone(func, argument.name):
            read += found
    return read, written


def _bound(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    for i, argument in enumerate(schema.arguments):
        if i < len(args):
            yield argument, args[i]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _gives_shape_alone(func: Any, argument: str) -> bool:
    """An argument that is not read: zeros_like's, new_zeros', philox_normal's."""
    name = func._schema.name.partition("::")[2]
    if argument == "self":
        return name.endswith("_like") or name.startswith("new_")
    return argument == "like"


def _total(found: Iterable[Tensor]) -> int:
    """Each once, whatever the number of times it is given."""
    distinct = {(t.data_ptr(), t.shape, t.stride()): t for t in found if t.layout == torch.strided}
    return sum(map(held_bytes, distinct.values()))


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr() if t.layout == torch.strided and t.numel() else id(t)


# --- Formulas -------------------------------------------------------------------------------------


def _attention_flops(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    """Two products for each head of q [..., H, T, d], of k [..., S, d] and v [..., S, e]."""
    return 2 * math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _attention_backward_flops(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any
) -> int:
    """Five products, the scores' again."""
    return 5 * _attention_flops(q, k, v) // 2


def _convolution_backward_flops(
    dy: Tensor, x: Tensor, weight: Tensor, bias_sizes: Any, stride: Any, padding: Any,
    dilation: Any, transposed: bool, output_padding: Any, groups: int, output_mask: Any, **_: Any,
) -> int:  # fmt: skip
    """torch's formula takes a weight's gradient for that of one group: for a depthwise convolution
    of C channels C times too much."""
    forward = 2 * (x if transposed else dy).numel() * math.prod(weight.shape[1:])
    return forward * sum(output_mask[:2])


def _pointwise_linear_flops(x: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    """oneDNN's linear layer, x [..., K] -> [..., O]."""
    return 2 * x.numel() * out_val.shape[-1]


def _activated_product_flops(bias: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.numel() * b.shape[-1]


OWN_FORMULAS: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    _aten.convolution_backward: _convolution_backward_flops,
    _aten._addmm_activation: _activated_product_flops,
}
if torch.backends.mkldnn.is_available():
    OWN_FORMULAS[torch.ops.mkldnn._linear_pointwise] = _pointwise_linear_flops
