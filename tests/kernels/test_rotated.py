import math

import pytest
import torch
from ib_kernels.formats.rotated import ROTATED
from ib_kernels.formats.rotated.reference import GAUSSIAN_STEP, hadamard, hadamard_order

# Mean squared error of the optimal uniform quantizer of N(0, 1).
GAUSSIAN_DISTORTION = {2: 0.11885, 3: 0.03744, 4: 0.01154, 8: 8.769e-5}
HEAD_DIMS = [8, 20, 40, 64, 80, 96, 128]


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
def test_distortion_of_a_gaussian_is_the_least_of_a_uniform_quantizer(bits):
    generator = torch.Generator().manual_seed(0)
    # Tokens of many channels, so that the measured scale of a token is close to the true one.
    x = torch.randn(128, 4096, generator=generator)
    restored = roundtrip(ROTATED.values, x, torch.tensor([128]), bits)
    distortion = (x - restored).square().mean().item()
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
