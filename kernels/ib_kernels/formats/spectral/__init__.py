"""Keys in a basis that sorts channels by what they matter to the queries, with more bits for the first; values as rotated."""

from ib_kernels.formats.format import Format, Kernels
from ib_kernels.formats.rotated import ROTATED
from ib_kernels.formats.spectral.reference import SpectralKeys

KERNELS = Kernels("ib_kernels.formats.spectral.kernels", scales="quarters", rotates=True, packs=("values",))
SPECTRAL = Format("spectral", SpectralKeys(), ROTATED.values, KERNELS, turns_keys=True, channels=4)
