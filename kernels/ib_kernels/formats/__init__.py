"""Storage formats of a compressed cache. A new format is one folder and one row in FORMATS; it needs no kernels of its own."""

from ib_kernels.formats.format import Format, Kernels
from ib_kernels.formats.kivi import KIVI
from ib_kernels.formats.rotated import ROTATED
from ib_kernels.formats.spectral import SPECTRAL

FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (KIVI, ROTATED, SPECTRAL)}


def get_format(name: str) -> Format:
    """The format of that name. Raises ValueError if there is none."""
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}: use one of {sorted(FORMATS)}")
    return FORMATS[name]


def get_kernels(name: str) -> Kernels:
    """The kernels of that format. Raises ValueError if it has none."""
    kernels = get_format(name).kernels
    if kernels is None:
        raise ValueError(f"the format {name!r} has no GPU kernels: pass backend='reference'")
    return kernels
