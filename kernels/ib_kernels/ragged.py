"""Ragged batches: rows [N, ...] that are P consecutive runs, run p of lengths[p] rows, with N = sum(lengths)."""

from __future__ import annotations

import torch
from torch import Tensor


def starts(lengths: Tensor) -> Tensor:
    """First row of every run: int64 [P]."""
    return lengths.cumsum(0, dtype=torch.int64) - lengths


def run_of_row(lengths: Tensor) -> Tensor:
    """The run that every row belongs to: int64 [N]."""
    return torch.repeat_interleave(lengths)


def position_in_run(lengths: Tensor) -> Tensor:
    """The position of every row within its run, from 0: int64 [N]."""
    run = run_of_row(lengths)
    return torch.arange(run.shape[0], device=lengths.device) - starts(lengths)[run]


def pad(flat: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Pad runs [N, ...] with zeros to ([P, T_max, ...], mask [P, T_max] bool, true where there is a row).

    Raises ValueError if `lengths` does not fit `flat`.
    """
    check(flat, lengths)
    longest = int(lengths.max()) if lengths.numel() else 0
    mask = torch.arange(longest, device=lengths.device) < lengths[:, None]  # [P, T_max]
    padded = flat.new_zeros(lengths.shape[0], longest, *flat.shape[1:])
    padded[mask] = flat
    return padded, mask


def interleave(a: Tensor, a_lengths: Tensor, b: Tensor, b_lengths: Tensor) -> Tensor:
    """Append run by run: rows [N_a + N_b, ...] of runs a_p followed by b_p.

    Raises ValueError if the lengths do not fit the rows or each other.
    """
    check(a, a_lengths)
    check(b, b_lengths)
    if a_lengths.shape != b_lengths.shape:
        raise ValueError(f"cannot interleave {a_lengths.shape[0]} runs with {b_lengths.shape[0]}: pass as many of each")
    first = starts(a_lengths + b_lengths)  # [P]
    rows = a.new_empty(a.shape[0] + b.shape[0], *a.shape[1:])
    rows[first[run_of_row(a_lengths)] + position_in_run(a_lengths)] = a
    rows[(first + a_lengths)[run_of_row(b_lengths)] + position_in_run(b_lengths)] = b
    return rows


def split(flat: Tensor, lengths: Tensor, head_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Cut every run after its first head_lengths[p] rows: (heads, tails), the inverse of `interleave`.

    Raises ValueError if the lengths do not fit the rows.
    """
    check(flat, lengths)
    if head_lengths.shape != lengths.shape or bool(((head_lengths < 0) | (head_lengths > lengths)).any()):
        raise ValueError("head_lengths must hold one number of rows for each run, from 0 to the length of the run")
    in_head = position_in_run(lengths) < head_lengths[run_of_row(lengths)]  # [N]
    return flat[in_head], flat[~in_head]


def select(flat: Tensor, lengths: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The runs that the index tensor `pairs` names, in its order, repeats allowed: (rows, lengths).

    Raises ValueError if `lengths` does not fit `flat`, or if `pairs` is not a vector of run indices.
    """
    check(flat, lengths)
    check_pairs(pairs, lengths.shape[0])
    selected_lengths = lengths[pairs]
    run = pairs[run_of_row(selected_lengths)]  # [N_selected]
    return flat[starts(lengths)[run] + position_in_run(selected_lengths)], selected_lengths


def check(flat: Tensor, lengths: Tensor) -> None:
    """Raise ValueError unless `lengths` is an integer vector of counts that sums to the number of rows."""
    if lengths.ndim != 1 or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be an integer vector [P], got {lengths.dtype} {list(lengths.shape)}")
    if lengths.numel() and int(lengths.min()) < 0:
        raise ValueError("lengths must not be negative: pass the number of rows of every run")
    total = int(lengths.sum())
    if total != flat.shape[0]:
        raise ValueError(f"lengths sum to {total}, but there are {flat.shape[0]} rows: pass all rows of all runs")


def check_pairs(pairs: Tensor, runs: int) -> None:
    """Raise ValueError unless `pairs` is an integer vector of indices in [0, runs)."""
    if pairs.ndim != 1 or pairs.is_floating_point() or pairs.dtype == torch.bool:
        raise ValueError(f"pairs must be an integer vector of run indices, got {pairs.dtype} {list(pairs.shape)}")
    if pairs.numel() and (int(pairs.min()) < 0 or int(pairs.max()) >= runs):
        raise ValueError(f"pairs must lie in [0, {runs}), the number of runs")
