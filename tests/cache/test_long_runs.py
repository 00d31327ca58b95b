"""Long use of one cache: it keeps its answers at 16 bits, its bytes and its budget, and memory does not grow beyond them.

`PYTHONPATH=. python tests/cache/test_long_runs.py 200` holds chats of so many turns, and answers of 20 times the prompt.
"""

import resource
import sys
from random import Random

import torch
from tqdm import tqdm

from ib_analysis.cache.attention import cache_argument
from ib_analysis.cache.compressed import CompressedCache
from ib_analysis.cache.plan import RAW, HeadPlan, Recent, Tier
from ib_analysis.cache.spec import ByteLimit, CacheSpec
from ib_analysis.model.shape import cache_shape
from ib_analysis.scorers import SCORERS
from tests.cache.test_operations import Rounded, switched_llama

PROMPT, TIMES = 60, 20
PLANS = {
    "all at 16 bits": RAW,
    "a quarter at 4 bits": HeadPlan("rotated", (Tier(1 / 4, 4, 4),)),
    "two tiers": HeadPlan("kivi", (Tier(1 / 8, 8, 4), Tier(1 / 4, 4, 2))),
}


class Run:
    """A cache, beside one of 16 bits that holds all; the limit is what the plans take at the prompt's length, no more."""

    def __init__(self, model, plan, seed):
        self.model, self.rng = model, Random(seed)
        spec = CacheSpec(cache_shape(model.config), Recent(2, 6, 4, quantized=8), SCORERS["value_aware"])
        self.plans, self.keeps_all = spec.uniform(plan), plan == RAW
        if self.keeps_all:
            spec = CacheSpec(spec.shape, Recent(2, 6, 4), spec.scorer)
        self.cache, self.full = CompressedCache(spec, self.plans), Rounded(config=model.config)
        fullest = spec.recent.before_leaving(PROMPT)
        self.limit = ByteLimit(spec, spec.nbytes(self.plans, fullest) / (spec.shape.bytes_per_token * fullest), PROMPT)
        self.minimum = PROMPT if self.keeps_all else self.limit.minimum_context(self.plans)

    def read(self, tokens):
        """A block of random tokens."""
        ids = torch.tensor([[self.rng.randrange(3, 64) for _ in range(tokens)]])
        found = self.model(ids, **cache_argument(self.model, self.cache)).logits
        length = self.cache.get_seq_length()
        if self.keeps_all:
            expected = self.model(ids, **cache_argument(self.model, self.full)).logits
            assert (found - expected).abs().max() < 0.01 * expected.std() + 1e-3, f"at {length} tokens"
        assert bool(found.isfinite().all())
        spec = self.limit.spec
        assert self.cache.nbytes == spec.nbytes(self.plans, length), f"at {length} tokens"
        if length >= self.minimum and not self.keeps_all:
            assert self.cache.nbytes <= self.limit.share * spec.shape.bytes_per_token * length, f"at {length} tokens"


@torch.no_grad()
def chat(model, plan, turns, show=False):
    """A message of up to 20 tokens and an answer of up to 6, so many times."""
    run = Run(model, plan, seed=turns)
    run.read(PROMPT)
    for _ in tqdm(range(turns), disable=not show):
        run.read(run.rng.randint(1, 20))
        for _ in range(run.rng.randint(1, 6)):
            run.read(1)
    return run.cache


@torch.no_grad()
def long_answer(model, plan, times, show=False):
    run = Run(model, plan, seed=times)
    run.read(PROMPT)
    for _ in tqdm(range(times * PROMPT), disable=not show):
        run.read(1)
    return run.cache


def test_a_chat_keeps_its_answers_bytes_and_budget():
    model = switched_llama()
    for plan in PLANS.values():
        assert chat(model, plan, 12).get_seq_length() > 3 * PROMPT


def test_a_long_answer_keeps_its_bytes_and_budget():
    model = switched_llama()
    for plan in PLANS.values():
        assert long_answer(model, plan, 2).get_seq_length() == 3 * PROMPT


if __name__ == "__main__":
    tried = switched_llama()
    for name, tried_plan in PLANS.items():
        for kind, held in (
            ("chat", chat(tried, tried_plan, int(sys.argv[1]), show=True)),
            ("answer", long_answer(tried, tried_plan, TIMES, show=True)),
        ):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(f"{name}, {kind}: {held.get_seq_length()} tokens in {held.nbytes} bytes; peak memory {peak} MB", flush=True)
