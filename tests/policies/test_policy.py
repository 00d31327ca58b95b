"""Every policy keeps to its limit and labels its cells; what shows cells reads the label, uniform or not."""

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ib_analysis.cache.plan import HeadPlan, Plans, Recent, Tier
from ib_analysis.cache.spec import ByteLimit, CacheSpec
from ib_analysis.experiments.plane import _cells
from ib_analysis.model.shape import CacheShape, LayerShape
from ib_analysis.policies import POLICIES, Cell
from ib_analysis.scorers import SCORERS
from ib_analysis.search.allocation import Allocation

SHAPE = CacheShape((LayerShape(2, 64), LayerShape(2, 64, sliding_window=16), LayerShape(1, 32), LayerShape(2, 64)))
SPEC = CacheSpec(SHAPE, Recent(2, 6, 2), SCORERS["value_aware"])
LENGTH = 128
RECENTS = st.builds(Recent, st.integers(0, 4), st.integers(1, 12), st.integers(1, 6))


def pyramid(spec, limit):
    """More tokens in lower layers, at 4 bits (as PyramidKV, arXiv 2406.02069): the widest that fits."""
    layers = range(len(spec.shape.layers))
    for top in range(100, 0, -1):
        shares = [top / 100 / (1 + layer) for layer in layers]
        plans = tuple(
            None if layer.sliding_window else (HeadPlan("rotated", (Tier(share, 4, 4),)),) * layer.kv_heads
            for layer, share in zip(spec.shape.layers, shares)
        )
        if limit.excess(plans) == 0:
            yield Cell(plans, "pyramid", f"{shares[0]:.0%} of tokens in layer 0, {shares[-1]:.0%} in layer {layers[-1]}")
            return


PROPOSING = {**POLICIES, "pyramid": pyramid}


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(PROPOSING)), RECENTS, st.floats(0.03, 1), st.integers(20, 200))
def test_cells_are_within_the_limit(name, recent, share, length):
    spec = CacheSpec(SHAPE, recent, SCORERS["value_aware"])
    limit = ByteLimit(spec, share, length)
    for cell in islice(PROPOSING[name](spec, limit), 8):
        assert isinstance(cell, Cell) and cell.family and cell.setting
        assert [row is None for row in cell.plans] == [layer.sliding_window is not None for layer in SHAPE.layers]
        for tokens in range(length, 4 * length):
            assert spec.nbytes(cell.plans, tokens) <= share * SHAPE.bytes_per_token * tokens
        assert spec.nbytes(cell.plans, length) <= limit.nbytes


@pytest.mark.parametrize("name", POLICIES)
def test_a_lowered_limit_is_kept(name):
    """As `Profile.solve_at_all_lengths` lowers it."""
    limit = ByteLimit(SPEC, 1 / 2, LENGTH)
    lowered = limit.lowered(limit.spare // 3)
    cells = list(POLICIES[name](SPEC, lowered))
    assert cells and all(SPEC.nbytes(cell.plans, LENGTH) <= lowered.nbytes for cell in cells)
    assert any(SPEC.nbytes(cell.plans, LENGTH) > lowered.nbytes for cell in POLICIES[name](SPEC, limit))


@pytest.mark.parametrize("share", [1 / 2, 1 / 4, 1 / 8])
def test_labels_tell_the_cells_of_all_policies_apart(share):
    """The same plans may be proposed by two policies: then under the same label."""
    labels: dict[Plans, tuple[str, str]] = {}
    for propose in PROPOSING.values():
        for cell in propose(SPEC, ByteLimit(SPEC, share, LENGTH)):
            assert labels.setdefault(cell.plans, (cell.family, cell.setting)) == (cell.family, cell.setting)
    assert len(set(labels.values())) == len(labels)


def test_a_policy_that_is_not_uniform_gets_its_own_label(monkeypatch):
    """Not that of the precision of its first head."""
    monkeypatch.setitem(POLICIES, "pyramid", pyramid)
    limit = ByteLimit(SPEC, 1 / 4, LENGTH)
    (cell,) = pyramid(SPEC, limit)
    first, *_, last = (row for row in cell.plans if row)
    assert first[0].kept_share > 2 * last[0].kept_share > 0
    allocation = Allocation("model", SPEC, SPEC.null_plans, LENGTH, limit.share, "optimal", 0.0, 0.0, 0.0, 0.0, None)
    rows = [(row["family"], row["setting"], plans) for row, plans in _cells(allocation, allocation.spec)]
    assert rows[0] == ("optimal", "optimal", SPEC.null_plans)
    assert rows[-1] == (
        "pyramid",
        f"{first[0].kept_share:.0%} of tokens in layer 0, {last[0].kept_share:.0%} in layer 3",
        cell.plans,
    )
    assert {family for family, _, _ in rows[1:-1]} == {"prune-only", "quantize-only", "quantized pruning"}
    assert len({plans for _, _, plans in rows}) == len(rows)
