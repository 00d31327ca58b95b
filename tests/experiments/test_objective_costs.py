"""What other objectives cost, on few short prompts."""

import pytest

from ib_analysis.experiments.objective_costs import costs_text, objective_costs
from ib_analysis.search.objectives import OBJECTIVES, USABLE
from ib_analysis.tasks.mixture import mixture

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def costs(embedded):
    model, tokenizer = embedded
    with pytest.warns(UserWarning, match="prompts calibrate"):
        return objective_costs(model, prompts=mixture("costs", 18, 256), tokenizer=tokenizer, shares=(1 / 8,))


def test_a_row_for_each_objective_within_the_budget(costs, embedded):
    assert costs.objective.tolist() == [USABLE, *OBJECTIVES]
    assert costs.nbytes.max() <= 256 * 1.1 / 8 * 2048  # 4 layers, 2 heads of 64 channels, 16 bits, keys and values
    assert ((costs.low_bits <= costs.kl_bits) & (costs.kl_bits <= costs.high_bits)).all()


def test_ratios_are_to_the_usable_objective(costs):
    usable = costs.kl_bits.iloc[0]
    assert costs.ratio.tolist() == pytest.approx((costs.kl_bits / usable).tolist())
    assert costs.ratio.min() == 1  # knowing what the model uses is best


def test_text_has_a_line_for_each_row(costs):
    lines = costs_text(costs).splitlines()
    assert len(lines) == 2 + len(costs)
    assert all(f"| {name} |" in line for name, line in zip(costs.objective, lines[2:]))
