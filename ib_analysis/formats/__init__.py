"""Storage formats of a compressed cache, and the exact bytes that they take. The formats themselves are in `ib_kernels`."""

from ib_kernels.formats import FORMATS
from ib_kernels.quantizer import Format

__all__ = ["FORMATS", "Format"]
