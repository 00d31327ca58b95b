"""What experiments refuse before they calibrate."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import ib_analysis as ib
from ib_analysis.errors import BudgetError, CalibrationError, UnknownNameError
from ib_analysis.experiments.objective_costs import objective_costs
from ib_analysis.experiments.setup import split_examples
from ib_analysis.replay.examples import Example

each = pytest.mark.parametrize(("experiment", "needed"), [(ib.information_plane, 4), (objective_costs, 5)])


@pytest.fixture(scope="module")
def model():
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 100}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **size)).eval()


@pytest.fixture(autouse=True)
def _no_calibration(monkeypatch):
    """Fails a test that gets so far."""
    monkeypatch.setattr("ib_analysis.experiments.setup.prepare", lambda *_, **__: pytest.fail("calibrated"))


def prompts(count, length=64):
    return list(torch.randint(3, 99, (count, length)))


@each
def test_too_few_prompts(model, experiment, needed):
    for count in range(1, needed):
        with pytest.raises(CalibrationError, match=f"^{count} prompts are too few, .* pass at least {needed},"):
            experiment(model, prompts=prompts(count), shares=(1 / 2,))


@pytest.mark.parametrize(("every", "needed"), [(4, 4), (2, 5), (3, 4)])
def test_as_many_as_are_named_are_enough(every, needed):
    nothing = torch.zeros(0, dtype=torch.int64)
    examples = [Example("text", torch.full((100,), i), nothing, nothing, nothing, nothing) for i in range(needed)]
    calibrating, held_out = split_examples(examples, every, 1 / 2)
    assert len(calibrating) == 3 and len(held_out) == needed - 3
    assert calibrating[0] is examples[0] and held_out[0] is examples[every - 1]
    with pytest.raises(CalibrationError, match=f"at least {needed}"):
        split_examples(examples[:-1], every, 1 / 2)


@each
def test_a_short_prompt_anywhere(model, experiment, needed):
    for place in range(8):
        some = prompts(8)
        some[place] = some[place][:8]
        with pytest.raises(CalibrationError, match=f"prompt {place} has 6 tokens .* longer prompts"):
            experiment(model, prompts=some, shares=(1 / 2,))


@each
def test_budgets_that_are_no_shares(model, experiment, needed):
    for shares in ((), (1 / 2, 1.0), (2.0,), (0.0,), (1 / 2, -1.0), (float("nan"),)):
        with pytest.raises(BudgetError):
            experiment(model, prompts=prompts(8), shares=shares)


@each
def test_unknown_scorer(model, experiment, needed):
    with pytest.raises(UnknownNameError, match="no scorer 'nope'"):
        experiment(model, prompts=prompts(8), scorer="nope")
