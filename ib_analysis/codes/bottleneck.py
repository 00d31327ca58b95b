"""The information plane of one head's tokens, where the optimum is known if they are Gaussian.

X is the key, or the value, of a context token. Y is what the model predicts from at that token: its last hidden state, of
which random projections are taken, so that I(T; Y) is at most what the whole state would give. T is X through a dithered
quantizer: X + N, N independent with the covariance of the quantizer's errors.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from ib_kernels import SideName
from numpy.typing import NDArray
from torch import Tensor

from ib_analysis.cache.plan import BITS
from ib_analysis.codes.gathered import SIDES, TierSide, gather
from ib_analysis.errors import CalibrationError
from ib_analysis.estimators.estimate import SAMPLES_PER_DIMENSION, TOO_FEW
from ib_analysis.estimators.moments import Moments
from ib_analysis.estimators.optima import canonical_correlations, gaussian_bottleneck, noisy_copy, reverse_water_filling
from ib_analysis.model.shape import CacheShape
from ib_analysis.replay.replays import Replays

MAX_PROJECTIONS = 64
CURVE_POINTS = 60
MAX_BETA = 1e6
RIDGE = 1e-9  # of the mean variance: values of a first layer may span fewer dimensions than they have
LEAST_NOISE, MOST_NOISE = 1e-9, 1e5  # of a variance: as far apart as float64 still tells them apart in one matrix
SMALLEST_GAIN = 1e-3  # of a copy that still says something of x
COLUMNS = ["layer", "head", "side", "kind", "format", "bits", "rate_bits", "relevance_bits", "gap_bits", "flags"]


def local_plane(replays: Replays) -> pd.DataFrame:
    """Rows of kind "bottleneck" (the Gaussian optimum, a curve), "dithered" (a format at some bits) and "floor", of every head.

    A floor belongs to a dithered point: of all codes of x with no larger squared error the one with the fewest bits. It knows
    nothing of y, as the bottleneck does.

    Columns layer, head, side, kind, format, bits, rate_bits = I(X; T) and relevance_bits = I(T; Y), in bits per token, both
    of Gaussians with the measured covariances, gap_bits, the rate of a dithered point less that of the bottleneck with the same
    relevance, in bits per channel, and flags. These are not corrected for their bias, about dx dy / (2 N ln 2) bits; below 10
    tokens a dimension of x and y every row is flagged "too few samples".

    Raises CalibrationError if there are no more tokens than dimensions: x would determine y, whatever they are.
    """
    shape, recent = replays.spec.shape, replays.spec.recent
    tokens = sum(recent.compressible(len(example.prefill)) for example in replays.examples)
    needed = _dimensions(shape, replays.model.config.get_text_config(decoder=True).hidden_size)
    if tokens <= needed:
        raise CalibrationError(
            f"the local plane needs more than {needed} compressible tokens, {SAMPLES_PER_DIMENSION * needed} to be accurate, "
            f"but {len(replays)} prompts have {tokens}: pass more or longer prompts"
        )
    sides = {TierSide(side, fmt, bits, (1.0,)): shape.heads for side, fmt, bits in product(SIDES, replays.spec.formats, BITS)}
    gathered = gather(replays, sides, groups=1, show="quantizing")
    joint = {side: joint_covariances(replays, side) for side in SIDES}  # [U, dx + dy, dx + dy]
    rows: list[dict[str, Any]] = []
    for side, (u, (layer, head)) in product(SIDES, enumerate(shape.heads)):
        dim = shape.layers[layer].head_dim
        place = {"layer": layer, "head": head, "side": side}
        curve = bottleneck_curve(joint[side][u], dim)
        rows += [place | {"kind": "bottleneck", "rate_bits": rate, "relevance_bits": kept} for rate, kept in zip(*curve)]
        for fmt, bits in product(replays.spec.formats, BITS):
            moments = gathered[TierSide(side, fmt, bits, (1.0,))].moments
            assert moments is not None
            noise = _noise(moments, u, joint[side][u].diagonal()[:dim].max())
            point = place | {"format": fmt, "bits": bits}
            rate, kept = (float(x) for x in noisy_copy(joint[side][u], dim, noise))
            gap = (rate - np.interp(kept, curve[1], curve[0])) / dim
            rows.append(point | {"kind": "dithered", "rate_bits": rate, "relevance_bits": kept, "gap_bits": gap})
            rate, kept = floor_of_copy(joint[side][u], dim, noise)
            rows.append(point | {"kind": "floor", "rate_bits": rate, "relevance_bits": kept})
    return pd.DataFrame(rows).assign(flags=TOO_FEW if tokens < SAMPLES_PER_DIMENSION * needed else "")[COLUMNS]


def bottleneck_curve(covariance: NDArray[np.float64], dim_x: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(I(X; T), I(T; Y)) of the Gaussian optimum, from nothing to nearly all of I(X; Y).

    The single point (0, 0) where x tells nothing about y, as a constant does.
    """
    correlations = canonical_correlations(covariance, dim_x).clip(max=1 - 1e-9)
    strongest = float(correlations.max()) ** 2
    if strongest < np.finfo(float).tiny:
        return np.zeros(1), np.zeros(1)
    least = 1 / strongest
    return gaussian_bottleneck(correlations, np.geomspace(max(least, 1 + 1e-9), max(2 * least, MAX_BETA), CURVE_POINTS))


def floor_of_copy(covariance: NDArray[np.float64], dim_x: int, noise: NDArray[np.float64]) -> tuple[float, float]:
    """(I(X; T), I(T; Y)) of the T of least rate that tells x as exactly as X + N does, N of covariance noise [dx, dx].

    Reverse water-filling: of the principal components of x [dx] those with more variance than the water level are kept, each
    with an error of that level. The error of X + N is that of the best estimate from it.
    """
    x = covariance[:dim_x, :dim_x]
    error = float(np.trace(noise @ np.linalg.solve(x + noise, x)))
    variances, directions = np.linalg.eigh(x)
    rate, level = reverse_water_filling(variances.clip(min=0), error)
    kept = variances > level
    if not kept.any():
        return 0.0, 0.0
    some, main = variances[kept], directions[:, kept].T  # [k], [k, dx]
    cross = main @ covariance[:dim_x, dim_x:]
    joint = np.block([[np.diag(some), cross], [cross.T, covariance[dim_x:, dim_x:]]])
    return rate, float(noisy_copy(joint, len(some), np.diag(level * some / (some - level)))[1])


@torch.no_grad()
def joint_covariances(replays: Replays, side: SideName) -> NDArray[np.float64]:
    """Of the keys or values of every head and of the projected hidden states of the same tokens: [U, dx + dy, dx + dy]."""
    moments = Moments(groups=1)
    projection: Tensor | None = None
    for replay in replays:
        tokens = slice(replay.first, replay.first + replay.tokens)
        device = replay.example.prefill.device
        state = (
            replay.model.base_model(replay.example.prefill[None]).last_hidden_state[0, tokens].to(device).double()
        )  # [n, hidden]
        if projection is None:
            generator = torch.Generator().manual_seed(0)
            width = min(MAX_PROJECTIONS, state.shape[1])
            projection = torch.randn(state.shape[1], width, generator=generator, dtype=torch.float64).to(state.device)
        parts = [getattr(replay.context(i), side)[:, tokens].to(device) for i in replay.spec.shape.compressible]
        x = torch.cat(parts).double()  # [U, n, D]
        moments.add(x, (state @ projection).expand(len(x), -1, -1))
    covariance, _ = moments.covariance()
    power = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    regular = covariance + RIDGE * power * torch.eye(covariance.shape[-1], dtype=power.dtype, device=power.device)
    found: NDArray[np.float64] = regular.cpu().numpy()
    return found


def _dimensions(shape: CacheShape, hidden_size: int) -> int:
    """Of x and y together, in the widest head."""
    return max(shape.layers[i].head_dim for i in shape.compressible) + min(MAX_PROJECTIONS, hidden_size)


def _noise(moments: Moments, head: int, power: float) -> NDArray[np.float64]:
    """Covariance [D, D] of N in y = G (x + N), from the moments of x and its decoded copy y; large where y says nothing of x.

    `power` is the largest variance of x, regularised, so not 0.
    """
    covariance, _ = moments.covariance()
    matrix = covariance[head].cpu().numpy()
    dim = len(matrix) // 2
    x, y, shared = matrix[:dim, :dim], matrix[dim:, dim:], matrix[dim:, :dim]
    gain = np.linalg.lstsq(x, shared.T, rcond=1e-9)[0].T
    left, gains, right = np.linalg.svd(gain)
    back = right.T / gains.clip(min=SMALLEST_GAIN) @ left.T
    variances, directions = np.linalg.eigh(back @ (y - gain @ shared.T) @ back.T)
    silent = right[gains <= SMALLEST_GAIN]
    noise = directions * variances.clip(LEAST_NOISE * power, MOST_NOISE * power) @ directions.T
    return noise + MOST_NOISE * power * silent.T @ silent
