"""Coordinates that keys are stored in by formats that ask for them: one matrix for each KV head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Bases(NamedTuple):
    """Matrices of several heads, fp32 [H, D, D] each: rows times `into` are coordinates, rows of these times `back` the keys."""

    into: Tensor
    back: Tensor

    def of(self, heads: Tensor) -> Bases:
        """Those of the heads int64 [P], which may repeat."""
        return Bases(*(matrices[heads.to(matrices.device)] for matrices in self))

    def to(self, device: torch.device | str) -> Bases:
        """The same on a device."""
        return Bases(*(matrices.to(device) for matrices in self))


def turn(x: Tensor, lengths: Tensor, matrices: Tensor) -> Tensor:
    """Rows x [N, D] of P runs, those of each run times its matrix of [P, D, D]: fp32 [N, D].

    Computed in float64: the order of a sum depends on how many rows there are, and must not show in codes.
    """
    runs = zip(x.split(lengths.tolist()), matrices)
    turned = [(rows.double() @ matrix.double()).float() for rows, matrix in runs if len(rows)]
    return torch.cat(turned) if turned else x.float()
