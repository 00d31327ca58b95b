"""Schedules: every token is read once, by items of about one size, and no shape depends on the lengths."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ib_kernels import quantize_pack, schedule
from ib_kernels.scheduling import BLOCK_TOKENS, MIN_ITEM_TOKENS

CPU = torch.device("cpu")
some_lengths = st.lists(st.sampled_from([0, 1, 31, 32, 33, 127, 129, 700, 5000]), min_size=3, max_size=3)


def packed(fmt, lengths, pairs=None):
    counts = torch.tensor(lengths, dtype=torch.int32)
    owners = torch.tensor(range(len(lengths)) if pairs is None else pairs, dtype=torch.int32)
    zeros = torch.zeros(1, 1, sum(lengths), 16)
    return quantize_pack(fmt, zeros, zeros, torch.arange(sum(lengths)), counts, owners, 2, 2)


@given(lengths=some_lengths, items=st.integers(1, 40))
@settings(deadline=None, max_examples=40)
def test_every_token_is_read_once(lengths, items):
    part = packed("kivi", lengths, [2, 0, 2])
    table = schedule([part], 3, CPU, items=items).items[0]
    first = [0, lengths[0], lengths[0] + lengths[1]]
    blocks = [-(-n // BLOCK_TOKENS) for n in lengths]
    read = torch.zeros(sum(lengths), dtype=torch.int64)
    for row, tokens, block, run, _ in table.tolist():
        if tokens:
            assert first[run] <= row and row + tokens <= first[run] + lengths[run]
            assert (row - first[run]) % BLOCK_TOKENS == 0
            assert block == sum(blocks[:run]) + (row - first[run]) // BLOCK_TOKENS
            read[row : row + tokens] += 1
    assert (read == 1).all()


@given(lengths=some_lengths, others=some_lengths, items=st.integers(1, 40))
@settings(deadline=None, max_examples=40)
def test_slots_of_a_pair_are_its_window_and_its_items(lengths, others, items):
    parts = [packed("kivi", lengths, [2, 0, 2]), packed("rotated", others)]
    made = schedule(parts, 3, CPU, items=items)
    slots = made.slots.tolist()
    expected = {pair: {slots[pair]} for pair in range(3)}
    for part, table in zip(parts, made.items):
        for _, tokens, _, run, slot in table.tolist():
            if tokens:
                pair = int(part.pairs[run])
                assert slot not in expected[pair]
                assert bool(made.rotated[slot]) == (part.format == "rotated")
                expected[pair].add(slot)
    for pair in range(3):
        assert expected[pair] == set(range(slots[pair], slots[pair + 1]))


@given(lengths=some_lengths, others=some_lengths, items=st.integers(1, 40))
@settings(deadline=None, max_examples=40)
def test_shapes_do_not_depend_on_lengths(lengths, others, items):
    """So the launches that a CUDA graph has captured serve all lengths."""
    made = [schedule([packed("rotated", some)], 3, CPU, items=items) for some in (lengths, others)]
    assert len({some.items[0].shape for some in made}) == len({some.rotated.shape for some in made}) == 1
    assert len({some.slots.shape for some in made}) == 1


def test_a_part_without_runs_has_no_work():
    made = schedule([packed("rotated", [])], 3, CPU, items=5)
    assert made.items[0].shape == (5, 5) and not made.items[0].any()
    assert made.slots.tolist() == [0, 1, 2, 3]


def test_skewed_lengths_give_items_of_one_size():
    part = packed("kivi", [20000, 300, 300, 300])
    tokens = schedule([part], 4, CPU, items=100).items[0][:, 1]
    assert tokens.max() <= 2 * max(MIN_ITEM_TOKENS, 20900 // 100)
    assert (tokens > 0).sum() >= 80
