"""Attention to everything that a layer of a compressed cache holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from ib_kernels.attention import partial_attention
from ib_kernels.backends import Backend, check_kernel, default_backend
from ib_kernels.kivi import group_counts
from ib_kernels.packed import Packed, unpack_tokens_reference
from ib_kernels.planning import Plan, is_rotated, plan
from ib_kernels.quantizer import RAW_BITS
from ib_kernels.ragged import check_pairs, pad
from torch import Tensor

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
    backend: Backend | None = None,
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
        step: `plan(parts, pairs, device)`, which may be kept until lengths change. For the kernels only. If None it is made here
            and the lengths are checked, for which the GPU has to catch up. With a step nothing is read back, and what is
            allocated depends on shapes only, so a call can be captured in a CUDA graph once it has run.
        backend: by default that of the device (see `backends`).

    Returns:
        (out fp32 [pairs, R, D], natural log-sum-exp of the logits fp32 [pairs, R]). A row that sees nothing gives 0 and -inf.

    Raises ValueError for shapes, dtypes or devices that do not fit and, if the kernels run, for what they do not take: a
    head_dim that is no multiple of 16 up to 256, tensors that are not contiguous, 16 bits on one side only.
    """
    _check(query, parts, window, bias)
    backend = default_backend(query.device) if backend is None else backend
    if backend == "triton":
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
    outs, lses, owners = [], [], []
    if window is not None:
        out, lse = partial_attention(query, window.keys, window.values, _row_mask(window, query), scaling, softcap)
        outs.append(out)
        lses.append(lse)
        owners.append(torch.arange(query.shape[0], device=query.device))
    for part in parts:
        pairs = part.pairs.long()
        out, lse = _attend_part(query[pairs], part, scaling, softcap)
        outs.append(out)
        lses.append(lse if bias is None else lse + bias[pairs])
        owners.append(pairs)
    return _merge_by_pair(outs, lses, owners, query)


def _attend_part(query: Tensor, part: Packed, scaling: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Attention of query [P, R, D] to the P runs of a part."""
    keys, values = unpack_tokens_reference(part)
    padded_keys, present = pad(keys, part.lengths)
    padded_values, _ = pad(values, part.lengths)
    return partial_attention(query, padded_keys, padded_values, present[:, None], scaling, softcap)


def _merge_by_pair(outs: list[Tensor], lses: list[Tensor], owners: list[Tensor], query: Tensor) -> tuple[Tensor, Tensor]:
    """Merge outs [S, R, D] with log-sum-exps [S, R], of the pairs `owners` [S], to one for each pair of the query."""
    merged = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    top = torch.full(query.shape[:2], -torch.inf, dtype=torch.float32, device=query.device)
    if not outs:
        return merged, top
    pairs, lse = torch.cat(owners), torch.cat(lses)
    top.scatter_reduce_(0, pairs[:, None].expand_as(lse), lse.detach(), "amax")
    top.masked_fill_(top == -torch.inf, 0.0)  # a row that sees nothing: all weights become 0, none NaN
    weights = torch.exp(lse - top[pairs])
    total = torch.zeros_like(top).index_add(0, pairs, weights)
    merged = merged.index_add(0, pairs, weights[..., None] * torch.cat(outs))
    return merged / total.masked_fill(total == 0, 1.0)[..., None], torch.log(total) + top


def _row_mask(window: Window, query: Tensor) -> Tensor:
    """The window's mask for each query row: bool [pairs, R or 1, T]."""
    pairs, rows = query.shape[:2]
    if window.mask is None:
        return torch.ones(pairs, 1, window.keys.shape[1], dtype=torch.bool, device=query.device)
    sequences, positions, _ = window.mask.shape
    return window.mask.repeat_interleave(pairs // sequences, dim=0).repeat(1, rows // positions, 1)


def packed_attention_triton(
    query: Tensor,
    parts: Sequence[Packed],
    window: Window | None,
    scaling: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    step: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """`packed_attention` by the kernels: one launch a part, one for the window, one to merge.

    In a CUDA graph the window is a branch of its own: its few programs run beside the others.
    """
    from ib_kernels import decoding_triton, merge_triton, raw_attention_triton, rotation_triton

    pairs, rows, head_dim = query.shape
    _check_kernels(query, parts, window, bias)
    if step is None:
        _check_lengths(parts, pairs)
        step = plan(parts, pairs, query.device, rows=rows, dtype=query.dtype, softcap=softcap is not None)
    _check_step(step, parts, query)
    scaling, softcap = float(scaling), None if softcap is None else float(softcap)  # an integer would be compiled for itself
    device, slots = query.device, step.rotated.shape[0]
    partial = torch.empty(slots, rows, head_dim, dtype=torch.float32, device=device)
    partial_lse = torch.empty(slots, rows, dtype=torch.float32, device=device)
    out = torch.empty(pairs, rows, head_dim, dtype=torch.float32, device=device)
    lse = torch.empty(pairs, rows, dtype=torch.float32, device=device)
    with torch.cuda.device_of(query):  # Triton launches on the current GPU
        seen = window is not None and window.keys.shape[1] > 0
        if window is not None and seen:
            with _branch(query) as branch:
                raw_attention_triton.attend_window(
                    query, window.keys, window.values, window.mask, step.slots, partial, partial_lse, scaling, softcap
                )
        for part, items in zip(parts, step.items, strict=True):
            if part.key_bits == RAW_BITS:
                keys, values = part.keys["words"], part.values["words"]
                raw_attention_triton.attend_items(query, keys, values, part.pairs, items, partial, partial_lse, scaling, softcap)
            elif is_rotated(part):
                rotated, shifts = rotation_triton.rotate_query(part, query)
                decoding_triton.attend(part, rotated, shifts, items, partial, partial_lse, scaling, softcap)
            else:
                decoding_triton.attend(part, query, query, items, partial, partial_lse, scaling, softcap)
        if seen and branch is not None:
            torch.cuda.current_stream().wait_stream(branch)
        merge_triton.merge_slots(step, partial, partial_lse, bias, seen, out, lse)
    return out, lse


@contextmanager
def _branch(query: Tensor) -> Iterator[torch.cuda.Stream | None]:
    """What is launched within is a branch of the CUDA graph that is being captured, until its stream is waited for."""
    if not (query.is_cuda and torch.cuda.is_current_stream_capturing()):
        yield None
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield stream


def _check(query: Tensor, parts: Sequence[Packed], window: Window | None, bias: Tensor | None) -> None:
    if query.ndim != 3:
        raise ValueError(f"query must be [pairs, R, D], got {list(query.shape)}")
    pairs, rows, head_dim = query.shape
    if any(part.head_dim != head_dim for part in parts):
        raise ValueError(f"packed tokens have head_dim {[part.head_dim for part in parts]}, but the query {head_dim}")
    if window is not None:
        _check_window(window, pairs, rows, head_dim)
    if bias is not None and (bias.shape != (pairs, rows) or bias.dtype != torch.float32):
        raise ValueError(f"bias must be float32 [{pairs}, {rows}], got {bias.dtype} {list(bias.shape)}")
    if any(tensor.device != query.device for tensor in _read(query, parts, window, bias)):
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
    held = [query] if window is None else [query, window.keys, window.values]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in held):
        raise ValueError("the GPU kernels have no gradients: call under torch.no_grad(), or pass backend='reference'")
    check_kernel(query.shape[2], "", RAW_BITS, RAW_BITS)
    for part in parts:
        check_kernel(part.head_dim, part.format, part.key_bits, part.value_bits)
    if window is not None and {window.keys.dtype, window.values.dtype} - set(KERNEL_DTYPES):
        raise ValueError(
            f"the GPU kernels take a window of {list(KERNEL_DTYPES)}, got {window.keys.dtype} and {window.values.dtype}"
        )
    if not all(tensor.is_contiguous() for tensor in _read(query, parts, window, bias)):
        raise ValueError("the GPU kernels need contiguous tensors: call .contiguous() on the query, window, bias and parts")


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


def _check_step(step: Plan, parts: Sequence[Packed], query: Tensor) -> None:
    if len(step.items) != len(parts) or step.slots.shape[0] != query.shape[0] + 1 or step.slots.device != query.device:
        raise ValueError(
            f"the plan is for {len(step.items)} parts and {step.slots.shape[0] - 1} pairs on {step.slots.device}, not for "
            f"{len(parts)} and {query.shape[0]} on {query.device}: plan again after parts or the batch change"
        )


def _read(query: Tensor, parts: Sequence[Packed], window: Window | None, bias: Tensor | None) -> list[Tensor]:
    """Every tensor that attention reads."""
    held = [query, *(tensor for part in parts for tensor in part.tensors)]
    if window is not None:
        held += [window.keys, window.values] + ([] if window.mask is None else [window.mask])
    return held if bias is None else [*held, bias]
