import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ib_kernels import FORMATS, PackedTokens, roundtrip, tokens_nbytes

NAMES = sorted(FORMATS)
HEAD_DIMS = [8, 20, 40, 64, 80, 96, 128]

names = st.sampled_from(NAMES)
head_dims = st.sampled_from(HEAD_DIMS)
bit_widths = st.sampled_from([2, 3, 4, 8, 16])
run_lengths = st.lists(st.sampled_from([0, 1, 5, 31, 32, 33, 70]), min_size=1, max_size=4)
seeds = st.integers(0, 2**31)


def keys_and_values(tokens, head_dim, seed=0):
    """Keys with offsets and outlier channels, and values."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, tokens, head_dim, generator=generator)
    keys[:, ::5] *= 50
    return keys + 10 * torch.randn(head_dim, generator=generator), values


def pack(name, lengths, head_dim=32, key_bits=4, value_bits=4, seed=0, dtype=torch.float16):
    lengths = torch.tensor(lengths)
    keys, values = keys_and_values(int(lengths.sum()), head_dim, seed)
    return PackedTokens.pack(name, keys, values, lengths, key_bits, value_bits, dtype), keys, values


def assert_same(a, b):
    assert a.tensors().keys() == b.tensors().keys()
    for name, tensor in a.tensors().items():
        assert tensor.dtype == b.tensors()[name].dtype
        assert torch.equal(tensor, b.tensors()[name]), name


@given(name=names, lengths=run_lengths, head_dim=head_dims, key_bits=bit_widths, value_bits=bit_widths, seed=seeds)
@settings(deadline=None, max_examples=80)
def test_bytes_and_dense_round_trip_agree(name, lengths, head_dim, key_bits, value_bits, seed):
    packed, keys, values = pack(name, lengths, head_dim, key_bits, value_bits, seed)
    assert packed.lengths.dtype == torch.int32
    assert packed.lengths.tolist() == lengths
    expected = [tokens_nbytes(name, length, head_dim, key_bits, value_bits) for length in lengths]
    assert packed.nbytes == sum(expected)
    as_array = tokens_nbytes(name, np.array(lengths), head_dim, key_bits, value_bits)
    assert as_array.tolist() == expected
    unpacked_keys, unpacked_values = packed.unpack()
    assert torch.equal(unpacked_keys, roundtrip(name, "keys", keys, torch.tensor(lengths), key_bits))
    assert torch.equal(unpacked_values, roundtrip(name, "values", values, torch.tensor(lengths), value_bits))


@given(
    name=names,
    pieces=st.lists(st.lists(st.sampled_from([0, 1, 7, 32, 40]), min_size=3, max_size=3), min_size=2, max_size=4),
    head_dim=st.sampled_from([20, 32]),
    key_bits=bit_widths,
    value_bits=bit_widths,
    seed=seeds,
)
@settings(deadline=None, max_examples=60)
def test_bytes_depend_on_counts_not_on_arrival(name, pieces, head_dim, key_bits, value_bits, seed):
    packed, _, _ = pack(name, pieces[0], head_dim, key_bits, value_bits, seed)
    for lengths in pieces[1:]:
        new_keys, new_values = keys_and_values(sum(lengths), head_dim, seed)
        packed.append(new_keys, new_values, torch.tensor(lengths))
    totals = [sum(counts) for counts in zip(*pieces)]
    assert packed.lengths.tolist() == totals
    assert packed.nbytes == sum(tokens_nbytes(name, total, head_dim, key_bits, value_bits) for total in totals)
    at_once, _, _ = pack(name, totals, head_dim, key_bits, value_bits)
    assert {n: t.shape for n, t in packed.tensors().items()} == {n: t.shape for n, t in at_once.tensors().items()}


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_kivi_appended_in_whole_groups_equals_one_shot(bits):
    keys, values = keys_and_values(2 * 96, 40)
    first = torch.arange(2 * 96) % 96 < 64
    packed = PackedTokens.pack("kivi", keys[first], values[first], torch.tensor([64, 64]), bits, bits)
    packed.append(keys[~first], values[~first], torch.tensor([32, 32]))
    assert_same(packed, PackedTokens.pack("kivi", keys, values, torch.tensor([96, 96]), bits, bits))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_kivi_group_is_requantized_without_loss_while_its_range_stays(bits):
    keys, values = keys_and_values(40, 40)
    keys[:2] = torch.stack([torch.full((40,), -300.0), torch.full((40,), 300.0)])  # the range of the first group
    packed = PackedTokens.pack("kivi", keys[:10], values[:10], torch.tensor([10]), bits, bits)
    for start in range(10, 32, 2):
        packed.append(keys[start : start + 2], values[start : start + 2], torch.tensor([2]))
    assert_same(packed, PackedTokens.pack("kivi", keys[:32], values[:32], torch.tensor([32]), bits, bits))


@pytest.mark.parametrize("key_bits", [2, 3, 4, 8])
def test_rotated_keeps_its_centre_and_quantizes_tokens_apart(key_bits):
    keys, values = keys_and_values(50, 40)
    keys[20:] = torch.cat([keys[:20], keys[:10]])  # the mean of the first 20 tokens is the mean of the first 40
    packed = PackedTokens.pack("rotated", keys[:20], values[:20], torch.tensor([20]), key_bits, 3)
    centre = packed.tensors()["keys.centre"].clone()
    packed.append(keys[20:], values[20:], torch.tensor([30]))
    assert torch.equal(packed.tensors()["keys.centre"], centre)
    unpacked_keys, unpacked_values = packed.unpack()
    assert torch.equal(unpacked_keys[20:40], unpacked_keys[:20])
    at_once_keys, _ = PackedTokens.pack("rotated", keys[:40], values[:40], torch.tensor([40]), key_bits, 3).unpack()
    assert torch.equal(unpacked_keys[:40], at_once_keys)
    assert torch.equal(unpacked_values, roundtrip("rotated", "values", values, torch.tensor([50]), 3))


def test_rotated_run_that_was_empty_is_centred_on_its_first_tokens():
    keys, values = keys_and_values(20, 32)
    packed = PackedTokens.pack("rotated", keys[:0], values[:0], torch.tensor([0, 0]), 4, 4)
    packed.append(keys, values, torch.tensor([0, 20]))
    assert_same(packed, PackedTokens.pack("rotated", keys, values, torch.tensor([0, 20]), 4, 4))


@pytest.mark.parametrize("name", NAMES)
def test_appending_nothing_changes_nothing(name):
    packed, keys, values = pack(name, [5, 0, 33])
    packed.append(keys[:0], values[:0], torch.tensor([0, 0, 0]))
    assert_same(packed, pack(name, [5, 0, 33])[0])


@given(name=names, lengths=run_lengths, key_bits=bit_widths, data=st.data())
@settings(deadline=None, max_examples=40)
def test_select_is_packing_the_selected_runs(name, lengths, key_bits, data):
    pairs = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=6))
    packed, keys, values = pack(name, lengths, key_bits=key_bits, value_bits=3)
    selected = packed.select(torch.tensor(pairs, dtype=torch.int64))
    runs = [(keys.split(lengths)[pair], values.split(lengths)[pair]) for pair in pairs]
    some_keys = torch.cat([keys[:0], *(run_keys for run_keys, _ in runs)])
    some_values = torch.cat([values[:0], *(run_values for _, run_values in runs)])
    some_lengths = torch.tensor([lengths[pair] for pair in pairs], dtype=torch.int64)
    assert_same(selected, PackedTokens.pack(name, some_keys, some_values, some_lengths, key_bits, 3))


@pytest.mark.parametrize("name", NAMES)
def test_selection_does_not_share_memory_with_its_source(name):
    packed, keys, values = pack(name, [5, 33])
    copy = packed.select(torch.tensor([0, 1]))
    copy.append(keys, values, torch.tensor([5, 33]))
    assert_same(packed, pack(name, [5, 33])[0])


@given(lengths=run_lengths, key_bits=bit_widths, data=st.data())
@settings(deadline=None, max_examples=40)
def test_without_first_the_others_are_as_they_were(lengths, key_bits, data):
    packed, _, _ = pack("rotated", lengths, key_bits=key_bits, value_bits=3)
    gone = [data.draw(st.integers(0, length)) for length in lengths]
    rest = packed.without_first(torch.tensor(gone))
    assert rest.lengths.tolist() == [length - n for length, n in zip(lengths, gone)]
    for found, before in zip(rest.unpack(), packed.unpack()):
        assert torch.equal(found, torch.cat([run[n:] for run, n in zip(before.split(lengths), gone)]))
    expected = sum(tokens_nbytes("rotated", n, 32, key_bits, 3) for n in rest.lengths.tolist())
    assert rest.nbytes == sum(tensor.untyped_storage().nbytes() for tensor in rest.tensors().values()) == expected


def test_without_first_refuses_groups_and_more_than_there_are():
    with pytest.raises(ValueError, match="stored in groups"):
        pack("kivi", [40])[0].without_first(torch.tensor([3]))
    for gone in ([6, 0], [-1, 0], [1]):
        with pytest.raises(ValueError, match="each of the 2 runs"):
            pack("rotated", [5, 33])[0].without_first(torch.tensor(gone))


def test_lengths_of_the_caller_are_copied():
    lengths = torch.tensor([3], dtype=torch.int32)
    packed = PackedTokens.pack("kivi", torch.zeros(3, 8), torch.zeros(3, 8), lengths, 4, 4)
    lengths += 1
    assert packed.lengths.tolist() == [3]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_is_raw_storage(name, dtype):
    packed, keys, values = pack(name, [5, 33], key_bits=16, value_bits=16, dtype=dtype)
    unpacked_keys, unpacked_values = packed.unpack()
    assert torch.equal(unpacked_keys, keys.to(dtype).float())
    assert torch.equal(unpacked_values, values.to(dtype).float())
    assert packed.nbytes == 2 * 38 * 32 * 2 + 2 * 8
    assert torch.equal(roundtrip(name, "keys", keys, torch.tensor([5, 33]), 16, dtype), unpacked_keys)


def test_raw_storage_saturates():
    x = torch.full((1, 8), 1e6)
    keys, _ = PackedTokens.pack("kivi", x, x, torch.tensor([1]), 16, 16).unpack()
    assert torch.equal(keys, torch.full((1, 8), 65504.0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_input_computes_in_float32(name, dtype):
    keys, values = keys_and_values(40, 32)
    keys, values = keys.to(dtype), values.to(dtype)
    lengths = torch.tensor([40])
    packed = PackedTokens.pack(name, keys, values, lengths, 4, 4)
    assert_same(packed, PackedTokens.pack(name, keys.float(), values.float(), lengths, 4, 4))
    assert roundtrip(name, "keys", keys, lengths, 4).dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_takes_each_run_alone(name):
    x, lengths = torch.randn(72, 24), [33, 0, 32, 7]
    runs = [roundtrip(name, "keys", run, torch.tensor([len(run)]), 4) for run in x.split(lengths)]
    assert torch.equal(roundtrip(name, "keys", x, torch.tensor(lengths), 4), torch.cat(runs))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [2, 16])
@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_round_trip_of_nothing(name, bits, lengths):
    nothing, lengths = torch.zeros(0, 24), torch.tensor(lengths, dtype=torch.int64)
    assert roundtrip(name, "keys", nothing, lengths, bits).shape == (0, 24)
    assert roundtrip(name, "values", nothing, lengths, bits).shape == (0, 24)


@pytest.mark.parametrize(
    ("name", "tokens", "head_dim", "key_bits", "value_bits", "expected"),
    [
        ("kivi", 0, 64, 4, 4, 8),
        ("kivi", 33, 64, 2, 4, 8 + 33 * 16 + 2 * 64 * 4 + 33 * 32 + 33 * 2 * 4),
        ("kivi", 32, 20, 3, 16, 8 + 32 * 12 + 20 * 4 + 32 * 40),
        ("rotated", 0, 64, 4, 4, 8 + 128),
        ("rotated", 33, 64, 2, 4, 8 + 33 * (16 + 2) + 128 + 33 * (32 + 2)),
        ("rotated", 5, 64, 16, 16, 8 + 2 * 5 * 128),
    ],
)
def test_bytes_of_a_run(name, tokens, head_dim, key_bits, value_bits, expected):
    nbytes = tokens_nbytes(name, tokens, head_dim, key_bits, value_bits)
    assert nbytes == expected
    assert isinstance(nbytes, int)


def test_bytes_of_many_counts_keep_their_shape():
    counts = np.arange(12, dtype=np.int32).reshape(3, 4)
    nbytes = tokens_nbytes("kivi", counts, 64, 2, 4)
    assert nbytes.dtype == np.int64
    assert nbytes.tolist() == [[tokens_nbytes("kivi", int(n), 64, 2, 4) for n in row] for row in counts]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"key_bits": 5}, r"cannot store 5 bits: use one of \[2, 3, 4, 8, 16\]"),
        ({"value_bits": 1}, "cannot store 1 bits"),
        ({"format_name": "zip"}, r"unknown format 'zip': use one of \['kivi', 'rotated', 'spectral'\]"),
        ({"keys": torch.zeros(3, 8, dtype=torch.int64)}, "must be floats"),
        ({"keys": torch.zeros(3, 16)}, r"must both be \[N, D\]"),
        ({"keys": torch.zeros(3), "values": torch.zeros(3)}, r"must both be \[N, D\]"),
        ({"lengths": torch.tensor([1, 1])}, "lengths sum to 2, but there are 3 rows"),
        ({"lengths": torch.tensor([4, -1])}, "negative"),
        ({"dtype": torch.float32}, r"pass torch\.float16 or torch\.bfloat16"),
    ],
)
def test_pack_refuses(arguments, message):
    good = {
        "format_name": "kivi",
        "keys": torch.zeros(3, 8),
        "values": torch.zeros(3, 8),
        "lengths": torch.tensor([1, 2]),
        "key_bits": 4,
        "value_bits": 4,
    }
    with pytest.raises(ValueError, match=message):
        PackedTokens.pack(**{**good, **arguments})


def test_append_refuses_other_runs_and_head_dims():
    packed, keys, values = pack("kivi", [1, 2])
    with pytest.raises(ValueError, match="one length"):
        packed.append(keys, values, torch.tensor([3]))
    with pytest.raises(ValueError, match="head_dim 32"):
        packed.append(keys[:, :16], values[:, :16], torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="pairs must lie in"):
        packed.select(torch.tensor([2]))


@pytest.mark.parametrize("tokens", [-1, 1.5, np.array([1, -1]), np.array([0.5])])
def test_bytes_refuse_what_is_no_count(tokens):
    with pytest.raises(ValueError, match="counts"):
        tokens_nbytes("kivi", tokens, 64, 4, 4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_values_do_not_depend_on_their_neighbours(name, bits):
    _, values = keys_and_values(70, 40)
    together = roundtrip(name, "values", values, torch.tensor([70]), bits)
    some = torch.tensor([0, 3, 4, 31, 32, 69])
    assert torch.equal(roundtrip(name, "values", values[some], torch.tensor([2, 4]), bits), together[some])


def test_round_trip_refuses_integers_and_vectors():
    with pytest.raises(ValueError, match="expected floats"):
        roundtrip("kivi", "keys", torch.zeros(4, 8, dtype=torch.int32), torch.tensor([4]), 4)
    with pytest.raises(ValueError, match="expected floats"):
        roundtrip("kivi", "values", torch.zeros(8), torch.tensor([8]), 4)
