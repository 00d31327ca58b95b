"""The quantized window against a list of the tokens that it should hold."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ib_analysis.cache.quantized_window import QuantizedWindow

BATCH, HEADS, CHANNELS = 3, 2, 16
STEPS = st.lists(st.tuples(st.sampled_from(["append", "drop", "select", "move"]), st.integers(0, 5)), max_size=8)


def block(tokens, generator):
    keys, values = torch.randn(2, BATCH, HEADS, tokens, CHANNELS, generator=generator).half().float()
    return keys, values, torch.rand(BATCH, tokens, generator=generator) < 0.7


@settings(deadline=None)
@given(STEPS, st.integers(0, 3))
def test_it_holds_what_came_last_whatever_else_is_done(steps, seed):
    generator = torch.Generator().manual_seed(seed)
    keys, values, present = block(6, generator)
    window = QuantizedWindow.pack(keys, values, present, torch.float16, "reference")
    held = list(window.unpack())
    for step, number in steps:
        if step == "append":
            keys, values, more = block(number, generator)
            window.append(keys, values, more)
            stored = [x[:, :, present.shape[1] :] for x in window.unpack()]
            held, present = [torch.cat(both, 2) for both in zip(held, stored)], torch.cat([present, more], 1)
            for x, new in zip(stored, (keys, values)):
                new = new * more[:, None, :, None]
                assert (x - new).norm() <= 0.4 * new.norm() + 1e-6
        elif step == "drop":
            count = min(number, len(window))
            window.drop(count)
            held, present = [x[:, :, count:] for x in held], present[:, count:]
        elif step == "select":
            order = torch.randperm(BATCH, generator=generator)
            window.select(order)
            held, present = [x[order] for x in held], present[order]
        else:
            window.to(torch.device("cpu"))
        assert len(window) == present.shape[1]
        assert torch.equal(window.present, present)
        assert window.tokens.lengths.tolist() == present.sum(1).repeat_interleave(HEADS).tolist()
        for x, expected in zip(window.unpack(), held):
            assert torch.equal(x, expected)


def test_a_mask_is_held_only_where_there_is_padding():
    keys, values, _ = block(4, torch.Generator().manual_seed(0))
    full = QuantizedWindow.pack(keys, values, torch.ones(BATCH, 4, dtype=torch.bool), torch.float16, "reference")
    padded = QuantizedWindow.pack(keys, values, torch.arange(4).expand(BATCH, -1) > 1, torch.float16, "reference")
    assert len(padded.tensors()) == len(full.tensors()) + 1
    padded.drop(2)
    assert len(padded.tensors()) == len(full.tensors())


def test_16_bit_models_are_read_as_they_are():
    keys, values, present = block(5, torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float16):
        window = QuantizedWindow.pack(keys.to(dtype), values.to(dtype), present, dtype, "reference")
        assert (window.unpack()[1] - values * present[:, None, :, None]).norm() < 0.2 * values.norm()
