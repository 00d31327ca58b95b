"""Which tokens matter? A new scorer is one file and one row in SCORERS."""

from ib_analysis.scorers.scorer import Scorer
from ib_analysis.scorers.snapkv import snapkv
from ib_analysis.scorers.streaming_llm import streaming_llm
from ib_analysis.scorers.value_aware import value_aware

SCORERS: dict[str, Scorer] = {"value_aware": value_aware, "snapkv": snapkv, "streaming_llm": streaming_llm}

__all__ = ["SCORERS", "Scorer"]
