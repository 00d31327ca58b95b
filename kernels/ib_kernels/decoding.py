"""Attention to everything that a layer of a compressed cache holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from ib_kernels import scheduling
from ib_kernels.attention import partial_attention
from ib_kernels.backends import Backend, backend_of, check_kernel
from ib_kernels.formats import get_format, get_kernels
from ib_kernels.formats.format import RAW_BITS, layout, row_count
from ib_kernels.packed import Packed, bases_of_runs, unpack_stored
from ib_kernels.ragged import check_pairs, pad
from ib_kernels.scheduling import Schedule
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
    schedule: Schedule | None = None,
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
        schedule: `schedule(parts, pairs, device)`, which may be kept until lengths change. For the kernels only. If None it is
            made here and the lengths are checked, for which the GPU has to catch up. With a schedule nothing is read back, and
            what is allocated depends on shapes only, so a call can be captured in a CUDA graph once it has run.
        backend: by default that of the device (see `backends`). A format without kernels runs in plain torch.

    Returns:
        (out fp32 [pairs, R, D], natural log-sum-exp of the logits fp32 [pairs, R]). A row that sees nothing gives 0 and -inf.

    Raises ValueError for shapes, dtypes or devices that do not fit and, if the kernels run, for what they do not take: a
    head_dim that is no multiple of 16 up to 256, tensors that are not contiguous, 16 bits on one side only.
    """
    _check(query, parts, window, bias)
    if backend_of(query.device, [part.form for part in parts], backend) == "triton":
        return packed_attention_triton(query, parts, window, scaling, softcap, bias, schedule)
    return packed_attention_reference(query, parts, window, scaling, softcap, bias)


def packed_attention_reference(
    query: Tensor, parts: Sequence[Packed], window: Window | None, scaling: float, softcap: float | None, bias: Tensor | None
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
    keys, values = unpack_stored(part)
    bases = bases_of_runs(part)
    if bases is not None:  # q . (k B) = (q B^T) . k, and there are fewer queries than keys
        query = query.float() @ bases.back.mT
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
    schedule: Schedule | None = None,
) -> tuple[Tensor, Tensor]:
    """`packed_attention` by the kernels: one launch a part, one for the window, one to merge.

    In a CUDA graph the window is a branch of its own: its few programs run beside the others.
    """
    from ib_kernels.decoding_triton import attend
    from ib_kernels.merge_triton import merge_slots
    from ib_kernels.raw_attention_triton import attend_raw

    pairs, rows, head_dim = query.shape
    _check_kernels(query, parts, window, bias)
    if schedule is None:
        _check_lengths(parts, pairs)
        capped = softcap is not None
        schedule = scheduling.schedule(parts, pairs, query.device, rows=rows, dtype=query.dtype, softcap=capped)
    _check_schedule(schedule, parts, query)
    scaling, softcap = float(scaling), None if softcap is None else float(softcap)  # an integer would be compiled for itself
    device, slots = query.device, schedule.rotated.shape[0]
    partial = torch.empty(slots, rows, head_dim, dtype=torch.float32, device=device)
    partial_lse = torch.empty(slots, rows, dtype=torch.float32, device=device)
    out = torch.empty(pairs, rows, head_dim, dtype=torch.float32, device=device)
    lse = torch.empty(pairs, rows, dtype=torch.float32, device=device)
    with torch.cuda.device_of(query):  # Triton launches on the current GPU
        seen = window is not None and window.keys.shape[1] > 0
        if window is not None and seen:
            with _branch(query) as branch:
                held, at, tokens = (window.keys, window.values), schedule.slots, window.keys.shape[1]
                attend_raw(query, *held, at, at, partial, partial_lse, scaling, softcap, window.mask, tokens)
        for part, items in zip(parts, schedule.items, strict=True):
            if part.key_bits == RAW_BITS:
                keys, values = part.keys["words"], part.values["words"]
                attend_raw(query, keys, values, part.pairs, items, partial, partial_lse, scaling, softcap)
            else:
                of_runs, shifts = get_kernels(part.format).load().queries(part.keys, part.pairs, query, part.bases)
                attend(part, of_runs, shifts, items, partial, partial_lse, scaling, softcap)
        if seen and branch is not None:
            torch.cuda.current_stream().wait_stream(branch)
        merge_slots(schedule, partial, partial_lse, bias, seen, out, lse)
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
        check_kernel(part.head_dim, *part.form)
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
        for name, shape in layout(get_format(part.format).keys, part.key_bits, part.head_dim).items():
            if shape.tokens_per_row > 1:
                rows, held = int(row_count(shape.tokens_per_row, part.lengths).sum()), part.keys[name].shape[0]
                if rows > held:
                    raise ValueError(f"lengths need {rows} groups of keys, but there is a {name} of {held}")


def _check_schedule(schedule: Schedule, parts: Sequence[Packed], query: Tensor) -> None:
    parts_of, pairs, device = len(schedule.items), schedule.slots.shape[0] - 1, schedule.slots.device
    if (parts_of, pairs, device) != (len(parts), query.shape[0], query.device):
        raise ValueError(
            f"the schedule is for {parts_of} parts and {pairs} pairs on {device}, not for {len(parts)} and {query.shape[0]} on "
            f"{query.device}: schedule again after parts or the batch change"
        )


def _read(query: Tensor, parts: Sequence[Packed], window: Window | None, bias: Tensor | None) -> list[Tensor]:
    """Every tensor that attention reads."""
    held = [query, *(tensor for part in parts for tensor in part.tensors)]
    if window is not None:
        held += [window.keys, window.values] + ([] if window.mask is None else [window.mask])
    return held if bias is None else [*held, bias]
