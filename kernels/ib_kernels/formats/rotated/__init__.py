"""Rotated keys and values, one scale a token: a Hadamard matrix makes channels alike and nearly Gaussian."""

from ib_kernels.formats.format import Format, Kernels
from ib_kernels.formats.rotated.reference import RotatedKeys, RotatedValues

KERNELS = Kernels("ib_kernels.formats.rotated.kernels", scales="tokens", rotates=True)
ROTATED = Format("rotated", RotatedKeys(), RotatedValues(), KERNELS)
