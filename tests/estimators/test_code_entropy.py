"""Entropies of codes: exact on known frequencies, unbiased enough, and ordered as theory demands."""

from math import log, log2

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ib_analysis.errors import EstimatorError
from ib_analysis.estimators import CodeEntropy
from ib_analysis.estimators.entropy import (
    entropies_of_counts_bits,
    entropies_of_occurrences_bits,
    entropy_limit_bits,
    occurrences,
)
from ib_analysis.estimators.estimate import ABOVE_ENTROPY, TOO_FEW, UNSETTLED, limited
from ib_analysis.estimators.gaussian import total_correlation_or_nan_bits
from ib_analysis.estimators.hard_tasks import SEEN
from ib_analysis.estimators.quantizers import lloyd_max, optimal_uniform
from ib_analysis.estimators.samples import check_samples

code_arrays = st.integers(1, 8).flatmap(
    lambda bits: st.tuples(
        st.just(bits),
        arrays(np.uint8, st.tuples(st.integers(2, 60), st.integers(1, 4)), elements=st.integers(0, 2**bits - 1)),
    )
)


def entropies_bits(codes):
    values = torch.tensor(codes)
    return entropies_of_occurrences_bits(values, occurrences(values))


@given(code_arrays)
def test_no_column_exceeds_its_bits(drawn):
    bits, codes = drawn
    entropies = entropies_bits(codes)
    assert (entropies >= 0).all()
    assert (entropies <= bits + 1e-12).all()


@given(code_arrays)
def test_equals_its_definition(drawn):
    _, codes = drawn
    count = len(codes)
    for column, found in zip(codes.T, entropies_bits(codes)):
        shares = np.unique(column, return_counts=True)[1] / count
        expected = -np.sum(shares * np.log2(shares)) + (len(shares) - 1) / (2 * count * log(2))
        highest = log2(int(column.max()) - int(column.min()) + 1)
        assert float(found) == pytest.approx(min(expected, highest), abs=1e-12)


@given(code_arrays)
@settings(max_examples=50)
def test_columns_together_hold_no_more_than_their_sum(drawn):
    """Of plug-in entropies, whose joint distribution is that of the samples; a row is numbered by its value."""
    _, codes = drawn
    count = len(codes)

    def plug_in(column):
        shares = np.unique(column, return_counts=True)[1] / count
        return -np.sum(shares * np.log2(shares))

    rows = np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1)
    assert plug_in(rows) <= sum(plug_in(column) for column in codes.T) + 1e-9


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("table", [lloyd_max, optimal_uniform])
def test_quantized_normals_have_the_entropy_of_the_table(bits, table):
    x = np.random.default_rng(bits).standard_normal((100_000, 3))
    estimate = CodeEntropy().estimate(x, np.digitize(x, table(bits).thresholds))
    low, high = estimate.interval
    assert estimate.bits == pytest.approx(3 * table(bits).entropy_bits, abs=0.015)
    assert low <= 3 * table(bits).entropy_bits <= high
    assert not estimate.flags


def test_miller_and_madow_remove_most_of_the_bias():
    codes = np.random.default_rng(0).integers(0, 16, (500, 200, 1)) * np.array([1]) ** 2
    codes = codes + 20 * (codes > 12)  # unused levels in between, so that the range does not cap the correction
    estimate = CodeEntropy().estimate(codes.astype(float), codes)
    plug_in = 4 - 15 / (2 * 200 * log(2))
    assert estimate.bits.mean() == pytest.approx(4.0, abs=0.005)
    assert plug_in < 3.95
    assert ((estimate.interval[0] <= 4) & (estimate.interval[1] >= 4)).mean() > 0.93


@given(st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_requantizing_loses_information(seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((500, 4)) * rng.uniform(0.2, 3, 4)
    fine = np.clip(np.floor(x / 0.5) + 8, 0, 15).astype(np.uint8)
    assert CodeEntropy().estimate(x, fine).bits > CodeEntropy().estimate(x, fine // 4).bits


def test_total_correlation_makes_the_rate_of_dependent_channels_tight():
    """At high resolution the joint entropy of the codes is that of the density less d log2 step."""
    rng = np.random.default_rng(0)
    covariance = np.array([[1.0, 0.9], [0.9, 1.0]])
    x = rng.standard_normal((200_000, 2)) @ np.linalg.cholesky(covariance).T
    codes = np.floor(x / 0.25).astype(int)
    rows = np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1, 1)
    joint = float(entropies_bits(rows)[0])
    separate = float(CodeEntropy().estimate(x, codes).bits)
    shared = float(total_correlation_or_nan_bits(torch.tensor(codes.T, dtype=torch.float64).cov(), len(codes)))
    assert separate - joint > 1
    assert separate - shared == pytest.approx(joint, abs=0.03)


def test_constant_codes_hold_nothing():
    x = np.random.default_rng(0).standard_normal((100, 3))
    estimate = CodeEntropy().estimate(x, np.zeros((100, 3), dtype=np.int64))
    assert estimate.bits == 0
    assert estimate.interval == (0, 0)


def test_documents_widen_the_interval():
    codes = np.random.default_rng(0).integers(0, 3, (400, 1)) ** 2
    tokens = np.repeat(np.arange(400), 25)
    x = np.zeros((10_000, 1))
    low, high = CodeEntropy().estimate(x, codes[tokens]).interval
    clustered_low, clustered_high = CodeEntropy().estimate(x, codes[tokens], tokens).interval
    assert clustered_high - clustered_low > 2 * (high - low)


def test_few_samples_a_level_are_flagged():
    x = np.random.default_rng(0).standard_normal((1000, 1))
    codes = np.clip(np.floor(x * 32) + 128, 0, 255).astype(np.uint8)
    assert TOO_FEW in CodeEntropy().estimate(x, codes).flags
    assert TOO_FEW not in CodeEntropy().estimate(x, codes // 32).flags


def test_decoded_values_stand_for_their_codes():
    x = np.random.default_rng(0).standard_normal((1000, 3))
    codes = np.clip(np.floor(x / 0.5) + 8, 0, 15).astype(np.int32)
    expected = CodeEntropy().estimate(x, codes)
    decoded = CodeEntropy().estimate(torch.tensor(x), torch.tensor((codes - 7.5) * 0.5))
    assert decoded.bits == pytest.approx(expected.bits)
    assert np.array(decoded.interval) == pytest.approx(np.array(expected.interval))


def test_continuous_values_are_refused():
    x = np.random.default_rng(0).standard_normal((1000, 3))
    with pytest.raises(EstimatorError, match="as many values as there are samples"):
        CodeEntropy().estimate(x, x)


def test_no_estimate_exceeds_the_entropy_of_codes():
    """A raw value of 5 bits about a 3-bit code of head 0; head 1 is continuous and keeps it."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 1000, 1))
    y = np.stack([rng.integers(0, 8, (1000, 1)).astype(float), rng.standard_normal((1000, 1))])
    raw = torch.tensor([5.0, 5.0], dtype=torch.float64)
    estimate = limited(check_samples(x, y, None), raw, raw - 3, raw + 1, {})
    assert estimate.bits == pytest.approx([3.0, 5.0], abs=0.01)
    assert estimate.interval[1] == pytest.approx([3.0, 6.0], abs=0.01)
    assert estimate.flags[ABOVE_ENTROPY].tolist() == [True, False]


def test_limit_needs_columns_that_repeat_themselves():
    rng = np.random.default_rng(0)
    codes, rare = rng.integers(0, 16, (1000, 2)).astype(float), rng.integers(0, 500, (1000, 2)).astype(float)
    mixed = np.concatenate([codes[:, :1], rng.standard_normal((1000, 1))], axis=1)
    limit = entropy_limit_bits(torch.tensor(np.stack([codes, rare, mixed])))
    assert limit[0] == pytest.approx(8.0, abs=0.02)
    assert torch.isinf(limit[1:]).all()


@given(code_arrays)
def test_counts_give_what_codes_give(drawn):
    bits, codes = drawn
    counts = torch.stack([torch.bincount(torch.tensor(column).long(), minlength=2**bits) for column in codes.T])
    assert entropies_of_counts_bits(counts).numpy() == pytest.approx(entropies_bits(codes).numpy(), abs=1e-12)


def test_codes_that_x_settles_raise_no_flag_and_noisy_labels_do():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, 3))
    label = (x.sum(1, keepdims=True) > 0).astype(np.int64)
    noisy = np.where(rng.random((2000, 1)) < 0.1, 1 - label, label)
    assert not CodeEntropy().estimate(x, np.floor(2 * x).astype(np.int64)).flags
    assert not CodeEntropy().estimate(x.sum(1, keepdims=True), label).flags
    assert UNSETTLED not in CodeEntropy().estimate(np.stack([x[:, :1], 2 * x[:, :1]]), np.stack([x[:, :1] > 0] * 2)).flags
    assert UNSETTLED in CodeEntropy().estimate(x, noisy).flags


@pytest.mark.parametrize("name", ["three labels in the plane", "label against 20", "counts of an exponential rate"])
def test_entropy_of_labels_that_vary_more_than_x_is_flagged(name):
    assert UNSETTLED in CodeEntropy().estimate(*SEEN[name].sample(4000, np.random.default_rng(0))).flags
