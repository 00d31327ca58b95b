"""Attention to everything that a layer of a compressed cache holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from ib_kernels.attention import merge, partial_attention
from ib_kernels.kivi import GROUP_CHANNELS, group_counts
from ib_kernels.packed import RAW_BITS, Packed, unpack_tokens_reference
from ib_kernels.planning import Plan, is_rotated, plan
from ib_kernels.ragged import check_pairs, pad, position_in_run
from torch import Tensor

MOST_CHANNELS = 256
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Window:
    """Tokens at full precision, the same number for each pair.

    Attributes:
        keys, values: [pairs, T, D], contiguous, fp16, bf16 or fp32.
        mask: bool [B or 1, M, T], true where a query position sees a token, for pairs = B * KV heads and query rows that
            are grouped heads times M positions; or None if all is seen.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None


def packed_attention(
    query: Tensor,
    parts: Sequence[Packed],
    window: Window | None,
    scaling: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    step: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over packed tokens and a window, as if they were one sequence.

    Args:
        query: [pairs, R, D], fp16, bf16 or fp32; the rows of a pair are its G grouped heads times M positions, R = G * M.
            All rows see all packed tokens.
        parts: packed tokens of these pairs; may be empty, as may be the runs of some pairs.
        window: tokens at full precision, or None.
        scaling: factor of the logits, usually 1 / sqrt(D).
        softcap: if given, logits become softcap * tanh(logits / softcap) (Gemma 2).
        bias: fp32 [pairs, R], added to the logits of packed tokens, after the cap; or None.
        step: `plan(parts, pairs, device)`, which may be kept until lengths change. Needed on a GPU only. If None it is made
            here and the lengths are checked, for which the GPU has to catch up. With a step nothing is read back, and
            what is allocated depends on shapes only, so a call can be captured in a CUDA graph once it has run.

    Returns:
        (out fp32 [pairs, R, D], natural log-sum-exp of the logits fp32 [pairs, R]). A row that sees nothing gives 0 and -inf.

    Raises ValueError for shapes, dtypes or devices that do not fit and, on a GPU, a head_dim that is no multiple of 16.
    """
    _check(query, parts, window, bias)
    if query.is_cuda:
        return packed_attention_triton(query, parts, window, scaling, softcap, bias, step)
    return packed_attention_reference(query, parts, window, scaling, softcap, bias)


def packed_attention_reference(
    query: Tensor,
    parts: Sequence[Packed],
    window: Window | None,
    scaling: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`packed_attention` in plain torch: every part unpacked, attended to and merged."""
    outs = [torch.zeros(query.shape, device=query.device)]
    lses = [torch.full(query.shape[:2], -torch.inf, device=query.device)]
    if window is not None:
        out, lse = partial_attention(query, window.keys, window.values, _row_mask(window, query), scaling, softcap)
        outs.append(out)
        lses.append(lse)
    for part in parts:
        pairs = part.pairs.long()
        out, lse = _attend_part(query[pairs], part, scaling, softcap)
        if bias is not None:
            lse = lse + bias[pairs]
        for runs in _without_repeats(pairs):
            outs.append(torch.zeros_like(outs[0]).index_copy(0, pairs[runs], out[runs]))
            lses.append(torch.full_like(lses[0], -torch.inf).index_copy(0, pairs[runs], lse[runs]))
    return merge(outs, lses)


def _attend_part(query: Tensor, part: Packed, scaling: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Attention of query [P, R, D] to the P runs of a part."""
    keys, values = unpack_tokens_reference(part)
    padded_keys, present = pad(keys, part.lengths)
    padded_values, _ = pad(values, part.lengths)
    return partial_attention(query, padded_keys, padded_values, present[:, None], scaling, softcap)


def _row_mask(window: Window, query: Tensor) -> Tensor:
    """The window's mask for each query row: bool [pairs, R or 1, T]."""
    pairs, rows = query.shape[:2]
    if window.mask is None:
        return torch.ones(pairs, 1, window.keys.shape[1], dtype=torch.bool, device=query.device)
    sequences, positions, _ = window.mask.shape
    return window.mask.repeat_interleave(pairs // sequences, dim=0).repeat(1, rows // positions, 1)


def _without_repeats(pairs: Tensor) -> Iterator[Tensor]:
    """Indices of runs, in as many vectors as the most frequent pair has runs, no pair twice in one."""
    order = pairs.argsort(stable=True)
    counts = torch.unique_consecutive(pairs[order], return_counts=True)[1]
    occurrence = torch.empty_like(pairs)
    occurrence[order] = position_in_run(counts)
    for k in range(int(counts.max()) if counts.numel() else 0):
        yield (occurrence == k).nonzero()[:, 0]


def packed_attention_triton(
    query: Tensor,
    parts: Sequence[Packed],
    window: Window | None,
    scaling: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    step: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """`packed_attention` by the kernels: one launch a part, one for the window, one to merge."""
    from ib_kernels import decoding_triton, merge_triton, raw_attention_triton, rotation_triton

    pairs, rows, head_dim = query.shape
    _check_kernels(query, parts, window, bias)
    if step is None:
        _check_lengths(parts, pairs)
        step = plan(parts, pairs, query.device)
    _check_step(step, parts, pairs)
    partial = torch.empty(step.rotated.shape[0], rows, head_dim, device=query.device)
    partial_lse = torch.empty(step.rotated.shape[0], rows, device=query.device)
    for part, items in zip(parts, step.items, strict=True):
        if part.key_bits == RAW_BITS:
            keys, values = part.keys["words"], part.values["words"]
            raw_attention_triton.attend_items(query, keys, values, part.pairs, items, partial, partial_lse, scaling, softcap)
        elif is_rotated(part):
            rotated, shifts = rotation_triton.rotate_query(part, query)
            decoding_triton.attend(part, rotated, shifts, items, partial, partial_lse, scaling, softcap)
        else:
            decoding_triton.attend(part, query, query, items, partial, partial_lse, scaling, softcap)
    seen = window is not None and window.keys.shape[1] > 0
    if window is not None and seen:
        raw_attention_triton.attend_window(
            query, window.keys, window.values, window.mask, step.slots, partial, partial_lse, scaling, softcap
        )
    out = torch.empty(pairs, rows, head_dim, device=query.device)
    lse = torch.empty(pairs, rows, device=query.device)
    merge_triton.merge_slots(step, partial, partial_lse, bias, seen, out, lse)
    return out, lse


def _check(query: Tensor, parts: Sequence[Packed], window: Window | None, bias: Tensor | None) -> None:
    if query.ndim != 3:
        raise ValueError(f"query must be [pairs, R, D], got {list(query.shape)}")
    pairs, rows, head_dim = query.shape
    tensors = [tensor for part in parts for tensor in _tensors(part)]
    if any(part.head_dim != head_dim for part in parts):
        raise ValueError(f"packed tokens have head_dim {[part.head_dim for part in parts]}, but the query {head_dim}")
    if window is not None:
        tensors += [window.keys, window.values] + ([] if window.mask is None else [window.mask])
        _check_window(window, pairs, rows, head_dim)
    if bias is not None:
        tensors.append(bias)
        if bias.shape != (pairs, rows) or bias.dtype != torch.float32:
            raise ValueError(f"bias must be float32 [{pairs}, {rows}], got {bias.dtype} {list(bias.shape)}")
    if any(tensor.device != query.device for tensor in tensors):
        raise ValueError(f"the query is on {query.device}, but not all that it attends to: move them to one device")


def _check_window(window: Window, pairs: int, rows: int, head_dim: int) -> None:
    tokens = window.keys.shape[1]
    if window.keys.shape != (pairs, tokens, head_dim) or window.values.shape != window.keys.shape:
        raise ValueError(
            f"the window's keys {list(window.keys.shape)} and values {list(window.values.shape)} must both be "
            f"[{pairs}, T, {head_dim}]"
        )
    if window.mask is None:
        return
    sequences, positions, masked = window.mask.shape
    if window.mask.dtype != torch.bool or masked != tokens or pairs % sequences or rows % positions:
        raise ValueError(
            f"the window's mask must be bool [B or 1, M, {tokens}] with {pairs} pairs a multiple of B and {rows} query rows "
            f"a multiple of M, got {window.mask.dtype} {list(window.mask.shape)}"
        )


def _check_kernels(query: Tensor, parts: Sequence[Packed], window: Window | None, bias: Tensor | None) -> None:
    """What the kernels cannot do. Nothing is computed from it."""
    if query.dtype not in KERNEL_DTYPES:
        raise ValueError(f"the GPU kernels take a query of {list(KERNEL_DTYPES)}, got {query.dtype}")
    if query.shape[2] % 16 or query.shape[2] > MOST_CHANNELS:
        raise ValueError(f"the GPU kernels need a head_dim that is a multiple of 16 up to {MOST_CHANNELS}, got {query.shape[2]}")
    tensors = [query] if bias is None else [query, bias]
    if window is not None:
        tensors += [window.keys, window.values] + ([] if window.mask is None else [window.mask])
        if window.keys.dtype not in KERNEL_DTYPES or window.values.dtype not in KERNEL_DTYPES:
            raise ValueError(f"the GPU kernels take a window of {list(KERNEL_DTYPES)}, got {window.keys.dtype}")
    for part in parts:
        if (part.key_bits == RAW_BITS) != (part.value_bits == RAW_BITS):
            raise ValueError(
                f"the GPU kernels have no keys of {part.key_bits} with values of {part.value_bits} bits: "
                "pack both, or leave both at 16 bits"
            )
        _check_part(part)
        tensors += _tensors(part)
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("the GPU kernels need contiguous tensors: call .contiguous() on the query, window, bias and parts")


def _tensors(part: Packed) -> list[Tensor]:
    return [part.lengths, part.pairs, *part.keys.values(), *part.values.values()]


def _check_part(part: Packed) -> None:
    """The shapes and dtypes from which the kernels compute addresses."""
    tokens, runs, head_dim = part.keys["words"].shape[0], part.lengths.shape[0], part.head_dim
    if part.key_bits == RAW_BITS:
        metadata: dict[str, tuple[int, int]] = {}
        if any(side["words"].dtype not in KERNEL_DTYPES for side in (part.keys, part.values)):
            raise ValueError(f"the GPU kernels take tokens of {list(KERNEL_DTYPES)}, got {part.keys['words'].dtype}")
    elif is_rotated(part):
        metadata = {"keys scale": (tokens, 1), "keys centre": (runs, head_dim), "values scale": (tokens, 1)}
    else:
        of_keys, of_values = (part.keys["scale"].shape[0], head_dim), (tokens, -(-head_dim // GROUP_CHANNELS))
        metadata = {
            f"{side} {name}": shape for side, shape in (("keys", of_keys), ("values", of_values)) for name in ("scale", "minimum")
        }
    if part.values["words"].shape[0] != tokens:
        raise ValueError(f"there are {tokens} keys, but {part.values['words'].shape[0]} values")
    for name, shape in metadata.items():
        side, key = name.split()
        held = (part.keys if side == "keys" else part.values)[key]
        if held.shape != shape or held.dtype != torch.float16:
            raise ValueError(f"the {name} of packed tokens must be fp16 {list(shape)}, got {held.dtype} {list(held.shape)}")


def _check_lengths(parts: Sequence[Packed], pairs: int) -> None:
    for part in parts:
        check_pairs(part.pairs, pairs)
        tokens = part.keys["words"].shape[0]
        needed = int(part.lengths.sum())
        if needed > tokens or (part.lengths.numel() and int(part.lengths.min()) < 0):
            raise ValueError(f"lengths must not be negative and need {needed} tokens, but the part holds {tokens}")
        if part.format == "kivi" and part.key_bits != RAW_BITS:
            groups, held = int(group_counts(part.lengths).sum()), part.keys["scale"].shape[0]
            if groups > held:
                raise ValueError(f"lengths need {groups} groups of keys, but there are scales of {held}")


def _check_step(step: Plan, parts: Sequence[Packed], pairs: int) -> None:
    if len(step.items) != len(parts) or step.slots.shape[0] != pairs + 1:
        raise ValueError(
            f"the plan is for {len(step.items)} parts and {step.slots.shape[0] - 1} pairs, not for {len(parts)} and {pairs}: "
            "plan again after parts or the batch change"
        )
