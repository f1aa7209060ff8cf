"""torch's fused attention (SDPA), by the operators behind it: what serves multi-query attention on
a GPU. Never the MATH backend, which writes every score.

Two zero-copy forms make its heads equal in number:

- view: with one key head the queries of all heads are queries of one, q as [B, 1, T H, d].
- expand: k and v with strides of 0, [B, H, S, d]. (With several key heads that is a copy.)

Forward takes the view where it can. Backward works on blocks of keys, a program for each block of
each head: few in one head. There the keys are expanded, and their gradients summed over the heads,
unless they alone fill the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


# --- Forms ----------------------------------------------------------------------------------------


class Heads(NamedTuple):
    """What SDPA takes: q [B, H, T, d], k and v [B, H, S, d], an additive mask or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None


def seen(x: Tensor, view: bool) -> Tensor:
    """[B, T, H, ...] as SDPA takes q: [B, H, T, ...], or [B, 1, T H, ...]."""
    return x.flatten(1, 2).unsqueeze(1) if view else x.transpose(1, 2)


def restored(x: Tensor, like: Tensor, view: bool) -> Tensor:
    """Undoes `seen`; contiguous."""
    return _contiguous(x.squeeze(1).unflatten(1, like.shape[1:3]) if view else x.transpose(1, 2))


def _contiguous(x: Tensor) -> Tensor:
    """With exactly the strides of a new tensor: `contiguous` leaves those of sides of one."""
    return x.contiguous().view(-1).view(x.shape)


def heads_of(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, view: bool) -> Heads:
    """A sample without any key attends to all, but their values are 0: so is what it gets, and so
    are its gradients."""
    repeats, bias = 1 if view else q.shape[2] // k.shape[2], None
    q = seen(q, view)
    if mask is not None:
        some = mask.any(1, keepdim=True)
        v = v.where(some[:, :, None, None], 0)
        bias = _additive(mask | ~some, q).expand(-1, q.shape[1], q.shape[2], -1)
    k, v = (_expanded(x, repeats).transpose(1, 2) for x in (k, v))
    return Heads(q, k, v, bias)


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """[B, S] -> [B, 1, 1, S], 0 or minus infinity; rows begin where kernels read them aligned."""
    B, S = mask.shape
    bias = like.new_zeros(B, -(-S // 16) * 16)[:, :S]
    return bias.masked_fill_(~mask, float("-inf"))[:, None, None]


def _expanded(x: Tensor, repeats: int) -> Tensor:
    """[B, S, Hkv, d] -> [B, S, Hkv repeats, d]."""
    if repeats == 1:
        return x
    return x.unsqueeze(3).expand(-1, -1, -1, repeats, -1).flatten(2, 3)


def _summed(dx: Tensor, like: Tensor) -> Tensor:
    """[B, H, S, d], gradients of what was expanded -> [B, S, Hkv, d], contiguous."""
    heads = like.shape[2]
    if dx.shape[1] != heads:
        dx = dx.unflatten(1, (heads, -1)).sum(2)  # in float32 inside
    return _contiguous(dx.transpose(1, 2))


# --- Backends -------------------------------------------------------------------------------------
#
# Each is (forward, backward): forward(heads, scale, save) -> y [B, H, T, d], lse [B, H, T] in
# float32 (to base e; any tensor where it is not saved); backward(dy, heads, y, lse, scale) -> dq,
# dk, dv. "cpu" shows on a CPU that the forms are right.

Gradients = tuple[Tensor, Tensor, Tensor]


def _cpu(h: Heads, scale: float, save: bool) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {"attn_mask": h.bias, "scale": scale}
    return _aten._scaled_dot_product_flash_attention_for_cpu(*h[:3], **options)


def _cpu_backward(dy: Tensor, h: Heads, y: Tensor, lse: Tensor, scale: float) -> Gradients:
    backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(dy, *h[:3], y, lse, 0.0, False, attn_mask=h.bias, scale=scale)


def _none(like: Tensor) -> Tensor:
    """The state of a random generator that nobody asks."""
    return torch.empty((), dtype=torch.int64, device=like.device)


def _flash(h: Heads, scale: float, save: bool) -> tuple[Tensor, Tensor]:
    y, lse, *_ = _aten._scaled_dot_product_flash_attention(*h[:3], 0.0, False, scale=scale)
    return y, lse


def _flash_backward(dy: Tensor, h: Heads, y: Tensor, lse: Tensor, scale: float) -> Gradients:
    sizes, none = (h.q.shape[2], h.k.shape[2]), _none(dy)
    backward = _aten._scaled_dot_product_flash_attention_backward
    rest = (None, None, *sizes, 0.0, False, none, none)
    return backward(dy, *h[:3], y, lse, *rest, scale=scale)


def _efficient(h: Heads, scale: float, save: bool) -> tuple[Tensor, Tensor]:
    y, lse, *_ = _aten._scaled_dot_product_efficient_attention(*h, save, scale=scale)
    return y, lse[:, :, : h.q.shape[2]]


def _efficient_backward(dy: Tensor, h: Heads, y: Tensor, lse: Tensor, scale: float) -> Gradients:
    backward, none = _aten._scaled_dot_product_efficient_attention_backward, _none(dy)
    lse = F.pad(lse, (0, -lse.shape[2] % 32), value=float("inf"))  # rows it reads in wholes
    rest = none, none, 0.0, [True, True, True, False]
    return backward(dy, *h, y, lse, *rest, scale=scale)[:3]


def _cudnn(h: Heads, scale: float, save: bool) -> tuple[Tensor, Tensor]:
    y, lse, *_ = _aten._scaled_dot_product_cudnn_attention(*h, save, scale=scale)
    return y, lse.view(h.q.shape[:3]) if save else lse


def _cudnn_backward(dy: Tensor, h: Heads, y: Tensor, lse: Tensor, scale: float) -> Gradients:
    backward, none = _aten._scaled_dot_product_cudnn_attention_backward, _none(dy)
    rest = none, none, h.bias, None, None, h.q.shape[2], h.k.shape[2], 0.0, False
    return backward(dy, *h[:3], y, lse.unsqueeze(3), *rest, scale=scale)


BACKENDS = {
    "cpu": (_cpu, _cpu_backward),
    "cudnn": (_cudnn, _cudnn_backward),
    "flash": (_flash, _flash_backward),
    "efficient": (_efficient, _efficient_backward),
}


# In the order they are tried. cuDNN's kernels for Hopper and later are the ones written for them;
# torch's flash attention is that of Ampere. float32 has "efficient" alone.
_ORDER = ("flash", "cudnn", "efficient")
_ORDER_FROM_90 = ("cudnn", "flash", "efficient")


def choose(h: Heads) -> str:
    """The first that takes this, of those that the user left enabled (`torch.nn.attention.
    sdpa_kernel`). Raises RuntimeError where none does: what is left writes every score."""
    cuda = torch.backends.cuda
    params = cuda.SDPAParams(h.q, h.k, h.v, h.bias, 0.0, False, False)
    usable = {
        "cudnn": cuda.can_use_cudnn_attention,
        "flash": cuda.can_use_flash_attention,
        "efficient": cuda.can_use_efficient_attention,
    }
    hopper = torch.cuda.get_device_capability(h.q.device) >= (9, 0)
    for backend in _ORDER_FROM_90 if hopper else _ORDER:
        if usable[backend](params):
            return backend
    raise RuntimeError(
        "multi_query_attention: q: expected what a fused backend of torch's SDPA takes on a GPU "
        f"(cuDNN, flash or memory-efficient), got {h.q.dtype} with heads of {h.q.shape[3]}"
    )


def view_backward(k: Tensor) -> bool:
    """Whether one head has blocks of 128 keys for every processor, twice."""
    blocks = k.shape[0] * -(-k.shape[1] // 128)
    processors = torch.cuda.get_device_properties(k.device).multi_processor_count
    return k.shape[2] == 1 and blocks >= 2 * processors


# --- Both together --------------------------------------------------------------------------------


def _to_eights(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The head dimension padded with zeros, which change no score, to what GPU kernels take."""
    more = -tensors[0].shape[-1] % 8
    return tuple(F.pad(x, (0, more)) if more else x for x in tensors)


def forward(
    backend: str | None,  # None: that of `choose`
    q: Tensor,  # [B, T, H, d]
    k: Tensor,  # [B, S, Hkv, d]
    v: Tensor,
    mask: Tensor | None,  # [B, S]
    scale: float,
    view: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """(y [B, T, H, d], lse [B, T, H] to base e, as it came: by way of another base backward would
    lose digits; [0] where it is not saved), contiguous."""
    d = q.shape[-1]
    if backend != "cpu":
        q, k, v = _to_eights(q, k, v)
    h = heads_of(q, k, v, mask, view)
    y, lse = BACKENDS[backend or choose(h)][0](h, scale, save)
    lse = restored(lse, q, view) if save else y.new_empty(0, dtype=torch.float32)
    return restored(y[..., :d], q, view), lse


def backward(
    backend: str | None,
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    y: Tensor,
    lse: Tensor,
    scale: float,
    view: bool,
) -> Gradients:
    """Gradients of q, k and v, contiguous."""
    d = q.shape[-1]
    if backend != "cpu":
        dy, q, k, v, y = _to_eights(dy, q, k, v, y)
    dy, y, lse = (seen(x, view) for x in (dy, y, lse))
    h = heads_of(q, k, v, mask, view)
    dq, dk, dv = BACKENDS[backend or choose(h)][1](dy, h, y, lse.contiguous(), scale)
    dq = restored(dq[..., :d], q, view)
    dk, dv = (_summed(dx[..., :d], k) for dx in (dk, dv))
    if mask is not None:
        dv = dv.masked_fill_(~mask[:, :, None, None], 0)
    return dq, dk, dv
