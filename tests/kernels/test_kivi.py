import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ib_kernels.formats.kivi import KIVI
from ib_kernels.formats.kivi.reference import GROUP_CHANNELS, GROUP_TOKENS

BITS = [2, 3, 4, 8]
HEAD_DIMS = [8, 20, 40, 64, 80, 96, 128]
SIDES = {"keys": KIVI.keys, "values": KIVI.values}


def roundtrip(quantizer, x, lengths, bits):
    codes, metadata = quantizer.quantize(x, lengths, bits, {})
    return quantizer.dequantize(codes, metadata, lengths, bits), codes, metadata


def scale_of_element(side, metadata, lengths, head_dim):
    """The scale that each element [N, D] is quantized with."""
    scale = metadata["scale"].float()
    if side == "values":
        return scale.repeat_interleave(GROUP_CHANNELS, 1)[:, :head_dim]
    rows, first_group = [], 0
    for length in lengths.tolist():
        rows.append(scale[first_group:].repeat_interleave(GROUP_TOKENS, 0)[:length])
        first_group += -(-length // GROUP_TOKENS)
    return torch.cat(rows)


def hard_values(tokens, head_dim, seed, offset, spread):
    """Gaussians around offsets that differ by channel, every seventh channel a hundredfold outlier."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, head_dim, generator=generator) * spread
    x[:, ::7] *= 100
    return x + offset * torch.randn(head_dim, generator=generator)


@pytest.mark.parametrize("side", SIDES)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 5, 31, 32, 33, 70]), min_size=1, max_size=4),
    head_dim=st.sampled_from(HEAD_DIMS),
    bits=st.sampled_from(BITS),
    offset=st.sampled_from([0.0, 1.0, 30.0, 1000.0]),
    spread=st.sampled_from([1e-6, 1e-3, 1.0, 50.0]),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=100)
def test_error_is_at_most_half_a_step_and_requantizing_changes_nothing(side, lengths, head_dim, bits, offset, spread, seed):
    lengths = torch.tensor(lengths)
    x = hard_values(int(lengths.sum()), head_dim, seed, offset, spread)
    restored, codes, metadata = roundtrip(SIDES[side], x, lengths, bits)
    step = scale_of_element(side, metadata, lengths, head_dim)
    assert ((x - restored).abs() <= 0.5002 * step).all()
    again, codes_again, metadata_again = roundtrip(SIDES[side], restored, lengths, bits)
    assert torch.equal(again, restored)
    assert torch.equal(codes_again, codes)
    assert all(torch.equal(metadata_again[name], metadata[name]) for name in metadata)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bits", BITS)
def test_step_is_the_range_over_the_number_of_levels(side, bits):
    lengths = torch.tensor([32])
    x = torch.randn(32, 32)
    _, codes, metadata = roundtrip(SIDES[side], x, lengths, bits)
    axis = 0 if side == "keys" else 1
    expected = (x.amax(axis) - x.amin(axis)) / (2**bits - 1)
    torch.testing.assert_close(metadata["scale"].float().flatten(), expected, rtol=2e-3, atol=0)
    assert (codes.amin(axis) == 0).all()
    assert (codes.amax(axis) == 2**bits - 1).all()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("constant", [0.0, 1.0, -3.5, 65504.0])
def test_constant_groups_are_exact(side, constant):
    x = torch.full((40, 20), constant)
    restored, _, _ = roundtrip(SIDES[side], x, torch.tensor([40]), 2)
    assert torch.equal(restored, x)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bits", BITS)
def test_values_beyond_fp16_saturate(side, bits):
    x = torch.randn(64, 64)
    x[3, 5], x[40, 6], x[41, 7] = 1e9, -1e9, torch.inf
    restored, _, metadata = roundtrip(SIDES[side], x, torch.tensor([64]), bits)
    assert metadata["scale"].isfinite().all()
    assert metadata["minimum"].isfinite().all()
    step = scale_of_element(side, metadata, torch.tensor([64]), 64)
    assert ((x.clamp(-65504, 65504) - restored).abs() <= 0.5002 * step).all()


@pytest.mark.parametrize("side", SIDES)
def test_nan_stays_within_its_group(side):
    x = torch.randn(64, 64)
    x[3, 5] = torch.nan
    restored, _, _ = roundtrip(SIDES[side], x, torch.tensor([64]), 4)
    expected = torch.zeros(64, 64, dtype=torch.bool)
    expected[(slice(0, 32), 5) if side == "keys" else (3, slice(0, 32))] = True
    assert torch.equal(restored.isnan(), expected)


def test_key_groups_do_not_cross_runs():
    lengths = torch.tensor([5, 0, 40, 32])
    x = torch.randn(77, 16)
    together, _, metadata = roundtrip(KIVI.keys, x, lengths, 3)
    apart = [roundtrip(KIVI.keys, run, torch.tensor([len(run)]), 3)[0] for run in x.split(lengths.tolist())]
    assert torch.equal(together, torch.cat(apart))
    assert metadata["scale"].shape == metadata["minimum"].shape == (1 + 0 + 2 + 1, 16)


def test_outlier_channel_of_keys_leaves_other_channels_alone():
    x = torch.randn(32, 16)
    x[:, 3] *= 200
    lengths = torch.tensor([32])
    with_outlier, _, _ = roundtrip(KIVI.keys, x, lengths, 4)
    x[:, 3] = 0
    without, _, _ = roundtrip(KIVI.keys, x, lengths, 4)
    kept = torch.arange(16) != 3
    assert torch.equal(with_outlier[:, kept], without[:, kept])


@pytest.mark.parametrize(("head_dim", "groups"), [(8, 1), (20, 1), (40, 2), (80, 3), (128, 4)])
def test_short_last_group_of_channels(head_dim, groups):
    x = torch.randn(3, head_dim)
    _, _, metadata = roundtrip(KIVI.values, x, torch.tensor([3]), 4)
    assert metadata["scale"].shape == (3, groups)
    last = x[:, (groups - 1) * GROUP_CHANNELS :]
    assert torch.equal(metadata["minimum"][:, -1], last.amin(1).half())
