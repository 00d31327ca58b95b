"""The kivi format in plain torch. Keys have a scale and a minimum per channel for groups of tokens, values per token.

Both are asymmetric and uniform: x' = minimum + code * scale with an fp16 minimum and an fp16 scale for each group, and
|x - x'| <= scale / 2 up to float32 rounding, for x in the fp16 range.
"""

from __future__ import annotations

import torch
from ib_kernels import ragged
from ib_kernels.formats.format import FP16_MAX, MetadataRows, Side, row_count
from torch import Tensor

GROUP_TOKENS = 32  # consecutive tokens of a run that share a channel's key scale
GROUP_CHANNELS = 32  # consecutive channels of a token that share a value scale


class KiviKeys:
    """Scale and minimum [G, D]: one row for each group of 32 tokens of a run, whose last group may be short."""

    def metadata(self, head_dim: int) -> dict[str, MetadataRows]:
        rows = MetadataRows(head_dim, GROUP_TOKENS)
        return {"scale": rows, "minimum": rows}

    def fit(self, x: Tensor, lengths: Tensor) -> Side:
        return {}

    def quantize(self, x: Tensor, lengths: Tensor, bits: int, fitted: Side) -> tuple[Tensor, Side]:
        groups = x[_tokens_of_group(lengths)]  # [G, 32, D]
        minimum, scale = _range(groups.amin(1), groups.amax(1), bits)
        group = _group_of_token(lengths, x.shape[0])
        codes = _codes(x, minimum[group], scale[group], bits)
        return codes, {"scale": scale, "minimum": minimum}

    def dequantize(self, codes: Tensor, metadata: Side, lengths: Tensor, bits: int) -> Tensor:
        group = _group_of_token(lengths, codes.shape[0])
        return _values(codes, metadata["minimum"][group], metadata["scale"][group])


class KiviValues:
    """Scale and minimum [N, ceil(D / 32)]: one for each group of 32 channels of a token, the last may be short."""

    def metadata(self, head_dim: int) -> dict[str, MetadataRows]:
        rows = MetadataRows(-(-head_dim // GROUP_CHANNELS))
        return {"scale": rows, "minimum": rows}

    def fit(self, x: Tensor, lengths: Tensor) -> Side:
        return {}

    def quantize(self, x: Tensor, lengths: Tensor, bits: int, fitted: Side) -> tuple[Tensor, Side]:
        head_dim = x.shape[1]
        groups = -(-head_dim // GROUP_CHANNELS)
        # Repeating the last channel completes a short group without moving its minimum or maximum.
        channel = torch.arange(groups * GROUP_CHANNELS, device=x.device).clamp(max=head_dim - 1)
        grouped = x[:, channel].unflatten(1, (groups, GROUP_CHANNELS))  # [N, groups, 32]
        minimum, scale = _range(grouped.amin(2), grouped.amax(2), bits)
        codes = _codes(x, _to_channels(minimum, head_dim), _to_channels(scale, head_dim), bits)
        return codes, {"scale": scale, "minimum": minimum}

    def dequantize(self, codes: Tensor, metadata: Side, lengths: Tensor, bits: int) -> Tensor:
        head_dim = codes.shape[1]
        minimum, scale = _to_channels(metadata["minimum"], head_dim), _to_channels(metadata["scale"], head_dim)
        return _values(codes, minimum, scale)


def _range(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """fp16 minimum and scale of groups that span [low, high].

    The scale is at least the fp16 spacing at the minimum, so that rounding the minimum moves it by at most half a step,
    and at least 2**(bits - 23), below which the rounding of a subnormal scale could miss the maximum by more than that.
    Both together make quantization idempotent: a dequantized group finds its own minimum and scale again.
    """
    low, high = low.clamp(-FP16_MAX, FP16_MAX), high.clamp(-FP16_MAX, FP16_MAX)
    minimum = low.to(torch.float16)
    floor = (minimum.float().abs() * 2.0**-10).clamp(min=2.0 ** (bits - 23))
    scale = torch.maximum((high - minimum.float()) / (2**bits - 1), floor).to(torch.float16)
    return minimum, scale


def _codes(x: Tensor, minimum: Tensor, scale: Tensor, bits: int) -> Tensor:
    steps = (x - minimum.float()).div_(scale.float())
    return steps.round_().clamp_(0, 2**bits - 1).to(torch.uint8)


def _values(codes: Tensor, minimum: Tensor, scale: Tensor) -> Tensor:
    return codes.float().mul_(scale.float()).add_(minimum.float())


def _group_of_token(lengths: Tensor, tokens: int) -> Tensor:
    """Index of every token's group: int64 [N]."""
    first_group = ragged.starts(row_count(GROUP_TOKENS, lengths))  # [P]
    return first_group[ragged.run_of_row(lengths, tokens)] + ragged.position_in_run(lengths, tokens) // GROUP_TOKENS


def _tokens_of_group(lengths: Tensor) -> Tensor:
    """Rows of every group: int64 [G, 32]; a short group repeats its last token, which leaves its range as it is."""
    counts = row_count(GROUP_TOKENS, lengths)
    groups = int(counts.sum())
    run = ragged.run_of_row(counts, groups)  # [G]
    within = torch.arange(GROUP_TOKENS, device=lengths.device)
    position = ragged.position_in_run(counts, groups)[:, None] * GROUP_TOKENS + within  # [G, 32]
    return ragged.starts(lengths)[run, None] + torch.minimum(position, lengths[run, None] - 1)


def _to_channels(per_group: Tensor, head_dim: int) -> Tensor:
    """[N, groups] -> [N, D]."""
    return per_group.repeat_interleave(GROUP_CHANNELS, dim=1)[:, :head_dim]
