"""The step of a token: of a few the one that loses least, found by the arithmetic of `reference`, in the same order."""

from __future__ import annotations

import triton
import triton.language as tl
from ib_kernels.quantize_triton import FP16_MAX, reciprocal


@triton.jit
def least_error_step(
    tiles,
    D: tl.constexpr,
    BITS: tl.constexpr,
    FUSED: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    ORDER: tl.constexpr,
    ROOT: tl.constexpr,
    STEP: tl.constexpr,
    MULTIPLES: tl.constexpr,
):
    """fp16 [N]: the step for a Gaussian, or another with less squared error (see `reference`)."""
    gaussian = gaussian_step(sum_of_squares(tiles, D, C, N), STEP * STEP / (D * ORDER))
    if BITS == 2:
        base = gaussian.to(tl.float32)
    else:
        base = largest(tiles, D, C) * (1.0 / (2.0 ** (BITS - 1) * ROOT))
    step = gaussian
    least = tl.full([N], float("inf"), tl.float64)
    for i in range(len(MULTIPLES) + 1):  # a loop on the GPU, too: what is tried at the same time would not fit its registers
        other = tl.minimum(tl.maximum(base * multiple(i - 1, MULTIPLES), 2.0**-24), FP16_MAX).to(tl.float16)
        other = tl.where(i == 0, gaussian, other)
        error = squared_error(tiles, other, D, BITS, FUSED, C, N, ROOT)
        less = error < least  # not if NaN
        step = tl.where(less, other, step)
        least = tl.where(less, error, least)
    return step


@triton.jit
def multiple(i, MULTIPLES: tl.constexpr):
    """The i-th of them, if there is one."""
    chosen = tl.full([], MULTIPLES[0], tl.float32)
    for j in tl.static_range(1, len(MULTIPLES)):
        chosen = tl.where(i == j, MULTIPLES[j], chosen)
    return chosen


@triton.jit
def largest(tiles, D: tl.constexpr, C: tl.constexpr):
    """fp32 [N]: the largest magnitude."""
    most = tl.abs(tiles[0])
    for k in tl.static_range(1, D // C):
        most = tl.maximum(most, tl.abs(tiles[k]))
    return tl.max(most, 1)


@triton.jit
def squared_error(
    tiles,
    step,
    D: tl.constexpr,
    BITS: tl.constexpr,
    FUSED: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    ROOT: tl.constexpr,
):
    """fp64 [N]: what quantizing tokens with these steps fp16 [N] loses."""
    per_step = (reciprocal_step(step, FUSED) * (1.0 / ROOT))[:, None]
    total = tl.zeros([N], tl.float64)
    for j in tl.static_range(8 // C):
        lanes = square_of_error(tiles[j], per_step, BITS, FUSED)  # [N, C]
        for k in tl.static_range(j + 8 // C, D // C, 8 // C):
            lanes += square_of_error(tiles[k], per_step, BITS, FUSED)
        total += tl.sum(lanes.to(tl.float64), 1)
    return total * (step.to(tl.float64) * step.to(tl.float64))


@triton.jit
def square_of_error(turned, per_step, BITS: tl.constexpr, FUSED: tl.constexpr):
    """Squared distance of channels from the middle of their steps, in steps."""
    LAST: tl.constexpr = 2.0 ** (BITS - 1) - 1.0  # step of a magnitude
    if FUSED:
        # A sum with 2**23 that is rounded down has no fraction; to take 2**23 - 0.5 from it is exact, and gives the middle.
        asm: tl.constexpr = (
            "{.reg .f32 size, steps, middle; abs.f32 size, $1; mul.rn.f32 steps, size, $2; add.rm.f32 middle, steps, 0f4B000000;"
            " min.f32 middle, middle, $3; sub.rn.f32 middle, middle, 0f4AFFFFFF; sub.rn.f32 $0, steps, middle;}"
        )
        last: tl.constexpr = LAST + 2.0**23
        error = tl.inline_asm_elementwise(asm, "=f,f,f,f", [turned, per_step, last], tl.float32, is_pure=True, pack=1)
    else:
        steps = tl.abs(turned) * per_step
        error = steps - (tl.minimum(tl.floor(steps), LAST) + 0.5)
    return error * error


@triton.jit
def reciprocal_step(step, FUSED: tl.constexpr):
    """fp32 1 / step, a step of 0 as the smallest one."""
    return reciprocal(tl.maximum(step.to(tl.float32), 2.0**-24, propagate_nan=tl.PropagateNan.ALL), FUSED)


@triton.jit
def sum_of_squares(tiles, D: tl.constexpr, C: tl.constexpr, N: tl.constexpr):
    """fp64 [N]: every eighth square in fp32, one after another as in `reference`, and these sums in fp64."""
    total = tl.zeros([N], tl.float64)
    for j in tl.static_range(8 // C):
        lanes = tiles[j] * tiles[j]  # [N, C]
        for k in tl.static_range(j + 8 // C, D // C, 8 // C):
            lanes += tiles[k] * tiles[k]
        total += tl.sum(lanes.to(tl.float64), 1)
    return total


@triton.jit
def gaussian_step(squares, FACTOR: tl.constexpr):
    """fp16 root of squares fp64 [N] times FACTOR: the float root, and one step of Newton's in double precision."""
    target = squares * FACTOR
    root = tl.sqrt(target.to(tl.float32))
    safe = tl.maximum(root, 2.0**-100)
    root64 = root.to(tl.float64)
    step = (root64 + (target - root64 * root64) * (0.5 / safe).to(tl.float64)).to(tl.float32)
    return tl.minimum(step, FP16_MAX, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)
