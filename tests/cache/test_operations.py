"""Random sequences of everything that can be done to a cache: what holds all tokens at 16 bits answers as DynamicCache does.

`python tests/cache/test_operations.py 10000` tries so many.
"""

import sys
from random import Random

import torch
from tqdm import tqdm
from transformers import DynamicCache

from ib_analysis.cache.attention import cache_argument, use_attention
from ib_analysis.cache.compressed import CompressedCache
from ib_analysis.cache.plan import RAW, Recent
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.model.shape import cache_shape
from ib_analysis.scorers import SCORERS
from tests.conftest import random_llama

MOST_SEQUENCES = 4


def switched_llama():
    model = random_llama()
    use_attention(model)
    return model


class Rounded(DynamicCache):
    """A DynamicCache of 16 bits, as a compressed cache is: but its first block is answered before it is rounded."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        first = self.get_seq_length(layer_idx) == 0
        rounded = (x.half().float() for x in (key_states, value_states))
        held = super().update(*rounded, layer_idx, *args, **kwargs)
        return (key_states, value_states) if first else held


class Pair:
    """A compressed cache and a DynamicCache that are treated alike; `mask` [B, T] says which positions are no padding."""

    def __init__(self, model, rng):
        self.model, self.rng = model, rng
        recent = Recent(rng.randint(0, 3), rng.randint(0, 6), rng.randint(1, 5))
        self.spec = CacheSpec(cache_shape(model.config), recent, SCORERS["value_aware"])
        self.cache = CompressedCache(self.spec, self.spec.uniform(RAW))
        self.reset()

    def reset(self):
        self.cache.reset()
        self.full = Rounded(config=self.model.config)
        self.mask = torch.ones(self.rng.randint(1, 3), 0, dtype=torch.int64)
        self.cropped = False

    def read(self):
        """A block, of a few tokens mostly; sometimes padded on the left, each sequence by another number."""
        length = self.rng.choice([1, 1, 1, 2, 3, 5, 8, 20])
        pads = [self.rng.randrange(length) if self.rng.random() < 0.3 else 0 for _ in self.mask]
        ids = torch.tensor([[self.rng.randrange(50) for _ in range(length)] for _ in self.mask])
        new = torch.tensor([[0] * pad + [1] * (length - pad) for pad in pads])
        self.mask = torch.cat([self.mask, new], 1)
        inputs = {"input_ids": ids, "position_ids": (self.mask.cumsum(1) - 1).clamp(min=0)[:, -length:]}
        if not bool(self.mask.all()):
            inputs["attention_mask"] = self.mask
        expected, found = (self.model(**inputs, **cache_argument(self.model, cache)).logits for cache in (self.full, self.cache))
        there = new.bool()
        assert (found - expected)[there].abs().max() < 0.01 * expected[there].std() + 1e-3

    def crop(self):
        count = self.rng.randint(1, 4)
        if count >= self.mask.shape[1]:
            return
        before = self.cache.nbytes
        try:
            self.cache.crop(-count)
        except ValueError:  # compressed already: then nothing may have changed
            assert self.cache.nbytes == before
            return
        self.full.crop(-count)
        self.mask = self.mask[:, :-count]
        self.cropped = True

    def reorder(self):
        order = torch.tensor([self.rng.randrange(len(self.mask)) for _ in self.mask])
        self.cache.reorder_cache(order)
        self.full.reorder_cache(order)
        self.mask = self.mask[order]

    def select(self):
        """Fewer or more sequences, named by numbers."""
        count = self.rng.randint(1, MOST_SEQUENCES)
        indices = torch.tensor([self.rng.randrange(len(self.mask)) for _ in range(count)])
        self.cache.batch_select_indices(indices)
        self.full.batch_select_indices(indices)
        self.mask = self.mask[indices]

    def repeat(self):
        if 2 * len(self.mask) > MOST_SEQUENCES:
            return
        self.cache.batch_repeat_interleave(2)
        self.full.batch_repeat_interleave(2)
        self.mask = self.mask.repeat_interleave(2, 0)

    def move(self):
        for layer in self.cache.layers:
            layer.offload()
            layer.prefetch()

    def refuse(self):
        """What is wrong is refused before anything changes."""
        before = self.cache.nbytes
        wrong = len(self.mask) + 1
        try:
            self.model(torch.zeros(wrong, 1, dtype=torch.int64), **cache_argument(self.model, self.cache))
        except ValueError:
            assert self.cache.nbytes == before
        else:
            raise AssertionError("a batch of another size was taken")


@torch.no_grad()
def check(model, seed):
    rng = Random(seed)
    pair = Pair(model, rng)
    pair.read()
    for _ in range(rng.randint(1, 12)):
        name = rng.choice(["read", "read", "read", "read", "crop", "reorder", "select", "repeat", "move", "refuse", "reset"])
        if name == "reset":
            pair.reset()
            pair.read()
        else:
            getattr(pair, name)()
        tokens = len(pair.mask), pair.mask.shape[1]
        assert pair.cache.get_seq_length() == tokens[1]
        if bool(pair.mask.all()) and not pair.cropped:  # what is compressed stays so
            assert pair.cache.nbytes == tokens[0] * pair.spec.nbytes(pair.spec.uniform(RAW), tokens[1])


def test_a_cache_that_keeps_all_answers_as_the_full_cache():
    model = switched_llama()
    for seed in (*range(100), 101):  # of which the last once kept a mask that hides nothing
        check(model, seed)


if __name__ == "__main__":
    tried = switched_llama()
    for number in tqdm(range(int(sys.argv[1]))):
        check(tried, number)
