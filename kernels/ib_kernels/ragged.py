"""Ragged batches: rows [N, ...] that are P consecutive runs, run p of lengths[p] rows, with N = sum(lengths).

Reading a number that a GPU holds waits for all that the GPU has to do. The functions that take an unchecked `total`, the
sum of lengths that is known already, read none; the others read `lengths` once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def starts(lengths: Tensor) -> Tensor:
    """First row of every run: int64 [P]."""
    return lengths.cumsum(0, dtype=torch.int64) - lengths


def run_of_row(lengths: Tensor, total: int) -> Tensor:
    """The run that every row belongs to: int64 [total]."""
    return torch.repeat_interleave(lengths, output_size=total)


def position_in_run(lengths: Tensor, total: int) -> Tensor:
    """The position of every row within its run, from 0: int64 [total]."""
    return rows_from(torch.zeros_like(lengths), lengths, total)


def rows_from(first: Tensor, lengths: Tensor, total: int) -> Tensor:
    """Rows first[p] to first[p] + lengths[p] - 1, run after run: int64 [total]."""
    return (first - starts(lengths))[run_of_row(lengths, total)] + torch.arange(total, device=lengths.device)


def pad(flat: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Pad runs [N, ...] with zeros to ([P, T_max, ...], mask [P, T_max] bool, true where there is a row).

    Raises ValueError if `lengths` does not fit `flat`.
    """
    longest = max(check(flat, lengths), default=0)
    runs = lengths.shape[0]
    mask = torch.arange(longest, device=lengths.device) < lengths[:, None]  # [P, T_max]
    padded = flat.new_zeros(runs * longest, *flat.shape[1:])
    padded[rows_from(torch.arange(runs, device=lengths.device) * longest, lengths, flat.shape[0])] = flat
    return padded.view(runs, longest, *flat.shape[1:]), mask


def places(a_lengths: Tensor, a_total: int, b_lengths: Tensor, b_total: int) -> tuple[Tensor, Tensor]:
    """Where the rows of a and those of b are when they are interleaved: int64 [a_total], [b_total]."""
    first = starts(a_lengths + b_lengths)
    return rows_from(first, a_lengths, a_total), rows_from(first + a_lengths, b_lengths, b_total)


def place(a: Tensor, b: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
    """Rows of a and of b, each in its place."""
    rows = a.new_empty(a.shape[0] + b.shape[0], *a.shape[1:])
    rows[places[0]], rows[places[1]] = a, b
    return rows


def check(flat: Tensor, lengths: Tensor) -> list[int]:
    """The lengths. Raises ValueError unless they are an integer vector of counts that sums to the number of rows."""
    check_vector(lengths)
    counts: list[int] = lengths.tolist()
    check_counts(flat, counts)
    return counts


def check_vector(lengths: Tensor) -> None:
    """Raise ValueError unless `lengths` is an integer vector."""
    if lengths.ndim != 1 or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be an integer vector [P], got {lengths.dtype} {list(lengths.shape)}")


def check_counts(flat: Tensor, counts: list[int]) -> None:
    """Raise ValueError unless these are counts that sum to the number of rows."""
    if min(counts, default=0) < 0:
        raise ValueError("lengths must not be negative: pass the number of rows of every run")
    total = sum(counts)
    if total != flat.shape[0]:
        raise ValueError(f"lengths sum to {total}, but there are {flat.shape[0]} rows: pass all rows of all runs")


def check_pairs(pairs: Tensor, runs: int) -> list[int]:
    """The pairs. Raises ValueError unless they are an integer vector of indices in [0, runs)."""
    if pairs.ndim != 1 or pairs.is_floating_point() or pairs.dtype == torch.bool:
        raise ValueError(f"pairs must be an integer vector of run indices, got {pairs.dtype} {list(pairs.shape)}")
    chosen: list[int] = pairs.tolist()
    if chosen and not 0 <= min(chosen) <= max(chosen) < runs:
        raise ValueError(f"pairs must lie in [0, {runs}), the number of runs")
    return chosen
