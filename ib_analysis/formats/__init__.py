"""Storage formats of a compressed cache, and the exact bytes that they take. The formats themselves are in `ib_kernels`."""

from ib_kernels.formats import FORMATS, get_format
from ib_kernels.quantizer import RAW_BITS, Format

__all__ = ["FORMATS", "RAW_BITS", "Format", "get_format"]
