"""Storage formats of a compressed cache. A new format is one file and one row in FORMATS; it needs no kernels of its own."""

from ib_kernels.kivi import KIVI
from ib_kernels.quantizer import Format
from ib_kernels.rotated import ROTATED

FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (KIVI, ROTATED)}


def get_format(name: str) -> Format:
    """The format of that name. Raises ValueError if there is none."""
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}: use one of {sorted(FORMATS)}")
    return FORMATS[name]
