import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ib_kernels.formats.rotated import ROTATED
from ib_kernels.formats.rotated.reference import BLOCK_TOKENS, GAUSSIAN_STEP, STEP_MULTIPLES, hadamard, hadamard_order

# Mean squared error of the optimal uniform quantizer of N(0, 1).
GAUSSIAN_DISTORTION = {2: 0.11885, 3: 0.03744, 4: 0.01154, 8: 8.769e-5}
HEAD_DIMS = [8, 20, 40, 64, 80, 96, 128]
# Numbers of mean 0 by the tails of their distribution.
NUMBERS = {
    "none": lambda *shape: torch.rand(shape) * 2 - 1,
    "gaussian": lambda *shape: torch.randn(shape),
    "heavy": lambda *shape: (
        torch.randn(shape) / torch.randn(3, *shape).square().mean(0).sqrt()
    ),  # Student's t, 3 degrees of freedom
}


def roundtrip(quantizer, x, lengths, bits):
    codes, metadata = quantizer.quantize(x, lengths, bits, quantizer.fit(x, lengths))
    return quantizer.dequantize(codes, metadata, lengths, bits)


@pytest.mark.parametrize("head_dim", [1, 5, 8, 20, 96, 128])
def test_rotation_is_block_diagonal_hadamard_orthonormal_and_its_own_inverse(head_dim):
    order = hadamard_order(head_dim)
    matrix = hadamard(torch.eye(head_dim)) / order**0.5
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, torch.eye(head_dim))
    blocks = torch.block_diag(*[torch.ones(order, order)] * (head_dim // order))
    torch.testing.assert_close(matrix.abs(), blocks / order**0.5)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rows_rotate_alike_in_any_batch(head_dim):
    x = torch.randn(33, head_dim)
    assert torch.equal(hadamard(x)[7:9], hadamard(x[7:9]))


def test_rotation_leaves_its_argument_alone():
    x = torch.randn(1, 16)
    given = x.clone()
    hadamard(x).zero_()
    assert torch.equal(x, given)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_distortion_of_a_gaussian_is_at_most_the_least_of_one_uniform_quantizer_for_all(bits):
    generator = torch.Generator().manual_seed(0)
    # Tokens of many channels, so that the measured scale of a token is close to the true one.
    x = torch.randn(128, 4096, generator=generator)
    restored = roundtrip(ROTATED.values, x, torch.tensor([128]), bits)
    distortion = (x - restored).square().mean().item()
    assert distortion <= 1.015 * GAUSSIAN_DISTORTION[bits]
    if bits < 8:  # where even many channels leave most of the last steps empty
        assert distortion == pytest.approx(GAUSSIAN_DISTORTION[bits], rel=0.015)


def gaussian_distortion(step, bits):
    """Exact mean squared error on N(0, 1): sum over cells of E[x^2] - 2 y E[x] + y^2 P."""
    levels = 2**bits
    edges = (torch.arange(1, levels, dtype=torch.float64) - levels / 2) * step
    outputs = (torch.arange(levels, dtype=torch.float64) - (levels - 1) / 2) * step
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    density = torch.cat([zero, torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi), zero])
    probability = torch.cat([zero, torch.special.ndtr(edges), one]).diff()
    first_moment = -density.diff()
    return 1 - 2 * (outputs * first_moment).sum() + (outputs.square() * probability).sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_steps_are_optimal_to_four_digits(bits):
    step = GAUSSIAN_STEP[bits]
    assert gaussian_distortion(step, bits).item() == pytest.approx(GAUSSIAN_DISTORTION[bits], rel=5e-4)
    for factor in (1 - 5e-5, 1 + 5e-5):
        assert gaussian_distortion(step, bits) < gaussian_distortion(step * factor, bits)


def quantized_error(x, bits, multiples):
    """Squared error of every token, by looking for the nearest level, if these multiples are tried: fp64 [N]."""
    with patch.dict(STEP_MULTIPLES, {bits: multiples}):
        _, metadata = ROTATED.values.quantize(x, torch.tensor([len(x)]), bits, {})
    turned = hadamard(x).double() / hadamard_order(x.shape[1]) ** 0.5
    return nearest_level_error(turned, metadata["scale"].double(), bits)


def nearest_level_error(turned, step, bits):
    levels = (torch.arange(2**bits) - (2**bits - 1) / 2) * step  # [N, levels]
    return (turned[:, :, None] - levels[:, None]).abs().amin(2).square().sum(1)


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    head_dim=st.sampled_from([1, 5, *HEAD_DIMS]),
    tails=st.sampled_from(list(NUMBERS)),
    exponent=st.integers(-3, 3),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=100)
def test_the_step_of_a_token_loses_no_more_than_any_other_that_is_tried(bits, head_dim, tails, exponent, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x = NUMBERS[tails](7, head_dim) * 10.0**exponent
    chosen = quantized_error(x, bits, STEP_MULTIPLES[bits])
    tried = [quantized_error(x, bits, multiples) for multiples in [(), *((multiple,) for multiple in STEP_MULTIPLES[bits])]]
    least = torch.stack(tried).amin(0)
    assert (chosen <= tried[0] * (1 + 1e-3)).all()  # the step for a Gaussian
    torch.testing.assert_close(chosen, least, rtol=1e-3, atol=0)


@pytest.mark.parametrize("tails", NUMBERS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("bits", "excess"), [(2, 0.01), (3, 0.06), (4, 0.05), (8, 0.07)])
def test_the_step_of_a_token_is_nearly_the_best_of_all(bits, excess, head_dim, tails):
    torch.manual_seed(0)
    turned = NUMBERS[tails](400, head_dim)
    rms, largest = turned.square().mean(1, keepdim=True).sqrt(), turned.abs().amax(1, keepdim=True)
    ends = GAUSSIAN_STEP[bits] * rms, largest / 2 ** (bits - 1)
    low, high = 0.6 * torch.minimum(*ends), 1.25 * torch.maximum(*ends)
    best = torch.full([400], torch.inf, dtype=torch.float64)
    for share in torch.linspace(0, 1, 301):
        step = low.lerp(high, share).half().double()
        middle = (turned / step).floor().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 0.5
        best = torch.minimum(best, (turned - middle * step).square().sum(1))
    x = hadamard(turned) / head_dim**0.5
    found = quantized_error(x, bits, STEP_MULTIPLES[bits])
    assert found.mean() < (1.005 + excess) * best.mean()  # 301 steps, not all


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_tokens_are_quantized_alike_in_any_batch(bits):
    x = torch.randn(BLOCK_TOKENS + 5, 16)
    codes, metadata = ROTATED.values.quantize(x, torch.tensor([len(x)]), bits, {})
    for some in (slice(3, 4), slice(BLOCK_TOKENS - 1, BLOCK_TOKENS + 2), slice(7, 7)):
        some_codes, some_metadata = ROTATED.values.quantize(x[some], torch.tensor([len(x[some])]), bits, {})
        assert torch.equal(some_codes, codes[some])
        assert torch.equal(some_metadata["scale"], metadata["scale"][some])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_error_relative_to_the_norm_of_a_token_is_bounded_for_gaussians(head_dim, bits):
    x = torch.randn(50, head_dim) * torch.logspace(-2, 3, 50)[:, None]
    restored = roundtrip(ROTATED.values, x, torch.tensor([50]), bits)
    relative = (x - restored).square().sum(1) / x.square().sum(1)
    assert relative.median() < 1.5 * GAUSSIAN_DISTORTION[bits]  # the mean hangs on the rare value beyond the last step


def test_centre_removes_a_large_common_key():
    offset = 100 * torch.randn(64)
    x = torch.randn(200, 64) + offset
    restored = roundtrip(ROTATED.keys, x, torch.tensor([200]), 4)
    assert (x - restored).square().mean() < 1.3 * GAUSSIAN_DISTORTION[4]


def test_centre_is_the_mean_of_each_run():
    lengths = torch.tensor([3, 0, 5])
    x = torch.randn(8, 20)
    centre = ROTATED.keys.fit(x, lengths)["centre"]
    expected = torch.stack([x[:3].mean(0), torch.zeros(20), x[3:].mean(0)])
    assert centre.dtype == torch.float16
    torch.testing.assert_close(centre.float(), expected, rtol=1e-3, atol=1e-4)


def test_centre_of_a_long_run_is_the_mean_of_evenly_spaced_tokens():
    lengths = [4096, 4097, 0, 8193]
    x = torch.randn(sum(lengths), 4)
    centre = ROTATED.keys.fit(x, torch.tensor(lengths))["centre"]
    runs = x.double().split(lengths)
    expected = torch.stack([runs[0].mean(0), runs[1][::2].mean(0), torch.zeros(4), runs[3][::3].mean(0)])
    assert torch.equal(centre, expected.to(torch.float16))


@pytest.mark.parametrize("quantizer", [ROTATED.keys, ROTATED.values])
def test_zeros_are_exact(quantizer):
    x = torch.zeros(5, 40)
    assert torch.equal(roundtrip(quantizer, x, torch.tensor([2, 3]), 3), x)


@pytest.mark.parametrize("quantizer", [ROTATED.keys, ROTATED.values])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_outliers_and_values_beyond_fp16_stay_finite(quantizer, bits):
    x = torch.randn(64, 64)
    x[3, 5], x[40, 6], x[41] = 1e9, -torch.inf, 65504.0
    codes, metadata = quantizer.quantize(x, torch.tensor([64]), bits, quantizer.fit(x, torch.tensor([64])))
    assert all(part.isfinite().all() for part in metadata.values())
    assert quantizer.dequantize(codes, metadata, torch.tensor([64]), bits).isfinite().all()
