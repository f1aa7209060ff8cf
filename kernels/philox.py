"""The random stream of `dfm_fast.ops._philox` in registers: Philox4x32-10 and Box-Muller.

A counter of 64 bits gives four normals: a lane that owns four neighbouring elements draws once.
What it costs is instructions, so all of them are counted (`dfm-fast check`, see `noises`):

    ten rounds     one 32 x 32 -> 64 bit multiply and one three-input xor per word pair; the first
                   two rounds are halves, as the counter's upper 64 bits are 0
    logarithm      the hardware's log2, whose absolute error is 2^-22 near 1; u > 1 - 2^-6 takes
                   -2 ln u = 2 d (1 + d/2 + d^2/3 + ...), d = 1 - u, or the radius loses digits
    sin, cos       of a signed angle: the word as an int32, so that |2 pi u| <= pi is exact

`EXACT`, for float32, takes sin and cos by quadrant and polynomial: 1.0e-6 from the exact normal of
the rounded u, at most, where the reference is 3.9e-6 off. `FAST`, for results of 16 bits, takes the
hardware's, whose absolute error is 2^-20.5: 6.4e-6, and 8.4e-6 from the reference. (Worst of some
10^7 words, the ends of the range among them, with every PTX instruction off by its stated bound.)
`PLAIN` is for the interpreter, for AMD and for float64.

Kernels of the stream are compiled without contraction (`enable_fp_fusion`): which products a
compiler fuses differs from one specialisation to the next, and the noise of an element must not.
"""

# ruff: noqa: RUF005 (Triton's tuples do not unpack)

import triton
import triton.language as tl

# How normals are made.
PLAIN = tl.constexpr(0)
EXACT = tl.constexpr(1)
FAST = tl.constexpr(2)


@triton.jit
def philox(counter, key):
    """Philox4x32-10 of (counter int64 modulo 2^62, 0) under key int64: four uint32."""
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    p = counter.to(tl.uint32).to(tl.uint64) * 0xD2511F53
    c0 = ((counter >> 32).to(tl.uint32) & 0x3FFFFFFF) ^ k0
    c1 = tl.zeros_like(counter).to(tl.uint32)
    c2, c3 = (p >> 32).to(tl.uint32) ^ k1, p.to(tl.uint32)
    for _ in tl.static_range(9):
        k0, k1 = tl.add(k0, 0x9E3779B9, False), tl.add(k1, 0xBB67AE85, False)
        p, q = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (q >> 32).to(tl.uint32) ^ c1 ^ k0, q.to(tl.uint32)
        c2, c3 = (p >> 32).to(tl.uint32) ^ c3 ^ k1, p.to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _radius(x, ACC: tl.constexpr, HOW: tl.constexpr):
    """sqrt(-2 ln u) of a word."""
    u = tl.fma(x.to(ACC), 2.3283064365386963e-10, 1.1641532182693481e-10)  # 2^-32, 2^-33
    if HOW == PLAIN:
        radius = tl.sqrt(-2.0 * tl.log(u))
    else:
        d = 1.0 - u
        near = d * tl.fma(d, tl.fma(d, 0.6666667, 1.0), 2.0)
        far = -1.3862944 * tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [u], tl.float32, True, 1
        )
        radius = tl.inline_asm_elementwise(
            "sqrt.approx.ftz.f32 $0, $1;", "=f,f",
            [tl.where(d < 0.015625, near, far)], tl.float32, True, 1,
        )  # fmt: skip
    return radius


@triton.jit
def _turned(x, ACC: tl.constexpr, HOW: tl.constexpr):
    """(sin 2 pi u, cos 2 pi u) of a word."""
    if HOW == FAST:
        angle = x.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09  # 2 pi 2^-32
        sin = tl.inline_asm_elementwise(
            "sin.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1
        )
        cos = tl.inline_asm_elementwise(
            "cos.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1
        )
    else:
        # x = 2^30 quadrant + rest, |rest| <= 2^29: an angle within pi / 4 of the quadrant's.
        a = (x << 2).to(tl.int32, bitcast=True).to(ACC)
        # pi/2 2^-32, and half a step
        if tl.float64 == ACC:
            a = (a + 2.0) * 3.6572951981678989e-10
        else:
            a = tl.fma(a, 3.6572951981678989e-10, 7.3145903963357978e-10)
        t = a * a
        if tl.float64 == ACC:  # Taylor
            s, c = t * 0.0 + 1.0, t * 0.0 + 1.0
            for n in tl.static_range(18, 0, -2):
                s = 1.0 - s * t / (n * (n + 1.0))
                c = 1.0 - c * t / (n * (n - 1.0))
            sin, cos = a * s, c
        else:  # Cephes
            s = tl.fma(t, tl.fma(t, -1.9515295891e-4, 8.3321608736e-3), -1.6666654611e-1)
            c = tl.fma(t, tl.fma(t, 2.443315711809948e-5, -1.388731625493765e-3), 4.166664568e-2)
            sin, cos = tl.fma(a * t, s, a), tl.fma(t, tl.fma(t, c, -0.5), 1.0)
        y = x + 0x20000000
        odd = (y & 0x40000000) != 0
        sin, cos = tl.where(odd, cos, sin), tl.where(odd, sin, cos)
        sin, cos = _signed(sin, y), _signed(cos, y + 0x40000000)
    return sin, cos


@triton.jit
def _signed(x, y):
    """x, negated where the top bit of y is set."""
    if x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True) ^ (y & 0x80000000)
        out = bits.to(tl.float32, bitcast=True)
    else:
        out = tl.where(y < 0x80000000, x, -x)
    return out


@triton.jit
def normals(counter, key, ACC: tl.constexpr, HOW: tl.constexpr):
    """The four normals of each counter, in ACC: float32, or float64, which is always PLAIN."""
    out = ()
    words = philox(counter, key)
    for k in tl.static_range(0, 4, 2):
        radius = _radius(words[k], ACC, HOW)
        sin, cos = _turned(words[k + 1], ACC, HOW)
        out = out + (radius * sin, radius * cos)
    return out


@triton.jit
def stream(state_ptr, seed, offset):
    """(key, counter and place in it of the first normal) of a tensor: int64, int64, int64."""
    key, first = seed.to(tl.int64), offset.to(tl.int64)
    if state_ptr is not None:
        key = tl.load(state_ptr)
        first = first + tl.load(state_ptr + 1)
    return key, first >> 2, first & 3


@triton.jit
def four(at, base, offs, ALIGNED: tl.constexpr, ACC: tl.constexpr, HOW: tl.constexpr):
    """Normals base + offs to base + offs + 3 of a tensor: int64, int32. ALIGNED: of one counter,
    as offs and base + at[2] are multiples of 4; else of two."""
    key, counter, place = at
    if ALIGNED:
        out = normals(counter + ((base + place) >> 2) + (offs >> 2), key, ACC, HOW)
    else:
        index = base + place + offs
        counter = counter + (index >> 2)
        both = normals(counter, key, ACC, HOW) + normals(counter + 1, key, ACC, HOW)
        place = (index & 3).to(tl.int32)
        out = ()
        for k in tl.static_range(4):
            low = tl.where(place == 0, both[k], both[k + 1])
            high = tl.where(place == 2, both[k + 2], both[k + 3])
            out = out + (tl.where(place < 2, low, high),)
    return out
