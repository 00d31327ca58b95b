"""Storage formats of a compressed cache. A new format is one file and one row in FORMATS."""

from ib_analysis.formats.format import Format
from ib_analysis.formats.kivi import KIVI
from ib_analysis.formats.rotated import ROTATED

FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (KIVI, ROTATED)}

__all__ = ["FORMATS", "Format"]
