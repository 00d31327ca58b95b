"""An allocation as a value: its tables and figures, the models that it fits."""

import copy
import warnings

import pandas as pd
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from ib_analysis.errors import ProfileMismatchError
from ib_analysis.model.fingerprint import model_fingerprint
from ib_analysis.scorers import SCORERS
from ib_analysis.search.optimize import allocate, full_allocation
from ib_analysis.tasks.mixture import mixture

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def allocation(bench):
    return allocate(bench, 1 / 8)


@pytest.fixture
def full(small_llama):
    return full_allocation(small_llama, SCORERS["value_aware"])


@pytest.fixture(scope="module")
def other_model():
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    )


def test_full_cache_in_words_and_figures(full, tmp_path):
    assert "nothing is compressed" in str(full) and "Empty" not in str(full)
    assert full.nbytes(100) == 100 * full.spec.shape.bytes_per_token
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full.plot(tmp_path / "full")
    drawn = pd.read_csv(tmp_path / "full.csv")
    assert len(drawn) == 4
    assert (drawn.token_share == 1).all() and (drawn.key_bits == 16).all() and (drawn.value_bits == 16).all()


def test_a_config_that_computes_the_same_is_no_other_model(allocation, embedded):
    config = copy.deepcopy(embedded[0].config)
    config.pad_token_id = 5
    config.output_hidden_states = True
    assert model_fingerprint(config) == allocation.model


def test_another_model_is_refused(allocation, other_model):
    with pytest.raises(ProfileMismatchError, match="another model"):
        allocation.cache(other_model)
    with pytest.raises(ProfileMismatchError, match="another model"):
        allocation.validate(other_model, mixture("x", 3, 64))


def test_table_has_every_head_and_its_bytes(allocation):
    table = allocation.table()
    assert set(zip(table.layer, table["head"])) == set(allocation.spec.shape.heads)
    heads = table.groupby(["layer", "head"]).head_bytes.first().sum()
    recent = allocation.spec.recent_bytes(allocation.context_length)
    assert heads + recent == allocation.nbytes(allocation.context_length)


def test_validate_measures_other_prompts(allocation, embedded):
    model, _ = embedded
    found = allocation.validate(model, mixture("others", 6, 256))
    assert found.plans == allocation.plans
    assert found.validation.prompts == 6
    assert found.validation != allocation.validation
    assert found.retained_bits == pytest.approx(found.validation.information_bits - found.validation.loss_bits)
    assert 0 < found.retained_share <= 1


def test_text_and_figure(allocation, tmp_path):
    assert "solver gap" in str(allocation) and "newest tokens at 16 bits" in str(allocation)
    allocation.plot(tmp_path / "heads")
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == {"heads.pdf", "heads.png", "heads.csv"}
    allocation.plot(tmp_path / "heads")
    assert first == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
