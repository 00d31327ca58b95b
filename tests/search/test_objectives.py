"""Tables of what each option of each head keeps agree with `information`, and with theory's order."""

from dataclasses import replace

import numpy as np
import pytest

import ib_analysis as ib
from ib_analysis.cache.plan import HeadPlan, Tier
from ib_analysis.errors import CalibrationError
from ib_analysis.estimators import ESTIMATORS
from ib_analysis.replay.examples import make_examples
from ib_analysis.replay.replays import Replays
from ib_analysis.scorers import SCORERS
from ib_analysis.search.candidates import dominates, head_options
from ib_analysis.search.objectives import OBJECTIVES, USABLE, objective_names, objective_tables
from ib_analysis.search.optimize import full_allocation
from ib_analysis.tasks.mixture import mixture

pytestmark = pytest.mark.slow

PROMPTS = mixture("objectives", 6, 256)
FEW = [
    HeadPlan("kivi"),
    HeadPlan("kivi", (Tier(1 / 2, 2, 2),)),
    HeadPlan("kivi", (Tier(1 / 2, 4, 3),)),
    HeadPlan("rotated", (Tier(1 / 4, 4, 4), Tier(1 / 2, 2, 2))),
    HeadPlan("kivi", (Tier(1.0, 16, 16),)),
]


@pytest.fixture(scope="module")
def full(embedded):
    model, _ = embedded
    return full_allocation(model, SCORERS["value_aware"])


@pytest.fixture(scope="module")
def replays(embedded, full):
    model, tokenizer = embedded
    examples = make_examples(model, tokenizer, PROMPTS, seed=1)
    return Replays(model, full.spec, examples)


@pytest.fixture(scope="module")
def tables(replays):
    return objective_tables(replays, FEW)


@pytest.mark.parametrize("option", range(1, len(FEW)))
def test_agrees_with_information(embedded, full, tables, option):
    model, tokenizer = embedded
    same = replace(full, plans=((FEW[option],) * 2,) * 4)
    found = ib.information(model, same, PROMPTS, tokenizer=tokenizer)
    heads = found[found.side == "both"]
    for name in ("code_rate", "tight_code_rate"):
        assert tables[name][:, option] == pytest.approx(heads[f"{name}_bits"].to_numpy(dtype=float), abs=1e-6)
    defined = ~heads.gaussian_bits.isna().to_numpy()
    assert defined.any()
    assert tables["gaussian"][defined, option] == pytest.approx(heads.gaussian_bits.to_numpy(dtype=float)[defined], abs=1e-4)
    assert (tables["dithered"][:, option] <= heads.dithered_bits.to_numpy(dtype=float) + 1e-6).all()


def test_nothing_keeps_nothing(tables):
    for name in OBJECTIVES:
        assert (tables[name][:, 0] == 0).all()
        assert (tables[name][:, 1:] > 0).all()


def test_more_keeps_more(tables):
    for name in OBJECTIVES:
        assert (tables[name][:, 2] > tables[name][:, 1]).all()
        assert (tables[name][:, 4] >= tables[name].max(1) - 1e-9).all()
    assert (tables["tight_code_rate"] <= tables["code_rate"] + 1e-9).all()


def test_heads_in_turns_are_heads_at_once(replays, tables, monkeypatch):
    monkeypatch.setattr("ib_analysis.search.objectives.HELD_BYTES", 1)
    for name, table in objective_tables(replays, FEW).items():
        assert table == pytest.approx(tables[name], abs=1e-9)


def test_rates_of_all_options_grow_with_what_dominates(replays):
    options = [option for option in head_options(("rotated",)) if len(option.tiers) == 1 and option.format == "rotated"][::3]
    rate = objective_tables(replays, options)["code_rate"]
    for worse, better in np.ndindex(len(options), len(options)):
        if worse != better and dominates(options[better], options[worse]):
            entropy_of_mask = 1.0  # bits a token: keeping all takes no mask
            assert (rate[:, better] >= rate[:, worse] - entropy_of_mask).all()


def test_names_are_the_usable_the_streamed_and_the_estimators(monkeypatch):
    assert objective_names() == (USABLE, *OBJECTIVES, *(name for name in ESTIMATORS if name != "gaussian"))
    assert len(set(objective_names())) == len(objective_names())
    monkeypatch.setitem(ESTIMATORS, "ours", ESTIMATORS["gaussian"])
    assert objective_names()[-1] == "ours"


def test_an_estimator_s_table(small_llama, small_prompts):
    """Nothing keeps nothing, more bits keep more, and nothing is above what the codes hold; streamed ones are as alone."""
    spec = full_allocation(small_llama, SCORERS["value_aware"]).spec
    few = Replays(small_llama, spec, make_examples(small_llama, None, small_prompts))
    found, streamed = objective_tables(few, FEW, ("copula_gaussian", "gaussian")), objective_tables(few, FEW)
    assert found.keys() == {"copula_gaussian", "gaussian"}
    assert found["gaussian"] == pytest.approx(streamed["gaussian"], abs=1e-9)
    table = found["copula_gaussian"]
    assert table.shape == (4, len(FEW)) and np.isfinite(table).all()
    assert (table[:, 0] == 0).all() and (table[:, 1:] > 0).all()
    assert (table[:, 2] > table[:, 1]).all()
    assert (table[:, 4] == table.max(1)).all()
    assert (table <= streamed["code_rate"] + 1e-6).all()


def test_an_estimator_declines_copies_which_keep_what_their_codes_hold(small_llama, small_prompts):
    spec = full_allocation(small_llama, SCORERS["value_aware"]).spec
    few = Replays(small_llama, spec, make_examples(small_llama, None, small_prompts))
    found = objective_tables(few, FEW[-1:], ("copula_gaussian", "code_rate"))
    assert found["copula_gaussian"] == pytest.approx(found["code_rate"], rel=0.01)  # but for the mask
    assert (found["copula_gaussian"] > 100).all() and (found["copula_gaussian"] <= found["code_rate"]).all()


def test_an_estimator_that_declines_is_no_objective(replays):
    """6 prompts are far too few for 64 channels; else all options would seem alike, and everything be evicted."""
    with pytest.raises(CalibrationError, match=r"estimator copula_gaussian declines.*: pass more prompts"):
        objective_tables(replays, FEW, ("copula_gaussian",))
