"""One layer of the compressed cache: what leaves its windows, in which order, and what it answers."""

from dataclasses import replace

import pytest
import torch

from ib_analysis.cache.attention import cache_argument, causal_mask, full_attention, use_attention
from ib_analysis.cache.compressed import CompressedCache
from ib_analysis.cache.layer import CompressedLayer
from ib_analysis.cache.masks import MaskCheck
from ib_analysis.cache.plan import RAW, HeadPlan, Recent, Tier
from ib_analysis.scorers import SCORERS
from ib_analysis.scorers.learned import Learned
from tests.cache.test_compressed import BOTH, compressing_plans, generate, padded_batch, small_model, spec_of


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
def test_the_quantized_window_holds_all_tokens_before_they_are_ranked(name, batch):
    """As a plan would that keeps all at the same bits, through forty tokens of an answer; then the oldest are evicted."""
    model = small_model(name)
    ids, mask = padded_batch(batch)
    use_attention(model)
    short, long = (spec_of(model, Recent(2, 4, 4, quantized=n)) for n in (0, 80))
    answers = [
        generate(model, ids, mask, CompressedCache(spec, plans))[1]
        for spec, plans in ((short, short.uniform(HeadPlan("rotated", (Tier(1.0, 4, 4),)))), (long, long.null_plans))
    ]
    torch.testing.assert_close(answers[1], answers[0], atol=1e-3 * float(answers[0].std()), rtol=0)


@pytest.mark.parametrize("quantized", [0, 5, 12])
def test_a_block_and_single_tokens_leave_as_many(quantized):
    """Also a block longer than both windows, some tokens of which are ranked before they were ever quantized."""
    model = small_model("llama")
    use_attention(model)
    spec = spec_of(model, Recent(2, 4, 4, quantized))
    ids, _ = padded_batch(2)
    caches = [CompressedCache(spec, compressing_plans(spec)) for _ in range(3)]
    for cache, blocks in zip(caches, ([9, 31], [9, *[1] * 31], [9, 2, 17, 12])):
        with torch.no_grad():
            for block in ids.split(blocks, dim=1):
                model(block, **cache_argument(model, cache))
        assert cache.nbytes == 2 * spec.nbytes(compressing_plans(spec), 40)
        assert [layer.compressible for layer in cache.layers] == [[spec.recent.compressible(40)] * 2] * 3


FITTED = Learned(tuple(((0.3, 0.1, -0.2, 0.1, 0.4, 0.2, 0.3, 1.0, -0.5, 2.0, -0.3, 0.6),) * 2 for _ in range(3)))


@pytest.mark.slow
@pytest.mark.parametrize("scorer", [*SCORERS.values(), FITTED], ids=[*SCORERS, "fitted"])
def test_left_padding_changes_nothing(scorer):
    """Neither of what the prefill keeps nor of what leaves the windows, one token at a time."""
    model = small_model("llama")
    use_attention(model)
    spec = replace(spec_of(model, Recent(2, 4, 1, quantized=7)), scorer=scorer)
    caches = [CompressedCache(spec, compressing_plans(spec)) for _ in range(2)]
    ids, _ = padded_batch(1)
    padded = torch.cat([torch.zeros(1, 6, dtype=ids.dtype), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 6, dtype=ids.dtype), torch.ones_like(ids)], dim=1)
    caches[0].fill(model, ids[:, :-1])
    caches[1].fill(model, padded[:, :-1], mask[:, :-1])
    _, plain = generate(model, ids, torch.ones_like(ids), caches[0])
    _, shifted = generate(model, padded, mask, caches[1])
    assert caches[0].nbytes == caches[1].nbytes
    torch.testing.assert_close(shifted, plain, atol=2e-3, rtol=0)


@BOTH
def test_a_long_follow_up_is_answered_in_blocks(monkeypatch, recent):
    model = small_model("llama")
    use_attention(model)
    spec = spec_of(model, recent)
    ids, _ = padded_batch(2)
    logits = []
    for rows in (1, 6, 256):
        monkeypatch.setattr("ib_analysis.cache.layer.QUERY_ROWS", rows)
        cache = CompressedCache(spec, compressing_plans(spec))
        with torch.no_grad():
            model(ids[:, :25], **cache_argument(model, cache))
            logits.append(model(ids[:, 25:], **cache_argument(model, cache)).logits)
    torch.testing.assert_close(logits[0], logits[2], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[1], logits[2], atol=1e-4, rtol=0)


def test_two_tiers_of_one_precision_hold_what_one_of_both_shares_holds():
    """Groups of 32 tokens do not show at 16 bits."""
    model = small_model("llama")
    use_attention(model)
    spec = spec_of(model, Recent(2, 6, 8))
    ids, _ = padded_batch(2)
    logits = []
    for tiers in ((Tier(0.25, 16, 16), Tier(0.5, 16, 16)), (Tier(0.75, 16, 16),)):
        plans = ((HeadPlan("kivi", tiers), HeadPlan("kivi", (Tier(0.5, 16, 16),))),) * 3
        cache = CompressedCache(spec, plans)
        with torch.no_grad():
            model(ids, **cache_argument(model, cache))
            cache.reorder_cache(torch.tensor([1, 0]))
            blocks = ids[:, :16].split(2, dim=1)  # fills and flushes the window
            logits.append(torch.cat([model(block, **cache_argument(model, cache)).logits for block in blocks], dim=1))
            assert cache.nbytes == 2 * spec.nbytes(plans, 56)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=0)


def test_padding_that_comes_after_a_short_first_block_is_not_seen():
    """A block shorter than the sinks, then one with padding in front: that padding takes the place of sinks."""
    torch.manual_seed(0)
    attended = torch.nn.Module()
    vars(attended).update(num_key_value_groups=1, is_causal=True)
    layer = CompressedLayer(0, (RAW,), Recent(2, 8, 7), SCORERS["value_aware"], MaskCheck())
    keys, values, seen = torch.zeros(1, 1, 0, 16), torch.zeros(1, 1, 0, 16), torch.zeros(1, 0, dtype=torch.bool)
    for length, pads in ((1, 0), (13, 6), (5, 0)):
        query, *new = torch.randn(3, 1, 1, length, 16).half().float()
        keys, values = torch.cat([keys, new[0]], 2), torch.cat([values, new[1]], 2)
        seen = torch.cat([seen, torch.arange(length)[None] >= pads], 1)
        mask = causal_mask(length, keys.shape[2], keys.device) & seen[:, None, None]
        layer.update(*new)
        out = layer.attend(attended, query, mask, 0.25, {})
        expected = full_attention(attended, query, keys, values, mask, 0.25, {})
        torch.testing.assert_close(out[:, :, pads:], expected[:, :, pads:], atol=2e-3, rtol=2e-3)
