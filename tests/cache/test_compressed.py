"""The compressed cache against DynamicCache, on small random models of several architectures."""

import gc
import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from ib_analysis.cache.attention import cache_argument, use_attention
from ib_analysis.cache.compressed import CompressedCache
from ib_analysis.cache.key_bases import KeyBases
from ib_analysis.cache.plan import RAW, HeadPlan, Recent, Tier
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.model.shape import cache_shape
from ib_analysis.scorers import SCORERS

RECENT = Recent(2, 4, 4)
BOTH = pytest.mark.parametrize("recent", [RECENT, Recent(2, 4, 4, quantized=10)], ids=["", "quantized"])
ARCHITECTURES: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 20},
    "phi3": {"pad_token_id": 0, "eos_token_id": None},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "olmo2": {},
    "granite": {"eos_token_id": None},
}


def small_model(name):
    size: dict[str, object] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    size |= {"vocab_size": 100, "max_position_embeddings": 512, "num_key_value_heads": 2}
    config = AutoConfig.for_model(name, **(size | ARCHITECTURES[name]))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)  # so that attention is far from uniform
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def spec_of(model, recent=RECENT):
    shape = cache_shape(model.config)
    generator = torch.Generator().manual_seed(0)
    sizes = [(layer.kv_heads, layer.head_dim, layer.head_dim) for layer in shape.layers]
    bases = tuple(torch.randn(size, generator=generator).half() for size in sizes)
    return CacheSpec(shape, recent, SCORERS["value_aware"], KeyBases(bases))


def padded_batch(batch):
    torch.manual_seed(1)
    ids = torch.randint(3, 99, (batch, 40))
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 7, 30)[:batch]):
        mask[row, :pads] = 0
    return ids, mask


def generate(model, ids, mask, cache):
    out = model.generate(
        ids,
        attention_mask=mask,
        **cache_argument(model, cache),
        max_new_tokens=40,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, torch.stack(out.logits)


def compressing_plans(spec):
    first = HeadPlan("kivi", (Tier(0.3, 4, 2), Tier(0.35, 2, 3)))
    others = HeadPlan("rotated", (Tier(0.4, 3, 8),)), HeadPlan("spectral", (Tier(0.1, 8, 8), Tier(0.3, 2, 4)))
    return tuple(None if layer.sliding_window else (first, others[i % 2]) for i, layer in enumerate(spec.shape.layers))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_full_budget_is_the_full_cache(name, batch):
    model = small_model(name)
    ids, mask = padded_batch(batch)
    tokens, logits = generate(model, ids, mask, DynamicCache(config=model.config))
    use_attention(model)
    spec = spec_of(model)
    cache = CompressedCache(spec, spec.full_plans)
    found_tokens, found_logits = generate(model, ids, mask, cache)
    assert torch.equal(found_tokens, tokens)
    assert torch.equal(found_logits, logits)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
def test_all_tokens_at_16_bits_are_nearly_the_full_cache(name, batch):
    model = small_model(name)
    ids, mask = padded_batch(batch)
    _, logits = generate(model, ids, mask, DynamicCache(config=model.config))
    use_attention(model)
    spec = spec_of(model)
    plans = spec.uniform(RAW)
    _, found = generate(model, ids, mask, CompressedCache(spec, plans))
    assert (found - logits).abs().max() < 0.01 * logits.std()


@BOTH
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("prefill", [1, 2, 3, 5, 9, 17, 40])
def test_bytes_are_those_of_the_plan_at_every_length(prefill, batch, recent):
    model = small_model("gemma3_text")
    use_attention(model)
    spec = spec_of(model, recent)
    plans = compressing_plans(spec)
    cache = CompressedCache(spec, plans)
    ids, _ = padded_batch(batch)
    with torch.no_grad():
        for block in (ids[:, :prefill], ids[:, :5], *ids[:, :9].split(1, dim=1)):
            model(block, **cache_argument(model, cache))
            expected = batch * spec.nbytes(plans, cache.get_seq_length())
            assert cache.nbytes - cache.sliding_nbytes == expected


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_follow_up_of_several_tokens_is_one_pass(name):
    model = small_model(name)
    ids, _ = padded_batch(2)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, 28:]
        use_attention(model)
        spec = spec_of(model)
        cache = CompressedCache(spec, spec.full_plans)
        model(ids[:, :28], **cache_argument(model, cache))
        found = model(ids[:, 28:], **cache_argument(model, cache)).logits
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.std()), rtol=0)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_compressed_follow_up_is_that_of_single_tokens(name):
    """As long as nothing leaves the window, which is when tokens are compressed."""
    model = small_model(name)
    use_attention(model)
    spec = spec_of(model, Recent(2, 4, 16))
    ids, _ = padded_batch(2)
    logits = []
    for lengths in ([1] * 6, [6], [2, 4]):
        cache = CompressedCache(spec, compressing_plans(spec))
        with torch.no_grad():
            model(ids[:, :23], **cache_argument(model, cache))
            blocks = ids[:, 23:29].split(lengths, dim=1)
            logits.append(torch.cat([model(block, **cache_argument(model, cache)).logits for block in blocks], dim=1))
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[2], logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("gemma2", {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0}),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}),
    ],
)
def test_extras_of_attention_are_honoured(name, extra):
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16}
    size |= {"vocab_size": 100, "max_position_embeddings": 512, "num_key_value_heads": 2, "sliding_window": 16}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **size, **extra), attn_implementation="eager").eval()
    for label, parameter in model.named_parameters():
        parameter.data.normal_() if "sinks" in label else parameter.data.mul_(3)
    ids, _ = padded_batch(2)
    spec = spec_of(model)
    assert spec.shape.compressible == [1, 3]
    plans = spec.uniform(RAW)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, 30:]
        use_attention(model)
        cache = CompressedCache(spec, plans)
        model(ids[:, :30], **cache_argument(model, cache))
        found = model(ids[:, 30:], **cache_argument(model, cache)).logits
    assert (found - expected).abs().max() < 0.01 * expected.std()


@pytest.mark.slow
def test_nothing_of_the_full_cache_survives_the_prefill():
    """No tensor in memory but weights and the cache's own, and none of those is a view into a larger one."""
    model = small_model("llama")
    use_attention(model)
    spec = spec_of(model)
    cache = CompressedCache(spec, compressing_plans(spec))
    ids, _ = padded_batch(3)
    gc.collect()
    before = {id(tensor) for tensor in _tensors_in_memory()}
    with torch.no_grad():
        model(ids, **cache_argument(model, cache))
    gc.collect()
    held = [tensor for layer in cache.layers for tensor in layer.tensors()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    assert sum(storages.values()) == cache.nbytes
    others = [
        tensor
        for tensor in _tensors_in_memory()
        if id(tensor) not in before and tensor.untyped_storage().data_ptr() not in storages
    ]
    assert sum(tensor.numel() for tensor in others) < ids.numel() * spec.shape.layers[0].head_dim / 4


def _tensors_in_memory():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]


@BOTH
def test_offload_and_prefetch_change_nothing(recent):
    model = small_model("llama")
    use_attention(model)
    spec = spec_of(model, recent)
    ids, _ = padded_batch(2)
    logits = []
    for offloads in (False, True):
        cache = CompressedCache(spec, compressing_plans(spec))
        with torch.no_grad():
            model(ids, **cache_argument(model, cache))
            if offloads:
                for index in range(len(spec.shape.layers)):
                    cache.layers[index].offload()
                    cache.layers[index].prefetch()
            logits.append(model(ids[:, :3], **cache_argument(model, cache)).logits)
    assert torch.equal(*logits)


@pytest.mark.slow
def test_long_generation_stays_within_its_plan():
    model = small_model("llama")
    use_attention(model)
    spec = spec_of(model)
    plans = compressing_plans(spec)
    cache = CompressedCache(spec, plans)
    ids, mask = padded_batch(1)
    model.generate(ids, attention_mask=mask, **cache_argument(model, cache), max_new_tokens=150, do_sample=False)
    assert cache.nbytes == spec.nbytes(plans, 40 + 149)


def test_beams_crop_and_reset():
    model = small_model("llama")
    use_attention(model)
    spec = spec_of(model)
    plans = compressing_plans(spec)
    cache = CompressedCache(spec, plans)
    ids, _ = padded_batch(1)
    with torch.no_grad():
        model(ids, **cache_argument(model, cache))
        once = model(ids[:, :1], **cache_argument(model, cache)).logits
        cache.crop(-1)
        cache.batch_repeat_interleave(3)
        again = model(ids[:, :1].repeat(3, 1), **cache_argument(model, cache)).logits
        cache.reorder_cache(torch.tensor([2, 0, 1]))
    torch.testing.assert_close(again, once.expand(3, -1, -1), atol=1e-4, rtol=0)
    assert cache.nbytes == 3 * spec.nbytes(plans, cache.get_seq_length())
    cache.crop(-1)
    windows = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert all(window.untyped_storage().nbytes() == window.nbytes for window in windows)
    with pytest.raises(ValueError, match="not compressed"):
        cache.crop(-30)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0


@BOTH
def test_sequences_in_another_order_continue_as_they_were(recent):
    """Of different lengths, through several flushes of the window."""
    model = small_model("llama")
    use_attention(model)
    spec = spec_of(model, recent)
    ids, mask = padded_batch(3)
    order = torch.tensor([2, 0, 0])
    logits = []
    for rows in (torch.arange(3), order):
        cache = CompressedCache(spec, compressing_plans(spec))
        with torch.no_grad():
            model(ids[:, :28], attention_mask=mask[:, :28], **cache_argument(model, cache))
            cache.reorder_cache(rows)
            steps = [
                model(ids[rows, t : t + 1], attention_mask=mask[rows, : t + 1], **cache_argument(model, cache)).logits
                for t in range(28, 40)
            ]
        logits.append(torch.cat(steps, dim=1))
    torch.testing.assert_close(logits[1], logits[0][order], atol=1e-4, rtol=0)


def filled_cache():
    """(llama, a compressed cache that holds 40 tokens of two sequences, next tokens [2, 3])."""
    model, (ids, _) = small_model("llama"), padded_batch(2)
    spec = spec_of(model)
    use_attention(model)
    cache = CompressedCache(spec, spec.uniform(HeadPlan("rotated", (Tier(1 / 2, 4, 4),))))
    with torch.no_grad():
        model(ids, **cache_argument(model, cache))
    return model, cache, ids[:, :3]


@torch.no_grad()
def test_a_batch_of_another_size_is_refused_and_forgotten():
    model, cache, ids = filled_cache()
    with pytest.raises(ValueError, match="holds 2 sequences, not 1"):
        model(ids[:1], **cache_argument(model, cache))
    assert cache.get_seq_length() == 40
    assert model(ids, **cache_argument(model, cache)).logits.shape[1] == 3


@torch.no_grad()
def test_masks_that_are_added_are_refused():
    """Read as bool, the zeros that let all tokens through would hide them."""
    model, cache, ids = filled_cache()
    with pytest.raises(ValueError, match=r"masks of bool, .* not of torch\.float32"):
        model(ids, attention_mask=torch.zeros(2, 1, 3, 43), **cache_argument(model, cache))
