"""Device code: exp, and what is made of it, to the precision of what is stored.

The hardware's exp2 is good to 2 ulp; exp(x) as exp2 of x log2(e) rounded once has a relative error
of |x| 2^-24 beside that. It is lost in results of 16 bits; for float32 the rounding is added back.
Division is a dozen instructions, and two with a square root's reciprocal squared (4 ulp).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _exp(x):
    """exp of a finite float32."""
    t = x * 1.4426950408889634
    lost = tl.fma(x, 1.4426950408889634, -t) + x * 1.925963033500e-8
    return tl.exp2(t) * (1.0 + lost * 0.6931471805599453)  # infinity stays


@triton.jit
def exp_of_negative(x):
    """exp of x <= 0, to full precision."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return _exp(tl.where(x < -104.0, -104.0, x))  # NaN stays


@triton.jit
def sigmoid(z, NARROW: tl.constexpr):
    """1 / (1 + exp(-z)), 0 far below; NARROW: for results of 16 bits. NaN may vanish."""
    if z.dtype == tl.float64:
        return 1.0 / (1.0 + tl.exp(-z))
    else:
        if NARROW:
            r = tl.rsqrt(1.0 + tl.exp2(z * -1.4426950408889634))
            return r * r
        else:
            # Finite: what infinity times log2(e) has lost is NaN, and so is infinity times 0.
            d = 1.0 + _exp(tl.minimum(tl.maximum(-z, -104.0), 1e4))
            r = tl.rsqrt(d)
            r *= r
            return r * (2.0 - tl.minimum(d, 3e38) * r)


@triton.jit
def silu(z, NARROW: tl.constexpr):
    """z sigmoid(z)"""
    return z * sigmoid(z, NARROW)
