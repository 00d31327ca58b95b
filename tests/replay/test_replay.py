"""A replay predicts what the packed cache predicts."""

import math
from random import Random

import pytest
import torch

from ib_analysis import load
from ib_analysis.cache.attention import borrowed, cache_argument
from ib_analysis.cache.compressed import CompressedCache
from ib_analysis.cache.key_bases import KeyBases
from ib_analysis.cache.plan import HeadPlan, Recent, Tier
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.model.shape import cache_shape
from ib_analysis.replay.examples import make_examples
from ib_analysis.replay.replay import Replay
from ib_analysis.scorers import SCORERS
from ib_analysis.tasks import TASKS

RECENT = Recent(2, 5, 2, quantized=21)
HEADS = (HeadPlan("kivi", (Tier(0.2, 4, 3), Tier(0.5, 2, 2))), HeadPlan("rotated", (Tier(0.5, 3, 4),)))
SPECTRAL = (HeadPlan("spectral", (Tier(0.1, 8, 8), Tier(0.5, 2, 3))), HeadPlan("spectral", (Tier(0.7, 4, 4),)))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("aware", [True, False])
def test_replay_is_the_packed_cache(task, aware):
    model, tokenizer = load()
    example = make_examples(model, tokenizer, [TASKS[task](Random(task), 256)], question_aware=aware)[0]
    replay = Replay(model, spec_of(model), example)
    plans = (HEADS, SPECTRAL) * (len(replay.layers) // 2)
    packed = packed_loss_bits(replay, plans)
    kl_bits, _ = replay.measure([plans, replay.spec.full_plans])
    assert kl_bits[0] > 0
    assert kl_bits[0] == pytest.approx(packed, rel=0.02, abs=1e-4)
    assert kl_bits[1] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_replay_of_a_16_bit_model_is_the_packed_cache(dtype, small_llama, small_prompts):
    model = small_llama.to(dtype)
    replay = Replay(model, spec_of(model), make_examples(model, None, small_prompts[:1])[0])
    plans = tuple((HEADS, SPECTRAL)[i % 2] for i in range(len(replay.layers)))
    found = float(replay.measure([plans])[0])
    assert found > 0.01
    assert found == pytest.approx(packed_loss_bits(replay, plans), rel=0.05)


def spec_of(model):
    shape = cache_shape(model.config)
    generator = torch.Generator().manual_seed(0)
    sizes = [(layer.kv_heads, layer.head_dim, layer.head_dim) for layer in shape.layers]
    bases = tuple(torch.randn(size, generator=generator).half() for size in sizes)
    return CacheSpec(shape, RECENT, SCORERS["value_aware"], KeyBases(bases))


def packed_loss_bits(replay, plans):
    """KL(full || compressed) in bits per predicted token, from a cache that is packed."""
    model, example = replay.model, replay.example
    cache = CompressedCache(replay.spec, plans)
    with torch.no_grad(), borrowed(model):
        model(example.prefill[None], **cache_argument(model, cache))
        logits = model(example.followup[None], **cache_argument(model, cache)).logits[0, example.predicting]
    full = replay.full_log_probs.double()
    return float((full.exp() * (full - logits.double().log_softmax(-1))).sum(-1).mean() / math.log(2))
