import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ib_kernels import Bases, PackedTokens, SideName, Window, packed_attention, partial_attention, quantize_pack, roundtrip, turn
from ib_kernels.formats.spectral import SPECTRAL, reference
from ib_kernels.formats.spectral.reference import (
    GAUSSIAN_ERROR,
    GAUSSIAN_STEP,
    PART_BITS,
    PATTERNS,
    _decode,
    _encode,
    _join,
    _patterns,
    _split,
)

PRECISIONS = (2, 3, 4, 8)


def bases_of(heads, head_dim, seed=0):
    """Invertible matrices that neither keep angles nor lengths."""
    generator = torch.Generator().manual_seed(seed)
    into = torch.randn(heads, head_dim, head_dim, generator=generator, dtype=torch.float64)
    into += 2 * head_dim**0.5 * torch.eye(head_dim, dtype=torch.float64)
    return Bases(into.float(), into.float().double().inverse().float())


@pytest.mark.parametrize("bits", PRECISIONS)
def test_bits_of_the_quarters_have_the_precision_as_their_mean(bits):
    for pattern in PATTERNS[bits]:
        assert sum(pattern) == 4 * bits and list(pattern) == sorted(pattern, reverse=True)
        assert set(pattern) <= set(GAUSSIAN_STEP)
    assert PATTERNS[bits][0] == (bits,) * 4 and sum(PART_BITS) == 16


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_pattern_is_the_one_of_least_error(bits):
    """Of runs with spectra from flat to steep, each stored with the pattern that is best for it."""
    generator, chosen = torch.Generator().manual_seed(0), set()
    for slope in (0.0, 0.5, 1.0, 1.7):
        x = torch.randn(256, 256, generator=generator) * 2.0 ** (-slope * torch.arange(4.0)).repeat_interleave(64)
        fitted = SPECTRAL.keys.fit(x, torch.tensor([256]))
        found = int(_patterns(fitted, bits))
        stored = [_decode(*_encode(x, depths, bits), depths, bits) for depths in PATTERNS[bits]]
        errors = [float((some - x).square().sum()) for some in stored]
        assert errors[found] < 1.05 * min(errors)
        chosen.add(found)
    assert len(chosen) > 2


@given(st.lists(st.tuples(st.integers(1, 10), st.integers(0, 2**10 - 1)), min_size=1, max_size=6))
def test_joined_numbers_can_be_split(pairs):
    widths = tuple(width for width, _ in pairs)
    numbers = [torch.tensor([number % 2**width]) for width, number in pairs]
    assert [int(x) for x in _split(_join(numbers, widths), widths)] == [int(x) for x in numbers]


@pytest.mark.parametrize("bits", PRECISIONS)
def test_each_quarter_has_the_error_of_its_bits(bits):
    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(0)) * torch.tensor([8.0, 3.0, 2.0, 1.0]).repeat_interleave(
        64
    )
    lengths = torch.tensor([512])
    found = roundtrip("spectral", "keys", x, lengths, bits)
    depths = PATTERNS[bits][int(_patterns(SPECTRAL.keys.fit(x, lengths), bits))]
    for depth, exact, stored in zip(depths, x.chunk(4, 1), found.chunk(4, 1)):
        error = float((exact - stored).square().mean() / exact.square().mean())
        assert error < 1.25 * GAUSSIAN_ERROR[depth]  # 1.25: steps are parts of an octave apart


@pytest.mark.parametrize("depth", GAUSSIAN_STEP)
def test_steps_and_errors_are_those_of_the_best_quantizer_of_a_gaussian(depth):
    x = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def error(step):
        half = 2 ** (depth - 1)
        return float((((x / step).floor().clamp(-half, half - 1) + 0.5) * step - x).square().mean())

    step = GAUSSIAN_STEP[depth]
    assert error(step) == pytest.approx(GAUSSIAN_ERROR[depth], rel=0.05)
    assert error(step) < min(error(0.9 * step), error(1.1 * step))


@pytest.mark.parametrize("bits", PRECISIONS)
def test_a_sorted_spectrum_loses_less_than_rotated(bits):
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)) * 2.0 ** -(torch.arange(64) // 8).float()
    lengths = torch.tensor([256])
    errors = [float((roundtrip(fmt, "keys", x, lengths, bits) - x).square().mean()) for fmt in ("spectral", "rotated")]
    assert errors[0] < 0.6 * errors[1]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=4), st.sampled_from(PRECISIONS), st.integers(0, 5))
def test_tokens_that_are_appended_get_the_codes_that_they_get_at_once(lengths, bits, seed):
    torch.manual_seed(seed)
    heads, first = len(lengths), torch.tensor(lengths)
    keys, values = torch.randn(2, int(first.sum()), 16)
    more = torch.randn(2, heads * 3, 16)
    empty = torch.zeros(0, 16)
    bases = bases_of(heads, 16)

    def packed(rows_k, rows_v, counts):
        counts, pairs = counts.int(), torch.arange(heads, dtype=torch.int32)
        rows = torch.arange(len(rows_k))
        return PackedTokens(
            quantize_pack("spectral", rows_k[None, None], rows_v[None, None], rows, counts, pairs, bits, 4, bases=bases)
        )

    once = packed(keys, values, first)
    grown = packed(empty, empty, first * 0)
    grown.append(keys, values, first)
    assert all(torch.equal(a, b) for a, b in zip(once.tensors().values(), grown.tensors().values()))
    once.append(*more, torch.full((heads,), 3))
    for token in range(3):
        grown.append(*more[:, token::3], torch.full((heads,), 1))
    assert all(torch.equal(a, b) for a, b in zip(once.tensors().values(), grown.tensors().values()))


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("bits", PRECISIONS)
def test_a_run_may_begin_with_few_tokens(bits, first):
    """Which say nothing of how far later ones are from them."""
    torch.manual_seed(0)
    keys = torch.randn(200, 64)
    begun = PackedTokens.pack("spectral", keys[:first], keys[:first], torch.tensor([first]), bits, 4)
    for some in (keys[first:9], keys[9:]):
        begun.append(some, some, torch.tensor([len(some)]))
    errors = (begun.unpack()[0] - keys).square().mean() / roundtrip("rotated", "keys", keys, torch.tensor([200]), bits).sub(
        keys
    ).square().mean()
    assert errors < 8  # around the first token, deviations are larger


@pytest.mark.parametrize("bits", PRECISIONS)
def test_tokens_that_are_much_larger_cost_only_themselves(bits):
    torch.manual_seed(0)
    keys = torch.randn(256, 64)
    errors, one = [], keys[7].clone()
    for factor in (1, 20, 100):
        keys[7] = factor * one
        found = roundtrip("spectral", "keys", keys, torch.tensor([256]), bits) - keys
        errors.append(float(found[torch.arange(256) != 7].square().mean()))
        assert found[7].square().mean() < 0.5 * keys[7].square().mean()
    assert max(errors) < 1.5 * errors[0]


def test_bases_are_those_of_the_pairs_and_take_no_bytes():
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 3, 10, 32)  # two sequences, three heads
    lengths, pairs = torch.full((6,), 10, dtype=torch.int32), torch.arange(6, dtype=torch.int32)
    bases, rows = bases_of(3, 32), torch.arange(60)
    tokens = PackedTokens(quantize_pack("spectral", keys, values, rows, lengths, pairs, 8, 8, bases=bases))
    plain = PackedTokens(quantize_pack("spectral", keys, values, rows, lengths, pairs, 8, 8))
    assert tokens.nbytes == plain.nbytes
    flat = keys.flatten(0, 2)
    assert (tokens.unpack()[0] - flat).abs().max() < 0.1
    in_order = turn(flat, lengths, bases.of(torch.arange(6) % 3).into)
    expected = turn(roundtrip("spectral", "keys", in_order, lengths, 8), lengths, bases.of(torch.arange(6) % 3).back)
    assert torch.equal(tokens.unpack()[0], expected)
    assert torch.equal(roundtrip("spectral", "keys", flat, lengths, 8, bases=bases.of(torch.arange(6) % 3)), expected)
    chosen = tokens.select(torch.tensor([4, 1]), torch.tensor([4, 1], dtype=torch.int32))
    assert torch.equal(chosen.unpack()[0], torch.cat([expected[40:50], expected[10:20]]))
    with pytest.raises(ValueError, match="pass the pairs"):
        tokens.select(torch.tensor([1]))
    assert torch.equal(tokens.to("cpu").unpack()[0], expected)


def test_other_formats_values_and_16_bits_have_no_bases():
    x, lengths, bases = torch.randn(5, 16), torch.tensor([5]), bases_of(1, 16)
    cases: list[tuple[str, SideName, int]] = [("rotated", "keys", 4), ("spectral", "values", 4), ("spectral", "keys", 16)]
    for fmt, side, bits in cases:
        assert torch.equal(roundtrip(fmt, side, x, lengths, bits, bases=bases), roundtrip(fmt, side, x, lengths, bits))


def test_attention_in_coordinates_is_that_to_the_keys():
    torch.manual_seed(0)
    keys, values, query = torch.randn(1, 2, 30, 32), torch.randn(1, 2, 30, 32), torch.randn(2, 4, 32)
    lengths, pairs = torch.full((2,), 30, dtype=torch.int32), torch.arange(2, dtype=torch.int32)
    packed = quantize_pack("spectral", keys, values, torch.arange(60), lengths, pairs, 8, 8, bases=bases_of(2, 32))
    window = Window(*torch.randn(2, 2, 3, 32))
    out, lse = packed_attention(query, [packed], window, 0.2)
    mask = torch.ones(2, 1, 33, dtype=torch.bool)
    all_keys, all_values = (torch.cat([x[0], own], 1) for x, own in ((keys, window.keys), (values, window.values)))
    exact, exact_lse = partial_attention(query, all_keys, all_values, mask, 0.2)
    torch.testing.assert_close(out, exact, atol=0.03, rtol=0)
    torch.testing.assert_close(lse, exact_lse, atol=0.03, rtol=0)


def test_numbers_that_are_none_stay_within_their_token():
    x = torch.randn(6, 16)
    quantizer, lengths = SPECTRAL.keys, torch.tensor([6])
    fitted = quantizer.fit(x, lengths)
    broken = x.clone()
    broken[2, 5], broken[3, 1] = torch.nan, torch.inf
    codes, metadata = quantizer.quantize(broken, lengths, 4, fitted)
    found = quantizer.dequantize(codes, metadata, lengths, 4)
    assert found[2].isnan().all() and found[[0, 1, 3, 4, 5]].isfinite().all()


def test_constant_and_huge_keys_are_stored():
    for x in (torch.zeros(4, 16), torch.full((4, 16), 3.0), torch.full((4, 16), 1e30), torch.randn(4, 16) * 1e-6):
        found = roundtrip("spectral", "keys", x, torch.tensor([4]), 4)
        torch.testing.assert_close(found, x.clamp(-65504, 65504), rtol=2e-3, atol=1e-3)


def test_channels_must_have_quarters():
    with pytest.raises(ValueError, match="multiple of 4, not 6"):
        roundtrip("spectral", "keys", torch.randn(3, 6), torch.tensor([3]), 4)


def test_the_default_dtype_does_not_show():
    x, lengths = torch.randn(200, 32) * torch.linspace(0.1, 9, 32), torch.tensor([120, 80])
    expected = roundtrip("spectral", "keys", x, lengths, 3)
    reference._powers.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = roundtrip("spectral", "keys", x, lengths, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
