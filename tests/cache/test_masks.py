"""Masks, padding and operations that a cache refuses: as DynamicCache, or by name, and never by half."""

import warnings

import pytest
import torch
from transformers import DynamicCache

from ib_analysis.cache.attention import cache_argument, use_attention
from ib_analysis.cache.compressed import CompressedCache
from ib_analysis.cache.masks import MaskCheck
from ib_analysis.cache.plan import RAW, HeadPlan, Recent, Tier
from ib_analysis.scorers import SCORERS
from tests.cache.test_compressed import compressing_plans, generate, padded_batch, small_model, spec_of

RECENT = Recent(4, 16, 8)


@pytest.fixture(scope="module")
def model():
    model = small_model("llama")
    use_attention(model)
    return model


def filled(model, plans=None, ids=None, mask=None, recent=RECENT, scorer="value_aware"):
    """A cache that has read ids [B, T]."""
    spec = spec_of(model, recent)
    spec = type(spec)(spec.shape, recent, SCORERS[scorer], spec.bases)
    cache = CompressedCache(spec, compressing_plans(spec) if plans is None else plans(spec))
    cache.fill(model, padded_batch(1)[0] if ids is None else ids, mask)
    return cache


@torch.no_grad()
def step(model, cache, ids, mask=None):
    position = None
    if mask is not None and mask.ndim == 2:
        position = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(ids, attention_mask=mask, position_ids=position, **cache_argument(model, cache)).logits


def hiding(kind, begin, end, length=40, new=10):
    """A mask for the `new` last tokens that hides positions from `begin` to before `end`."""
    if kind == "2-D":
        mask = torch.ones(1, length, dtype=torch.long)
    else:
        mask = torch.ones(1, 1, new, length, dtype=torch.bool).tril(length - new)
    mask[..., begin:end] = 0
    return mask


@pytest.mark.parametrize("kind", ["2-D", "4-D"])
def test_a_mask_that_hides_compressed_tokens_is_refused_with_their_places(kind, model):
    ids, _ = padded_batch(1)
    cache = filled(model, ids=ids[:, :30])
    with pytest.raises(ValueError, match=r"position 30 of sequence 0 .* positions 8 to 11, 4 in all"):
        step(model, cache, ids[:, 30:], hiding(kind, 8, 12))
    with pytest.raises(ValueError, match="positions 2 to 2, 1 in all"):  # a sink
        step(model, cache, ids[:, 30:], hiding(kind, 2, 3))


def test_a_refused_mask_leaves_the_cache_as_it_was(model):
    ids, _ = padded_batch(1)
    cache, other = filled(model, ids=ids[:, :30]), filled(model, ids=ids[:, :30])
    with pytest.raises(ValueError, match="hides"):
        step(model, cache, ids[:, 30:], hiding("4-D", 8, 12))
    assert cache.get_seq_length() == 30 and cache.nbytes == other.nbytes
    assert torch.equal(step(model, cache, ids[:, 30:]), step(model, other, ids[:, 30:]))


@pytest.mark.parametrize("kind", ["2-D", "4-D"])
def test_a_mask_that_hides_tokens_of_the_window_is_honoured(kind, model):
    ids, _ = padded_batch(1)
    mask = hiding(kind, 25, 28)
    position = torch.arange(40)[None]
    logits = []
    for cache in (DynamicCache(config=model.config), filled_raw(model)):
        with torch.no_grad():
            model(ids[:, :30], position_ids=position[:, :30], **cache_argument(model, cache))
            more = {"attention_mask": mask, "position_ids": position[:, 30:]}
            logits.append(model(ids[:, 30:], **more, **cache_argument(model, cache)).logits)
    torch.testing.assert_close(logits[1], logits[0], atol=2e-2, rtol=0)


def filled_raw(model):
    spec = spec_of(model, RECENT)
    return CompressedCache(spec, spec.uniform(RAW))


def test_tokens_hidden_when_they_left_the_window_cannot_be_shown_again(model):
    ids, _ = padded_batch(1)
    cache = filled(model, ids=ids[:, :30])
    hidden = hiding("4-D", 16, 18)
    step(model, cache, ids[:, 30:], hidden)  # by now they have left
    again = torch.ones(1, 1, 1, 41, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"shows .* tokens that were hidden"):
        step(model, cache, ids[:, :1], again)
    again[..., 16:18] = False
    step(model, cache, ids[:, :1], again)


def test_a_mask_of_another_length_is_refused(model):
    ids, _ = padded_batch(1)
    with pytest.raises(ValueError, match="for 39 tokens"):
        step(model, filled(model, ids=ids[:, :30]), ids[:, 30:], hiding("4-D", 0, 0, length=39))


def test_a_mask_is_read_once_for_all_layers():
    mask = torch.ones(2, 1, 1, 8, dtype=torch.bool)
    check = MaskCheck()
    check.check(mask, 8, 4, [0, 0])
    check.check(mask, 8, 4, [1, 1])  # not read again
    with pytest.raises(ValueError, match="for 8 tokens"):
        check.check(mask, 9, 4, [0, 0])  # the same for the next step
    with pytest.raises(ValueError, match="shows"):
        check.check(mask.clone(), 8, 4, [1, 1])


@pytest.mark.parametrize("scorer", sorted(SCORERS))
@pytest.mark.parametrize("pads", [12, 20])  # of 20 tokens
def test_what_is_under_the_padding_of_a_later_message_does_not_matter(pads, scorer, model):
    torch.manual_seed(10)
    first, second, last = torch.randint(3, 99, (2, 60)), torch.randint(3, 99, (2, 20)), torch.randint(3, 99, (2, 1))
    mask = torch.ones(2, 81, dtype=torch.long)
    mask[0, 60 : 60 + pads] = 0
    half = HeadPlan("rotated", (Tier(0.5, 4, 4),))
    logits = []
    for under in (0, 57):
        second[0, :pads] = under
        cache = filled(model, lambda spec: spec.uniform(half), first, mask[:, :60], scorer=scorer)
        step(model, cache, second, mask[:, :80])
        logits.append(step(model, cache, last, mask))
    assert torch.equal(*logits)


def test_a_padded_later_message_is_that_without_padding(model):
    """What is kept, too: the sequence alone, without padding, gives the same."""
    torch.manual_seed(11)
    first, second = torch.randint(3, 99, (2, 60)), torch.randint(3, 99, (2, 24))
    mask = torch.ones(2, 84, dtype=torch.long)
    mask[0, 60:76] = 0  # a multiple of the flush, so that the window holds the same tokens
    both = filled(model, ids=first, mask=mask[:, :60])
    found = step(model, both, second, mask)[0, -8:]
    alone = filled(model, ids=first[:1])
    torch.testing.assert_close(found, step(model, alone, second[:1, 16:])[0], atol=1e-3, rtol=0)


@pytest.mark.parametrize("later_layer", [False, True])
def test_an_interrupted_step_is_not_taken_for_a_whole_one(later_layer, model, monkeypatch):
    ids, _ = padded_batch(1)
    cache = filled(model, ids=ids[:, :30])
    layer = cache.layers[1 if later_layer else 0]

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(layer, "_flush", interrupt)
    with pytest.raises(KeyboardInterrupt):
        step(model, cache, ids[:, 30:])
    monkeypatch.undo()
    with pytest.raises(ValueError, match="interrupted"):
        step(model, cache, ids[:, 30:])
    cache.reset()
    fresh = filled(model, ids=ids[:, :30])
    step(model, cache, ids[:, :30])
    assert torch.equal(step(model, cache, ids[:, 30:]), step(model, fresh, ids[:, 30:]))


def test_a_refused_crop_leaves_all_layers_as_they_were():
    """Full layers could do it, compressed ones cannot."""
    model = small_model("llama")
    use_attention(model)
    ids, _ = padded_batch(1)
    cache = filled(model, lambda spec: (None, *compressing_plans(spec)[1:]), ids)
    before = [layer.get_seq_length() for layer in cache.layers]
    with pytest.raises(ValueError, match="cannot crop 30"):
        cache.crop(-30)
    assert [layer.get_seq_length() for layer in cache.layers] == before
    step(model, cache, ids[:, :1])


def test_crop_beyond_a_sliding_window_is_refused_before_a_layer_changes():
    model = small_model("gemma3_text")
    use_attention(model)
    ids, _ = padded_batch(1)
    cache = filled(model, ids=ids)
    with pytest.raises(ValueError, match="sliding window"):
        cache.crop(-1)
    assert {layer.get_seq_length() for layer in cache.layers} == {40}


@pytest.mark.parametrize("rows", [[True, False, True], [False, True, False], [2, -3], [0, 0, 1]])
def test_sequences_are_selected_as_rows_of_a_tensor(rows, model):
    ids, mask = padded_batch(3)
    whole = torch.arange(3)[torch.tensor(rows)]
    by_name, by_index = filled(model, ids=ids, mask=mask), filled(model, ids=ids, mask=mask)
    by_name.batch_select_indices(torch.tensor(rows) if isinstance(rows[0], bool) else rows)
    by_index.batch_select_indices(whole)
    assert by_name.nbytes == by_index.nbytes
    longer = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)[whole]
    assert torch.equal(*(step(model, cache, ids[whole, :1], longer) for cache in (by_name, by_index)))
    with pytest.raises(IndexError):
        by_index.batch_select_indices(torch.tensor([7]))


@pytest.mark.parametrize("more", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": True}])
def test_assisted_generation_is_refused_before_the_first_token(more, model):
    """Rejected candidates would have voted, and pushed tokens out of the window."""
    ids, _ = padded_batch(1)
    ids = ids[:, :12].repeat(1, 4)
    spec = spec_of(model, RECENT)
    cache = CompressedCache(spec, compressing_plans(spec))
    more = {name: small_model("llama") if value is True else value for name, value in more.items()}
    with pytest.raises(ValueError, match=r"(?i)crop|rollback|assist"):
        model.generate(ids, **cache_argument(model, cache), max_new_tokens=8, do_sample=False, **more)


@pytest.mark.parametrize(("side", "name"), [("k_proj", "key"), ("v_proj", "value")])
def test_numbers_that_16_bits_do_not_hold_are_named(side, name):
    """They became NaN logits."""
    model = small_model("llama")
    use_attention(model)
    getattr(model.model.layers[1].self_attn, side).weight.data.mul_(1e6)
    spec = spec_of(model, RECENT)
    ids, _ = padded_batch(1)
    with pytest.raises(ValueError, match=rf"layer 1 has a {name} of .* more than float16 holds \(65504\)"):
        step(model, CompressedCache(spec, compressing_plans(spec)), ids)
    half = model.to(torch.bfloat16)
    cache = CompressedCache(spec, spec.uniform(RAW))
    step(half, cache, ids)
    assert bool(step(half, cache, ids[:, :1]).isfinite().all())


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("quantized", [0, 6])
def test_numbers_that_quantized_tokens_do_not_hold_are_told(quantized, fill):
    """Scales are float16: of 100,000 they keep 65,504. What stays at 16 bits is whole."""
    model = small_model("llama").to(torch.bfloat16)
    use_attention(model)
    model.model.layers[1].self_attn.v_proj.weight.data.mul_(1e6)
    spec, (ids, _) = spec_of(model, Recent(2, 4, 4, quantized=quantized)), padded_batch(1)
    cache = CompressedCache(spec, compressing_plans(spec))
    read = (lambda: cache.fill(model, ids)) if fill else (lambda: step(model, cache, ids))
    with pytest.warns(UserWarning, match="layer 1 has a value of more than 65504, which quantized tokens keep as 65504"):
        read()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        raw = type(spec)(spec.shape, Recent(2, 4, 4), spec.scorer, spec.bases)
        step(model, CompressedCache(raw, raw.uniform(RAW)), ids)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_model_with_a_window_as_long_as_its_positions(batch):
    """It generates as with the full cache: transformers' masks hide nothing there."""
    model = small_model("mistral")
    model.config.sliding_window = model.config.max_position_embeddings
    ids, mask = padded_batch(batch)
    tokens, logits = generate(model, ids, mask, DynamicCache(config=model.config))
    use_attention(model)
    spec = spec_of(model)
    found_tokens, found_logits = generate(model, ids, mask, CompressedCache(spec, spec.full_plans))
    assert torch.equal(found_tokens, tokens) and torch.equal(found_logits, logits)
    _, nearly = generate(model, ids, mask, CompressedCache(spec, spec.uniform(RAW)))
    torch.testing.assert_close(nearly[0], logits[0], atol=2e-2, rtol=0)
