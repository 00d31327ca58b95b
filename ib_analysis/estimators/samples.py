"""Checked samples of a pair of variables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ib_analysis.errors import EstimatorError

Array: TypeAlias = Tensor | NDArray[np.generic]

EXTREME_EXPONENT = 200  # float64 ends at 2^1024, and fourth powers are taken
MAX_EXPONENT = 1000


@dataclass(frozen=True, eq=False)
class Samples:
    """x [..., N, dx] and y [..., N, dy] float64 on one device, documents [N] numbered from 0."""

    x: Tensor
    y: Tensor
    documents: NDArray[np.int64]

    @property
    def count(self) -> int:
        return self.x.shape[-2]

    @property
    def documents_count(self) -> int:
        return int(self.documents.max()) + 1

    @property
    def dim_x(self) -> int:
        return self.x.shape[-1]

    @property
    def dim_y(self) -> int:
        return self.y.shape[-1]


def check_samples(x: Array, y: Array, documents: Array | None) -> Samples:
    """Samples of continuous variables, at a scale whose squares neither vanish nor overflow.

    Raises EstimatorError if they are not: wrong shape or dtype, NaN, constant.
    """
    first, second = as_floats("x", x), as_floats("y", y)
    check_pairs(first, second)
    numbers = check_documents(documents, first.shape[-2])
    return Samples(_varying("x", first), _varying("y", second.to(first.device)), numbers)


def as_floats(name: str, values: Array) -> Tensor:
    """Finite float64 [..., N, d] of floats. Raises EstimatorError otherwise."""
    tensor = as_tensor(name, values)
    if not tensor.is_floating_point():
        raise EstimatorError(f"{name} must hold floats: pass the values that codes stand for, or use CodeEntropy for codes")
    return as_numbers(name, tensor)


def as_numbers(name: str, values: Array) -> Tensor:
    """Finite float64 [..., N, d] of floats or of integers. Raises EstimatorError otherwise."""
    tensor = as_tensor(name, values)
    if tensor.ndim < 2:
        raise EstimatorError(f"{name} must have shape [..., N, d], got {list(tensor.shape)}: pass scalars as {name}[:, None]")
    numbers = tensor.detach().to(torch.float64)
    if numbers.numel() > 0 and not all(extreme.isfinite() for extreme in numbers.aminmax()):  # faster than looking at each
        bad = (~torch.isfinite(numbers)).nonzero()[0].tolist()
        raise EstimatorError(f"{name} holds NaN or infinity, first at index {bad}")
    return numbers


def as_tensor(name: str, values: Array) -> Tensor:
    """A tensor of real numbers: tensors as they are, arrays of any byte order, strides or precision, and nested lists.

    Raises EstimatorError for anything else.
    """
    if isinstance(values, Tensor):
        if values.is_complex():
            raise EstimatorError(f"{name} holds complex numbers: pass real and imaginary parts as columns")
        return values
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise EstimatorError(f"{name} is no array: {error}") from error
    if array.dtype.kind not in "fiub":
        raise EstimatorError(f"{name} has dtype {array.dtype}: pass an array of real numbers, as {name}.astype(float)")
    dtype = np.float64 if array.dtype.kind == "f" else array.dtype.newbyteorder("=")
    return torch.as_tensor(np.array(array, dtype=dtype, order="C"))


def check_pairs(x: Tensor, y: Tensor, least: int = 2) -> None:
    """Raises EstimatorError unless x [..., N, dx] and y [..., N, dy] are samples of the same N >= least pairs."""
    if x.shape[:-1] != y.shape[:-1]:
        raise EstimatorError(f"x {list(x.shape)} and y {list(y.shape)} must agree in all but their last dimension")
    if 0 in (*x.shape, *y.shape):
        raise EstimatorError(f"x {list(x.shape)} and y {list(y.shape)} must not be empty")
    if x.shape[-2] < least:
        raise EstimatorError(f"one sample says nothing about information: pass at least {least}")


def check_documents(documents: Array | None, count: int) -> NDArray[np.int64]:
    """Documents [N] numbered from 0; each sample its own where none are given."""
    if documents is None:
        return np.arange(count)
    names = documents.cpu().numpy() if isinstance(documents, Tensor) else np.asarray(documents)
    if names.shape != (count,):
        raise EstimatorError(f"documents must name the document of each of the {count} samples, got shape {list(names.shape)}")
    numbers = np.unique(names, return_inverse=True)[1].astype(np.int64)
    if numbers.max() == 0:
        raise EstimatorError("all samples come from one document: an interval needs at least two")
    return numbers


def standardized(values: Tensor) -> Tensor:
    """Values [..., N, d] with mean 0 and variance 1 in each column."""
    centred = values - values.mean(-2, keepdim=True)
    return centred / centred.square().mean(-2, keepdim=True).sqrt()


def _varying(name: str, values: Tensor) -> Tensor:
    """Values [..., N, d], columns of extreme scale multiplied by a power of two: exact, and no information changes.

    Raises EstimatorError if a column is constant.
    """
    lowest, highest = values.amin(-2, keepdim=True), values.amax(-2, keepdim=True)  # [..., 1, d]
    constant = (lowest == highest)[..., 0, :]
    if constant.any():
        *head, column = constant.nonzero()[0].tolist()
        where = f" of head {head}" if head else ""
        raise EstimatorError(f"column {column}{where} of {name} is constant: drop it, it carries no information")
    exponent = torch.frexp(highest.maximum(-lowest)).exponent.double()
    extreme = exponent.abs() > EXTREME_EXPONENT
    factor = (-exponent).clamp(max=MAX_EXPONENT).exp2()
    return values * factor.where(extreme, 1) if extreme.any() else values
