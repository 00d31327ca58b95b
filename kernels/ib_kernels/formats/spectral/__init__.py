"""Keys in a basis that sorts channels by what they matter to the queries, with more bits for the first; values as rotated."""

from ib_kernels.formats.format import Format
from ib_kernels.formats.rotated import ROTATED
from ib_kernels.formats.spectral.reference import SpectralKeys

SPECTRAL = Format("spectral", SpectralKeys(), ROTATED.values, turns_keys=True, channels=4)
