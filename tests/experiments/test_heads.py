"""Information of a compressed cache, head by head, against the same samples taken all at once."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from ib_kernels import RUN_BYTES, get_format, roundtrip, side_nbytes

import ib_analysis as ib
from ib_analysis.cache.attention import cache_argument
from ib_analysis.cache.plan import HeadPlan, Tier
from ib_analysis.codes.gathered import Gathered, TierSide, coded, gather, sides_of
from ib_analysis.errors import EstimatorError, ProfileMismatchError, UnknownNameError
from ib_analysis.estimators import ESTIMATORS, CodeEntropy, DitheredChannel, Gaussian
from ib_analysis.estimators.estimate import ABOVE_ENTROPY, TOO_FEW
from ib_analysis.estimators.gaussian import total_correlation_or_nan_bits
from ib_analysis.estimators.moments import Moments
from ib_analysis.experiments.heads import ALL_RECENT, NOTHING_KEPT, RAW_FLOATS, SAMPLES
from ib_analysis.replay.examples import make_examples
from ib_analysis.replay.measurement import measure_plans
from ib_analysis.replay.replays import Replays
from ib_analysis.scorers import SCORERS
from ib_analysis.search.optimize import full_allocation
from ib_analysis.tasks.mixture import mixture

pytestmark = pytest.mark.slow

PROMPTS = mixture("information", 12, 256)
TWO_TIERS = HeadPlan("kivi", (Tier(1 / 2, 4, 3), Tier(3 / 8, 2, 2)))
ROTATED = HeadPlan("rotated", (Tier(3 / 4, 4, 2),))
EVICTED = HeadPlan("kivi")
RAW_HALF = HeadPlan("kivi", (Tier(1 / 2, 16, 16),))
ASKED = ("ksg", "copula_gaussian")


@pytest.fixture(scope="module")
def full(embedded):
    model, _ = embedded
    return full_allocation(model, SCORERS["value_aware"])


def allocation(full, *rows):
    return replace(full, plans=rows)


@pytest.fixture(scope="module")
def mixed(full):
    """Two tiers, one tier, an evicted head, a head at 16 bits, and a layer at full precision."""
    return allocation(full, (TWO_TIERS, ROTATED), (EVICTED, RAW_HALF), None, (ROTATED, TWO_TIERS))


@pytest.fixture(scope="module")
def replays(embedded, full):
    model, tokenizer = embedded
    return Replays(model, full.spec, make_examples(model, tokenizer, PROMPTS, seed=1))


@pytest.fixture(scope="module")
def table(embedded, mixed):
    model, tokenizer = embedded
    return ib.information(model, mixed, PROMPTS, tokenizer=tokenizer)


def row(table, layer, head, side):
    found = table[(table.layer == layer) & (table["head"] == head) & (table.side == side)]
    assert len(found) == 1
    return found.iloc[0]


def samples(replays, plan, tier, layer, head, side):
    """All at once: x, codes and decoded values [N, D] of the tokens that one tier of one head keeps."""
    rows = []
    for replay in replays:
        context, recent = replay.context(layer), replay.spec.recent
        first, tokens = recent.sinks, recent.compressible(replay.length)
        ranked = first + context.scores[head, first : first + tokens].argsort(descending=True, stable=True)
        counts = plan.counts(len(ranked))
        taken = ranked[sum(counts[:tier]) : sum(counts[: tier + 1])].sort().values
        x = getattr(context, side)[head, taken]
        codes, decoded = coded(sides_of(plan)[tier][side], x[None], replay.dtype)
        rows.append((x, codes[0], decoded[0]))
    return tuple(torch.cat(found) for found in zip(*rows))


def test_streaming_gives_what_all_samples_at_once_give(replays, table):
    tokens = sum(replay.length for replay in replays)
    for side in ("keys", "values"):
        expected = {"code_entropy_bits": 0.0, "dithered_bits": 0.0, "gaussian_bits": 0.0, "shared": 0.0}
        for tier in (0, 1):
            x, codes, decoded = samples(replays, TWO_TIERS, tier, 3, 1, side)
            share = len(x) / tokens
            expected["code_entropy_bits"] += share * float(CodeEntropy().estimate(x, codes).bits)
            expected["gaussian_bits"] += share * float(Gaussian().estimate(x, decoded).bits)
            expected["dithered_bits"] += share * float(DitheredChannel().estimate(x, decoded).bits)
            expected["shared"] += share * float(total_correlation_or_nan_bits(codes.double().mT.cov(), len(codes)))
        found = row(table, 3, 1, side)
        assert found.code_entropy_bits == pytest.approx(expected["code_entropy_bits"], abs=1e-8)
        assert found.code_rate_bits - found.tight_code_rate_bits == pytest.approx(expected["shared"], abs=1e-6)
        assert found.dithered_bits == pytest.approx(expected["dithered_bits"], abs=1e-8)
        assert ABOVE_ENTROPY not in found["flags"]
        assert found.gaussian_bits == pytest.approx(expected["gaussian_bits"], abs=1e-6)


def test_memory_does_not_grow_with_prompts(replays):
    sides = {side: [(0, 0), (3, 1)] for tier in sides_of(TWO_TIERS) for side in tier.values()}

    def held(count):
        found = gather(list(replays)[:count], sides)
        of_moments = [vars(gathered.moments).values() for gathered in found.values()]
        everything = [*[vars(gathered).values() for gathered in found.values()], *of_moments]
        return sum(value.numel() for values in everything for value in values if isinstance(value, torch.Tensor))

    assert held(2) == held(12) > 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("fmt", ["kivi", "rotated"])
@pytest.mark.parametrize("side", ["keys", "values"])
def test_codes_are_those_that_the_cache_stores(bits, fmt, side):
    x = torch.randn(2, 40, 64)
    codes, decoded = coded(TierSide(side, fmt, bits, (1.0,)), x, torch.float16)
    expected = roundtrip(fmt, side, x.flatten(0, 1), torch.tensor([40, 40]), bits)
    assert torch.equal(decoded.flatten(0, 1), expected)
    assert codes.min() >= 0 and codes.max() < 2 ** (bits if bits < 16 else 6)  # sign and exponent of fp16


def test_stored_bits_are_every_byte(embedded, full, mixed):
    model, tokenizer = embedded
    packed = allocation(full, *mixed.plans[:2], (ROTATED, ROTATED), mixed.plans[3])
    for prompt in PROMPTS[:2]:
        found = ib.information(model, packed, [prompt], tokenizer=tokenizer, question_aware=False)
        ids = tokenizer(prompt.context, return_tensors="pt").input_ids
        cache = packed.cache(model)
        with torch.no_grad():
            model(ids, **cache_argument(model, cache))
        assert found.stored_bits.iloc[-1] * ids.shape[1] / 8 == pytest.approx(cache.nbytes, abs=1e-6)


def test_total_is_the_sum_of_heads_and_heads_of_sides(table):
    assert table.side.tolist() == ["keys", "values", "both"] * 8 + ["cache"]
    assert table["layer"].isna().tolist() == [False] * 24 + [True]
    for name in ("stored_bits", "code_rate_bits", "tight_code_rate_bits", "dithered_bits", "gaussian_bits"):
        keys, values, both = (table.loc[table.side == side, name].to_numpy() for side in ("keys", "values", "both"))
        assert both == pytest.approx(keys + values)
        assert table[name].iloc[-1] == pytest.approx(both.sum())


def test_usable_information_is_what_plans_retain(replays, mixed, table):
    measured = measure_plans(replays, [mixed.plans])[0]
    total = table.iloc[-1]
    assert total.usable_bits == pytest.approx(measured.retained_bits)
    assert total.full_usable_bits == pytest.approx(measured.information_bits)
    assert total.usable_low_bits <= total.usable_bits <= total.usable_high_bits
    untouched, gone = row(table, 2, 0, "both"), row(table, 1, 0, "both")
    assert untouched.usable_bits == pytest.approx(untouched.full_usable_bits, abs=1e-6)
    assert gone.usable_bits == 0
    assert np.isnan(row(table, 0, 0, "keys").usable_bits)


def test_rates_are_ordered(table):
    heads = table[table.side != "cache"]
    assert (heads.tight_code_rate_bits <= heads.code_rate_bits + 1e-9).all()
    assert (heads.code_entropy_bits <= heads.code_rate_bits).all()
    assert (heads.dithered_bits <= heads.dithered_upper_bits).all()
    assert (heads.gaussian_low_bits <= heads.gaussian_bits).all()
    gaussian = heads[heads.side != "both"]
    assert (gaussian.gaussian_bits <= gaussian.code_rate_bits + 1e-9).all()


def test_flags_and_special_heads(table):
    gone = row(table, 1, 0, "keys")
    assert gone["flags"] == NOTHING_KEPT
    assert gone.gaussian_bits == gone.code_rate_bits == gone.kept_tokens == 0
    raw = row(table, 2, 1, "values")
    assert RAW_FLOATS in raw["flags"]
    assert 9 * 64 * raw.kept_tokens / 230 < raw.gaussian_bits < raw.code_entropy_bits < 16 * 64
    assert raw.stored_bits == 16 * 64
    # Values of layer 0 are a function of the token: for a Gaussian model their copies tell everything.
    assert ABOVE_ENTROPY in row(table, 0, 0, "values")["flags"]
    assert set(table["flags"].iloc[-1].split(", ")) >= {NOTHING_KEPT, RAW_FLOATS, ABOVE_ENTROPY}


def test_fewer_bits_and_fewer_tokens_hold_less(embedded, full):
    """Along X, 4 bit, 2 bit of one format, and along nested sets of kept tokens."""
    model, tokenizer = embedded
    totals = []
    for plan in (
        HeadPlan("rotated", (Tier(1.0, 4, 4),)),
        HeadPlan("rotated", (Tier(1.0, 2, 2),)),
        HeadPlan("rotated", (Tier(0.5, 2, 2),)),
    ):
        found = ib.information(model, allocation(full, *[(plan, plan)] * 4), PROMPTS, tokenizer=tokenizer)
        totals.append(found.iloc[-1])
    names = ["stored_bits", "code_entropy_bits", "code_rate_bits", "tight_code_rate_bits", "dithered_bits", "gaussian_bits"]
    four, two, half = (total[names].to_numpy(dtype=float) for total in totals)
    assert (four > two).all() and (two > half).all()


def test_few_prompts_have_no_interval_and_a_flag(embedded, mixed):
    model, tokenizer = embedded
    found = ib.information(model, mixed, PROMPTS[:3], tokenizer=tokenizer)
    assert TOO_FEW in row(found, 0, 1, "keys")["flags"]
    assert np.isnan(row(found, 0, 1, "keys").gaussian_low_bits)


def test_prompts_too_short_to_compress(embedded, mixed):
    model, tokenizer = embedded
    found = ib.information(model, mixed, list(torch.randint(3, 99, (2, 24))), tokenizer=tokenizer)
    assert set(found["flags"]) == {ALL_RECENT}
    assert (found.kept_tokens == 0).all() and (found.stored_bits[found.side == "keys"] == 16 * 64).all()


def test_another_model_is_refused(embedded, mixed):
    model, tokenizer = embedded
    with pytest.raises(ProfileMismatchError, match="another model"):
        ib.information(model, replace(mixed, model="0" * 16), PROMPTS, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def estimated(embedded, mixed):
    model, tokenizer = embedded
    return ib.information(model, mixed, PROMPTS, tokenizer=tokenizer, estimators=ASKED)


def by_hand(replays, name, plan, layer, head, side):
    """An estimator on each tier's tokens, taken of each prompt at equal distances; in bits per context token."""
    total, each = 0.0, -(-SAMPLES // len(replays))
    for tier, sides in enumerate(sides_of(plan)):
        x, codes, decoded = samples(replays, plan, tier, layer, head, side)
        counts = [plan.counts(replay.tokens)[tier] for replay in replays]
        inside = [torch.linspace(0, count - 1, min(count, each)).round().long() for count in counts]
        chosen = torch.cat([start + tokens for start, tokens in zip(np.cumsum([0, *counts]), inside)])
        documents = np.repeat(np.arange(len(counts)), [len(tokens) for tokens in inside])
        try:
            bits = float(ESTIMATORS[name].estimate(x[chosen].float(), decoded[chosen], documents).bits)
        except EstimatorError:
            return np.nan
        total += len(x) * min(bits, held_bits(codes, counts, sides[side]))
    return total / sum(replay.length for replay in replays)


def held_bits(codes, counts, tier_side):
    """What the codes of one token hold with its metadata."""
    quantizer = getattr(get_format(tier_side.format), tier_side.side)
    nbytes = sum(int(side_nbytes(quantizer, count, codes.shape[1], tier_side.bits)) for count in counts)
    nbytes += RUN_BYTES * len(counts) * (tier_side.side == "keys")
    return float(CodeEntropy().estimate(codes.float(), codes).bits) + 8 * nbytes / len(codes) - tier_side.bits * codes.shape[1]


@pytest.mark.parametrize("name", ASKED)
def test_estimators_add_what_they_say_by_hand(replays, estimated, name):
    numbers = []
    for plan, layer, head in ((TWO_TIERS, 3, 1), (ROTATED, 0, 1)):
        for side in ("keys", "values"):
            numbers.append(by_hand(replays, name, plan, layer, head, side))
            found = row(estimated, layer, head, side)[f"{name}_bits"]
            assert found == pytest.approx(numbers[-1], rel=1e-4, nan_ok=True)
    assert np.isfinite(numbers).any() and np.nanmin(numbers) > 0


def test_estimators_say_no_more_than_the_codes_hold(table, estimated):
    added = [f"{name}_bits" for name in ASKED]
    pd.testing.assert_frame_equal(estimated.drop(columns=added), table)
    sides = estimated[estimated.side.isin(["keys", "values"])]
    for name in added:
        assert (sides[name].isna() | (sides[name] <= sides.code_rate_bits + 1e-9)).all()
        assert sides[name].notna().mean() > 0.5
        heads = estimated.loc[estimated.side == "both", name]
        assert estimated[name].iloc[-1] == pytest.approx(heads.sum(skipna=False), nan_ok=True)


def test_an_unknown_estimator_lists_the_known_ones(embedded, mixed):
    model, tokenizer = embedded
    with pytest.raises(UnknownNameError, match=f"no estimator 'nope': use one of {', '.join(ESTIMATORS)}"):
        ib.information(model, mixed, PROMPTS[:1], tokenizer=tokenizer, estimators=("ksg", "nope"))


def test_table_survives_csv(table, tmp_path):
    table.to_csv(tmp_path / "table.csv", index=False)
    again = pd.read_csv(tmp_path / "table.csv", keep_default_na=True)
    assert again.gaussian_bits.to_numpy() == pytest.approx(table.gaussian_bits.to_numpy(), nan_ok=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bits", [2, 16])
def test_gathered_on_a_gpu_is_the_same(bits):
    side = TierSide("values", "kivi", bits, (1.0,))
    found = []
    for device in ("cpu", "cuda"):
        gathered = Gathered(bits, torch.float16, Moments())
        for seed in range(10):
            x = torch.randn(3, 50, 16, generator=torch.Generator().manual_seed(seed)).to(device)
            gathered.add(x, *coded(side, x, torch.float16))
        estimates = [gathered.code_entropy_bits(), gathered.total_correlation_bits(), *gathered.gaussian_bits()]
        found.append([estimate.cpu() for estimate in estimates])
    for here, there in zip(*found):
        assert there.numpy() == pytest.approx(here.numpy(), abs=1e-6)
