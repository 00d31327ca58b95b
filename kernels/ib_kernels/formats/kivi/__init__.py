"""KIVI (Liu et al. 2024, arXiv 2402.02750): keys per channel in groups of tokens, values per token in channel groups."""

from ib_kernels.formats.format import Format, Kernels
from ib_kernels.formats.kivi.reference import KiviKeys, KiviValues

KIVI = Format("kivi", KiviKeys(), KiviValues(), Kernels("ib_kernels.formats.kivi.kernels", scales="groups", rotates=False))
