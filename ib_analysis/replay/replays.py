"""Many examples, ready to be replayed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedModel

from ib_analysis.cache.attention import borrowed
from ib_analysis.cache.plan import PlansToTry
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.model.devices import input_device
from ib_analysis.replay.examples import Example
from ib_analysis.replay.parallel import give_back_freed, in_order, prompts_at_once
from ib_analysis.replay.replay import Replay

Result = TypeVar("Result")

KEPT_BYTES = 2**30  # prefilled contexts are kept up to this many bytes, and computed again beyond


class Replays:
    """Examples ready to be replayed. Their contexts are kept while memory lasts."""

    def __init__(self, model: PreTrainedModel, spec: CacheSpec, examples: Sequence[Example]) -> None:
        self.model, self.spec, self.examples = model, spec, examples
        self.at_once = prompts_at_once(model, input_device(model))
        self.check: Callable[[], None] = lambda: None  # called after each example; it may raise
        self._kept: dict[int, Replay] = {}
        self._kept_bytes = 0

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Replay]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, number: int) -> Replay:
        replay = self._kept.get(number)
        if replay is None:
            replay = Replay(self.model, self.spec, self.examples[number])
            if self._kept_bytes + replay.nbytes <= KEPT_BYTES:
                self._kept[number] = replay
                self._kept_bytes += replay.nbytes
        return replay

    def each(self, function: Callable[[int], Result], numbers: Sequence[int], show: str = "") -> Generator[Result, None, None]:
        """function(number) of each of these examples, in order, several at a time; `show` names a progress bar."""
        # Borrowed here, because threads share the model; closed, because they must have ended before it is given back.
        found = in_order(function, numbers, self.at_once)
        with borrowed(self.model), closing(found) as results:
            for result in tqdm(results, desc=show, total=len(numbers), leave=False) if show else results:
                if input_device(self.model).type == "cpu":
                    give_back_freed()
                yield result
                self.check()

    @property
    def lengths(self) -> list[int]:
        """Tokens of each context, that is of what is read before the cache is compressed."""
        return [len(example.prefill) for example in self.examples]

    @cached_property
    def ends(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(KL in bits per predicted token of evicting all that can be, accuracy of the full cache), [examples] each."""
        kl_bits, accuracy = self.measure([self.spec.null_plans, self.spec.full_plans])
        return kl_bits[:, 0], accuracy[:, 1]

    def measure(
        self, tried: Sequence[PlansToTry], show: str = "", numbers: Sequence[int] | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(KL in bits per predicted token, accuracy), [examples, A] each; `show` names a progress bar.

        `numbers` are the examples to measure, by default all.
        """
        numbers = range(len(self)) if numbers is None else numbers
        rows = list(self.each(lambda number: self[number].measure(tried), numbers, show))
        return (
            torch.stack([kl_bits for kl_bits, _ in rows]).cpu().numpy(),
            torch.stack([accuracy for _, accuracy in rows]).cpu().numpy(),
        )
