"""What grows with layers times heads, at 126 x 8: a model of 405B parameters."""

import resource
from dataclasses import replace
from random import Random

import pytest
import torch

import ib_analysis as ib
from ib_analysis.cache.plan import Recent
from ib_analysis.cache.spec import ByteLimit, CacheSpec
from ib_analysis.model.shape import CacheShape, LayerShape
from ib_analysis.policies import POLICIES
from ib_analysis.scorers import SCORERS
from ib_analysis.search.candidates import head_options
from ib_analysis.search.optimize import full_allocation
from ib_analysis.search.profile import Profile

LAYERS, HEADS, LENGTH = 126, 8, 8192
MEGABYTES = 300
SPEC = CacheSpec(
    CacheShape((LayerShape(HEADS, 128),) * LAYERS), replace(Recent.within(1 / 8, LENGTH), quantized=16), SCORERS["value_aware"]
)
OPTIONS = tuple(head_options(["kivi", "rotated"]))


@pytest.fixture
def allocation(embedded):
    rng = Random(0)
    plans = tuple(tuple(rng.choice(OPTIONS) for _ in range(HEADS)) for _ in range(LAYERS))
    made = full_allocation(embedded[0], SPEC.scorer)
    return replace(made, spec=SPEC, plans=plans, context_length=LENGTH, budget_share=0.9)


def test_an_allocation_of_a_thousand_heads(allocation):
    again = ib.Allocation.from_json(allocation.to_json())
    assert again == allocation and str(again) == str(allocation)
    heads = allocation.table()[["layer", "head"]].drop_duplicates()
    assert len(heads) == LAYERS * HEADS
    cache = ib.CompressedCache(SPEC, allocation.plans)
    assert len(cache.layers) == LAYERS and cache.nbytes == 0


def test_bytes_of_many_heads_are_the_sum_over_heads(allocation):
    """Counted by kinds, they are those that one head after the other has."""
    tokens = SPEC.recent.compressible(LENGTH)
    packed = sum(plan.nbytes(tokens, 128) for row in allocation.plans for plan in row)
    mixed = (None, *allocation.plans[1:])
    assert allocation.nbytes(LENGTH) == packed + SPEC.recent_bytes(LENGTH)
    without = sum(plan.nbytes(tokens, 128) for plan in allocation.plans[0]) + SPEC.recent_bytes(LENGTH) // LAYERS
    assert SPEC.nbytes(mixed, LENGTH) == allocation.nbytes(LENGTH) - without + LENGTH * SPEC.shape.layers[0].bytes_per_token
    same = (allocation.plans[0],) * LAYERS
    assert SPEC.nbytes(same, LENGTH) == SPEC.nbytes(tuple((*row,) for row in same), LENGTH)


def test_a_figure_of_any_model_fits_a_page(allocation):
    assert max(allocation.plot().get_size_inches()) < 11


def test_a_profile_of_a_thousand_heads_is_saved_and_solved_in_little_memory(tmp_path):
    """Beside the table itself."""
    prices = (torch.rand(8, LAYERS * HEADS, len(OPTIONS)) ** 4).numpy()
    profile = Profile.unmeasured(
        prices, model="x", spec=SPEC, context_length=LENGTH, prompts=8, settings={"weights": "w"}, options=OPTIONS
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    profile.save(tmp_path / "profile")
    found = Profile.load(tmp_path / "profile")
    assert (found.prompt_prices == prices).all()
    limit = found.limit(1 / 8)
    solution, _ = found.solve_at_all_lengths(limit, found.solve)
    assert limit.excess(found.plans(solution.choice)) == 0
    assert all(limit.excess(cell.plans) == 0 for cell in POLICIES["uniform"](SPEC, ByteLimit(SPEC, 1 / 8, LENGTH)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES * 1024
