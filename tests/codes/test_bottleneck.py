"""The local plane: no dithered point, and no floor, crosses the Gaussian bottleneck."""

from math import log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from ib_analysis.cache.plan import BITS, Recent
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.codes.bottleneck import _noise, bottleneck_curve, floor_of_copy, joint_covariances, local_plane
from ib_analysis.errors import CalibrationError, EstimatorError
from ib_analysis.estimators import Gaussian
from ib_analysis.estimators.estimate import TOO_FEW
from ib_analysis.estimators.moments import Moments
from ib_analysis.estimators.optima import canonical_correlations, gaussian_bottleneck, noisy_copy, reverse_water_filling
from ib_analysis.model.shape import cache_shape
from ib_analysis.replay.examples import make_examples
from ib_analysis.replay.replays import Replays
from ib_analysis.scorers import SCORERS

pytestmark = pytest.mark.slow

BETAS = np.geomspace(1.01, 1e6, 200)


def crosses(covariance, dim_x, rate, relevance):
    """Whether a point lies above some tangent of the curve, which is concave with slope 1 / beta."""
    best_rate, best_relevance = gaussian_bottleneck(canonical_correlations(covariance, dim_x).clip(max=1 - 1e-9), BETAS)
    return (relevance > best_relevance + (rate - best_rate) / BETAS + 1e-6).any()


@pytest.fixture(scope="module")
def local(bench):
    return local_plane(bench.validation)


def test_no_dithered_point_crosses_the_bottleneck(bench, local):
    for side in ("keys", "values"):
        covariances = joint_covariances(bench.validation, side)
        for covariance, (layer, head) in zip(covariances, bench.profile.spec.shape.heads):
            some = local[(local["layer"] == layer) & (local["head"] == head) & (local.side == side) & (local.kind == "dithered")]
            assert len(some) == len(bench.profile.spec.formats) * len(BITS)
            for _, point in some.iterrows():
                assert 0 < point.relevance_bits < point.rate_bits
                assert not crosses(covariance, 64, point.rate_bits, point.relevance_bits)
                assert 0 < 64 * point.gap_bits < point.rate_bits
    assert local[local.kind != "dithered"].gap_bits.isna().all()


def test_what_lies_above_the_curve_crosses_it(bench):
    covariance = joint_covariances(bench.validation, "values")[3]
    for rate, relevance in list(zip(*bottleneck_curve(covariance, 64)))[1:]:
        assert not crosses(covariance, 64, rate, relevance)
        assert crosses(covariance, 64, rate, 1.01 * relevance)


def test_more_bits_say_more(local):
    for _, group in local[local.kind == "dithered"].groupby(["layer", "head", "side", "format"]):
        ordered = group.sort_values("bits")
        assert (ordered.rate_bits.diff().dropna() > 0).all()
        assert (ordered.relevance_bits.diff().dropna() > -1e-9).all()


def test_a_floor_below_every_dithered_point(bench, local):
    keys = ["layer", "head", "side", "format", "bits"]
    pairs = local[local.kind == "floor"].merge(local[local.kind == "dithered"], on=keys, suffixes=("", "_dithered"))
    assert len(pairs) == len(bench.profile.spec.shape.heads) * 2 * len(bench.profile.spec.formats) * len(BITS)
    assert (pairs.rate_bits > 0).all() and (pairs.relevance_bits > 0).all()
    assert (pairs.rate_bits <= pairs.rate_bits_dithered).all()
    for side in ("keys", "values"):
        covariances = joint_covariances(bench.validation, side)
        for covariance, (layer, head) in zip(covariances, bench.profile.spec.shape.heads):
            some = pairs[(pairs["layer"] == layer) & (pairs["head"] == head) & (pairs.side == side)]
            for _, point in some.iterrows():
                assert not crosses(covariance, 64, point.rate_bits, point.relevance_bits)


def random_covariance(rng, dim):
    factor = rng.standard_normal((dim, dim + 2)) * np.exp(rng.normal(0, 1, dim))[:, None]
    return factor @ factor.T


def random_noises(rng, covariance, dim_x):
    """Twenty covariances, of other sizes and directions than those of x."""
    turns = np.linalg.qr(rng.standard_normal((20, dim_x, dim_x)))[0]
    sizes = np.exp(rng.normal(0, 3, (20, 1, dim_x))) * covariance.diagonal()[:dim_x]
    return turns * sizes @ turns.swapaxes(1, 2)


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_no_noise_beats_the_bottleneck(seed, dim_x, dim_y):
    rng = np.random.default_rng(seed)
    covariance = random_covariance(rng, dim_x + dim_y)
    rates, relevances = noisy_copy(covariance, dim_x, random_noises(rng, covariance, dim_x))
    for rate, relevance in zip(rates, relevances):
        assert 0 <= relevance <= rate
        assert not crosses(covariance, dim_x, rate, relevance)


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_no_copy_as_exact_has_fewer_bits_than_its_floor(seed, dim_x, dim_y):
    """And what it says of y, no bottleneck says for less."""
    rng = np.random.default_rng(seed)
    covariance = random_covariance(rng, dim_x + dim_y)
    for noise in random_noises(rng, covariance, dim_x):
        rate, relevance = floor_of_copy(covariance, dim_x, noise)
        assert 0 <= relevance <= rate + 1e-9
        assert rate <= noisy_copy(covariance, dim_x, noise)[0] + 1e-9
        assert not crosses(covariance, dim_x, rate, relevance)


def test_floors_measured_on_samples():
    """Water-filling's own code of the samples, encoded with the rate and no more than the error of the copy."""
    rng = np.random.default_rng(0)
    covariance = random_covariance(rng, 5)
    noise = random_noises(rng, covariance, 3)[0]
    z = rng.standard_normal((200_000, 5)) @ np.linalg.cholesky(covariance).T
    x, copy = z[:, :3], z[:, :3] + rng.standard_normal((200_000, 3)) @ np.linalg.cholesky(noise).T
    error = np.square(x - copy @ np.linalg.lstsq(copy, x, rcond=None)[0]).sum(1).mean()
    variances, directions = np.linalg.eigh(covariance[:3, :3])
    expected, level = reverse_water_filling(variances, error)
    share = (1 - level / variances).clip(min=0)  # of a component's variance that its code has
    main = x @ directions[:, share > 0]
    spread = np.sqrt(level * share[share > 0])
    code = main * share[share > 0] + rng.standard_normal(main.shape) * spread
    assert np.square(x - code @ directions[:, share > 0].T).sum(1).mean() == pytest.approx(error, rel=0.01)
    rate, relevance = floor_of_copy(covariance, 3, noise)
    assert rate == pytest.approx(expected, abs=0.02)
    assert Gaussian().estimate(x, code).bits == pytest.approx(rate, abs=0.02)
    assert Gaussian().estimate(code, z[:, 3:]).bits == pytest.approx(relevance, abs=0.02)


def test_noisy_copies_measured_on_samples():
    rng = np.random.default_rng(0)
    covariance = random_covariance(rng, 5)
    noise = random_noises(rng, covariance, 3)[0]
    z = rng.standard_normal((200_000, 5)) @ np.linalg.cholesky(covariance).T
    copy = z[:, :3] + rng.standard_normal((200_000, 3)) @ np.linalg.cholesky(noise).T
    rate, relevance = noisy_copy(covariance, 3, noise)
    assert Gaussian().estimate(z[:, :3], copy).bits == pytest.approx(rate, abs=0.02)
    assert Gaussian().estimate(copy, z[:, 3:]).bits == pytest.approx(relevance, abs=0.02)


def test_curve_ends_at_all_information():
    rng = np.random.default_rng(0)
    covariance = random_covariance(rng, 6)
    rate, relevance = bottleneck_curve(covariance, 4)
    logs = [np.linalg.slogdet(block)[1] for block in (covariance[:4, :4], covariance[4:, 4:], covariance)]
    assert rate[0] == pytest.approx(0, abs=1e-6)
    assert relevance[-1] == pytest.approx((logs[0] + logs[1] - logs[2]) / 2 / log(2), abs=1e-3)
    assert (np.diff(rate) >= 0).all() and (np.diff(relevance) >= 0).all()


@pytest.fixture(scope="module")
def replays_of():
    """replays_of(tokens of a prompt, dead head or not): two prompts and a small random model, 8 + 32 dimensions of x and y."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 100}

    def make(tokens, dead=False):
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", num_key_value_heads=2, head_dim=8, **size)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        if dead:
            model.model.layers[0].self_attn.v_proj.weight.data[:8] = 0
        examples = make_examples(model, None, list(torch.randint(3, 99, (2, tokens))), question_aware=False)
        spec = CacheSpec(cache_shape(model.config), Recent(2, 4, 4), SCORERS["value_aware"])
        return Replays(model, spec, examples)

    return make


def test_no_more_tokens_than_dimensions_are_refused(replays_of):
    with pytest.raises(CalibrationError, match=r"more than 40 compressible tokens, 400 to be accurate, but 2 prompts have \d+:"):
        local_plane(replays_of(25))


@pytest.mark.parametrize(("tokens", "flag"), [(100, TOO_FEW), (260, "")])
def test_few_tokens_are_flagged(replays_of, tokens, flag):
    assert set(local_plane(replays_of(tokens))["flags"]) == {flag}


def test_a_dead_head_tells_nothing(replays_of):
    local = local_plane(replays_of(260, dead=True))
    dead, alive = (local[(local["head"] == head) & (local.side == "values")] for head in (0, 1))
    curve = dead[dead.kind == "bottleneck"]
    assert curve[["rate_bits", "relevance_bits"]].to_numpy().tolist() == [[0, 0]]
    assert dead[["rate_bits", "relevance_bits"]].to_numpy() == pytest.approx(0, abs=1e-4)
    assert alive[alive.kind == "dithered"].rate_bits.min() > 1


def test_copies_without_noise_are_refused():
    with pytest.raises(EstimatorError, match="without noise"):
        noisy_copy(np.eye(3), 2, np.diag([0.0, 1.0]))


@pytest.mark.parametrize("dim", [1, 4, 64])
def test_noise_is_positive_whatever_a_copy_loses(dim):
    """Channels that are exact, that are lost, and that lose a little, turned together."""
    rng = np.random.default_rng(dim)
    turn = torch.tensor(np.linalg.qr(rng.standard_normal((dim, dim)))[0])
    x = torch.tensor(rng.standard_normal((1, 500, dim)) * np.geomspace(1e-4, 1e3, dim)) @ turn
    kept = torch.tensor(rng.choice([0.0, 1e-4, 1.0], dim))
    for copy in (x, 0 * x, x @ turn.T * kept @ turn, x + 0.01 * torch.randn_like(x) @ turn * kept):
        moments = Moments(groups=1)
        moments.add(x, copy)
        noise = _noise(moments, 0, float(x.var(1).max()))
        rate, relevance = noisy_copy(np.eye(2 * dim) + 0.5 * np.eye(2 * dim, k=dim) + 0.5 * np.eye(2 * dim, k=-dim), dim, noise)
        assert np.isfinite(rate) and 0 <= relevance <= rate + 1e-9
