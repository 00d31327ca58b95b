"""The comparison of formats says what caches lose that are stored so, and how many bits they take."""

import numpy as np
import pytest

from ib_analysis.cache.plan import BITS, HeadPlan, Tier
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.errors import CalibrationError
from ib_analysis.experiments.formats import RECENT, format_losses, formats_text
from ib_analysis.model.shape import cache_shape
from ib_analysis.replay.examples import make_examples
from ib_analysis.replay.replays import Replays
from ib_analysis.scorers import SCORERS
from ib_analysis.tasks.mixture import mixture

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fresh():
    return mixture("fresh", 2, 128)


@pytest.fixture(scope="module")
def table(embedded, fresh):
    model, tokenizer = embedded
    return format_losses(model, mixture("seen", 5, 128), fresh, tokenizer=tokenizer)


def test_losses_are_those_of_caches_that_keep_all_tokens(table, embedded, fresh):
    model, tokenizer = embedded
    spec = CacheSpec(cache_shape(model.config), RECENT, SCORERS["value_aware"])
    examples = make_examples(model, tokenizer, fresh, seed=1)
    for side, bits in (("keys", (3, 16)), ("values", (16, 3))):
        kl_bits, _ = Replays(model, spec, examples).measure([spec.uniform(HeadPlan("kivi", (Tier(1.0, *bits),)))])
        found = table[(table.side == side) & (table.format == "kivi") & (table.bits == 3)].iloc[0]
        assert found.kl_bits == pytest.approx(kl_bits.mean(), rel=1e-3)
        assert found.low_bits <= found.kl_bits <= found.high_bits


def test_a_row_for_each_precision_of_each_format_and_side(table):
    assert set(table.groupby(["side", "format"]).bits.apply(tuple)) == {tuple(BITS)}
    assert set(table.format) == {"kivi", "rotated", "spectral"} and set(table.side) == {"keys", "values"}


def test_bits_count_codes_and_metadata(table):
    """In float16 and int16: a scale a token of rotated values, and of spectral keys four steps a token in one word."""
    values = table[(table.side == "values") & (table.format == "rotated")]
    np.testing.assert_allclose(values.stored_bits, values.bits + 16 / 64)
    keys = table[(table.side == "keys") & (table.format == "spectral")]
    assert (keys.stored_bits > keys.bits + 16 / 64).all() and (keys.stored_bits < keys.bits + 16 / 64 + 0.3).all()
    assert (table.entropy_bits <= table.stored_bits + 1e-9).all() and (table.entropy_bits > 0).all()


def test_text_has_a_line_for_each_row(table):
    assert len(formats_text(table).splitlines()) == 2 + len(table)


def test_prompts_that_are_too_short_are_refused(embedded):
    model, tokenizer = embedded
    with pytest.raises(CalibrationError):
        format_losses(model, [], ["too"], tokenizer=tokenizer)
