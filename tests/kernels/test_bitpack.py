import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ib_kernels import pack, unpack, words_per_token

BITS = [2, 3, 4, 8]


@given(tokens=st.integers(0, 40), head_dim=st.integers(1, 130), bits=st.sampled_from(BITS), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_unpack_inverts_pack(tokens, head_dim, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (tokens, head_dim), generator=generator, dtype=torch.uint8)
    words = pack(codes, bits)
    assert words.dtype == torch.int16
    assert words.shape == (tokens, words_per_token(head_dim, bits))
    assert torch.equal(unpack(words, bits, head_dim), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [8, 20, 40, 64, 80, 96, 128])
def test_largest_codes_survive_the_sign_bit(bits, head_dim):
    codes = torch.full((3, head_dim), 2**bits - 1, dtype=torch.int64)
    assert torch.equal(unpack(pack(codes, bits), bits, head_dim), codes.to(torch.uint8))


@pytest.mark.parametrize(("head_dim", "bits", "words"), [(8, 2, 2), (16, 3, 3), (20, 4, 8), (80, 8, 40), (128, 2, 16)])
def test_words_per_token_pads_channels_to_sixteen(head_dim, bits, words):
    assert words_per_token(head_dim, bits) == words


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fields_are_stripes_of_channels(bits):
    head_dim, fields = 64, 16 // bits
    stripe = head_dim // fields
    codes = torch.randint(0, 2**bits, (5, head_dim))
    words = pack(codes, bits).to(torch.int64) & 0xFFFF
    for field in range(fields):
        values = (words >> (field * bits)) & (2**bits - 1)
        assert torch.equal(values, codes[:, field * stripe : (field + 1) * stripe])


def test_three_bits_are_a_two_bit_plane_and_a_one_bit_plane():
    codes = torch.randint(0, 8, (5, 48))
    words = pack(codes, 3)
    assert torch.equal(words[:, :6], pack(codes & 3, 2))
    high = words[:, 6:].to(torch.int64) & 0xFFFF  # [5, 3], sixteen fields of one bit
    for field in range(16):
        assert torch.equal((high >> field) & 1, codes[:, field * 3 : (field + 1) * 3] >> 2)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype_packs_alike(dtype):
    codes = torch.arange(16).repeat(2, 2)
    assert torch.equal(pack(codes.to(dtype), 4), pack(codes, 4))


def test_codes_need_not_be_contiguous():
    codes = torch.randint(0, 16, (40, 6)).T
    assert torch.equal(unpack(pack(codes, 4), 4, 40), codes.to(torch.uint8))


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.zeros(2, 16, dtype=torch.uint8), 5, r"use one of \[2, 3, 4, 8\]"),
        (torch.zeros(2, 16), 4, "convert them to uint8"),
        (torch.zeros(2, 16, dtype=torch.bool), 4, "convert them to uint8"),
        (torch.zeros(16, dtype=torch.uint8), 4, "flatten"),
        (torch.full((2, 16), 4), 2, "clamp"),
        (torch.full((2, 16), -1), 2, "clamp"),
    ],
)
def test_pack_refuses(codes, bits, message):
    with pytest.raises(ValueError, match=message):
        pack(codes, bits)


def test_unpack_refuses_words_of_another_shape():
    words = pack(torch.zeros(2, 32, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="same bits and head_dim"):
        unpack(words, 2, 32)
    with pytest.raises(ValueError, match="same bits and head_dim"):
        unpack(words.int(), 4, 32)
    with pytest.raises(ValueError, match="use one of"):
        unpack(words, 5, 32)
