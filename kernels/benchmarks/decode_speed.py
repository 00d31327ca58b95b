"""Decoding with a random-weight model of the shape of Llama-3.1-8B: time per token and memory, cache by cache."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product

import torch
from results import Measured, NotRunError, Task
from timing import device
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, QuantizedCache

from ib_analysis import CompressedCache
from ib_analysis.cache.attention import cache_argument, use_attention
from ib_analysis.cache.plan import HeadPlan, Recent, Tier
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.model.shape import cache_shape
from ib_analysis.scorers import SCORERS

RECENT = Recent(sinks=4, window=128, flush=64)


@dataclass(frozen=True)
class Case:
    """A prompt of `context` random tokens, then `tokens` single ones, the first `warm_up` of which are not timed."""

    context: int
    tokens: int = 32
    warm_up: int = 8
    small: bool = False

    def __str__(self) -> str:
        return f"batch 1 context {self.context}"


CASES = [Case(8192), Case(32768), Case(131072)]
SMOKE_CASES = [Case(300, tokens=4, warm_up=1, small=True)]


def tasks(cases: list[Case]) -> Iterator[Task]:
    makers: dict[str, Callable[[PreTrainedModel], Cache]] = {
        **{f"DynamicCache, {attention}": partial(dynamic_cache, attention) for attention in ("sdpa", "flash_attention_2")},
        "QuantizedCache, hqq 4 bits": hqq_cache,
    }
    for fmt, bits, share in (("rotated", 4, 1.0), ("rotated", 2, 1.0), ("rotated", 4, 0.25), ("kivi", 2, 1.0)):
        method = f"CompressedCache, {fmt} {bits} bits, {share:.0%} of the tokens"
        makers[method] = partial(compressed_cache, fmt, bits, share)
    for case, (method, make) in product(cases, makers.items()):
        yield Task("decode", str(case), method, partial(time_cache, case, make))


def time_cache(case: Case, make: Callable[[PreTrainedModel], Cache]) -> Measured:
    """Median time of a decode step, everything included; peak memory while decoding, weights included."""
    llm = model(case.small)
    if not case.small:
        compile_kernels(make)
    torch.manual_seed(0)
    prompt = torch.randint(0, llm.config.vocab_size, (1, case.context), device=device())
    held = make(llm)
    reset_peak()
    begin = time.perf_counter()
    token = step(llm, prompt, held)
    note = f"prefill {time.perf_counter() - begin:.2f} s, peak {peak_bytes() / 1e9:.1f} GB"
    reset_peak()
    seconds = []
    for _ in range(case.tokens):
        begin = time.perf_counter()
        token = step(llm, token, held)
        seconds.append(time.perf_counter() - begin)
    return Measured(1e3 * statistics.median(seconds[case.warm_up :]), cache_bytes(held), peak_bytes(), note)


@cache
def compile_kernels(make: Callable[[PreTrainedModel], Cache]) -> None:
    """A short prompt, and as many tokens as it takes until some leave the window."""
    llm = model(False)
    held = make(llm)
    step(llm, torch.zeros(1, 256, dtype=torch.int64, device=device()), held)
    for _ in range(RECENT.flush + 1):
        step(llm, torch.zeros(1, 1, dtype=torch.int64, device=device()), held)


@torch.no_grad()
def step(llm: PreTrainedModel, ids: Tensor, held: Cache) -> Tensor:
    """The most likely next token [1, 1]. Reading it back waits for the GPU."""
    logits = llm(ids, logits_to_keep=1, **cache_argument(llm, held)).logits
    token = logits[:, -1].argmax(-1, keepdim=True)
    int(token)
    return token


@cache
def model(small: bool, /) -> LlamaForCausalLM:
    """Random weights: bf16 in the shape of Llama-3.1-8B, or two small layers."""
    if small:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 256}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    else:
        sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
        heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=2**18, rope_parameters=rope)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if small else torch.bfloat16)
    try:
        with device():
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def dynamic_cache(attention: str, llm: PreTrainedModel) -> Cache:
    if attention == "flash_attention_2" and (importlib.util.find_spec("flash_attn") is None or not torch.cuda.is_available()):
        raise NotRunError("flash_attn is not installed, or there is no GPU")
    llm.set_attn_implementation(attention)
    return DynamicCache(config=llm.config)


def hqq_cache(llm: PreTrainedModel) -> Cache:
    if importlib.util.find_spec("hqq") is None:
        raise NotRunError("hqq is not installed")
    llm.set_attn_implementation("sdpa")
    return QuantizedCache("hqq", llm.config, nbits=4, axis_key=1, axis_value=1)


def compressed_cache(fmt: str, bits: int, share: float, llm: PreTrainedModel) -> Cache:
    """The same share of tokens at the same precision in all heads."""
    use_attention(llm)
    spec = CacheSpec(cache_shape(llm.config), RECENT, SCORERS["value_aware"])
    return CompressedCache(spec, spec.uniform(HeadPlan(fmt, (Tier(share, bits, bits),))))


def cache_bytes(held: Cache) -> int:
    """Bytes that a cache holds, 0 if it does not say."""
    if isinstance(held, CompressedCache):
        return held.nbytes
    if isinstance(held, QuantizedCache):
        return 0
    return sum(x.nbytes for layer in held.layers for x in (layer.keys, layer.values) if isinstance(x, Tensor))


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
