"""The comparison of scorers says what caches ranked by each of them lose."""

import numpy as np
import pytest

from ib_analysis.cache.plan import Recent
from ib_analysis.cache.spec import ByteLimit, CacheSpec
from ib_analysis.errors import BudgetError, CalibrationError, UnknownNameError
from ib_analysis.experiments.scorers import scorer_losses, scorers_text
from ib_analysis.model.shape import cache_shape
from ib_analysis.policies import POLICIES
from ib_analysis.replay.examples import make_examples, median_length
from ib_analysis.replay.replays import Replays
from ib_analysis.scorers import SCORERS
from ib_analysis.tasks.mixture import mixture

pytestmark = pytest.mark.slow

NAMES = ("value_aware", "learned", "knorm")
SHARES = (1 / 4, 1 / 8)


@pytest.fixture(scope="module")
def fresh():
    return mixture("fresh", 4, 256)


@pytest.fixture(scope="module")
def table(embedded, fresh):
    model, tokenizer = embedded
    policies = ("prune-only", "quantize-only")
    return scorer_losses(
        model, mixture("seen", 4, 256), fresh, tokenizer=tokenizer, scorers=NAMES, policies=policies, shares=SHARES
    )


def test_losses_are_those_of_a_cache_with_the_scorer(table, embedded, fresh):
    model, tokenizer = embedded
    examples = make_examples(model, tokenizer, fresh, seed=1)
    length = median_length(examples)
    for name in ("value_aware", "knorm"):
        spec = CacheSpec(cache_shape(model.config), Recent.within(min(SHARES), length), SCORERS[name])
        plans = [cell.plans for share in SHARES for cell in POLICIES["prune-only"](spec, ByteLimit(spec, share, length))]
        kl_bits, _ = Replays(model, spec, examples).measure(plans)
        found = table[(table.scorer == name) & (table.policy == "prune-only")]
        np.testing.assert_allclose(found.kl_bits, kl_bits.mean(0), rtol=1e-5)
        assert (found.low_bits <= found.kl_bits).all() and (found.kl_bits <= found.high_bits).all()


def test_a_row_for_each_scorer_beside_the_first(table, embedded):
    of_policy = table.groupby(["policy", "budget_share"]).scorer.apply(list)
    assert len(of_policy) == 3  # nothing that keeps all tokens fits the eighth
    assert all(names == list(NAMES) for names in of_policy)
    assert (table[table.scorer == "value_aware"].ratio == 1).all()
    full_bits = 8 * cache_shape(embedded[0].config).bytes_per_token
    assert (table.bits_per_token <= table.budget_share * full_bits).all()


def test_text_has_a_table_for_each_policy(table):
    lines = scorers_text(table).splitlines()
    assert [line for line in lines if line.startswith("| prune-only")] == ["| prune-only | 0.25 | 0.125 |"]
    assert sum(line.startswith("| learned |") for line in lines) == 2


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"scorers": ("nobody",)}, UnknownNameError),
        ({"shares": ()}, BudgetError),
        ({"policies": ("quantize-only",), "shares": (1 / 16,)}, BudgetError),
        ({"fresh": ["too short"]}, CalibrationError),
    ],
)
def test_nonsense_is_refused(changed, error, embedded):
    model, tokenizer = embedded
    given = {"fresh": mixture("fresh", 1, 256), "scorers": ("value_aware",), "shares": SHARES} | changed
    with pytest.raises(error):
        scorer_losses(model, [], given.pop("fresh"), tokenizer=tokenizer, **given)
