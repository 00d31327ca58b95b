"""What every scorer, policy, format, estimator and task must do, to be run on yours: `check_scorer(mine)`.

Each check raises AssertionError, which says what does not hold. They run over every registered one in this package's tests.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random, getstate
from typing import Any

import numpy as np
import torch
from ib_kernels import FORMATS, RAW_BITS
from ib_kernels.testing import check_format
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from ib_analysis.cache.plan import BITS, Plans, Recent
from ib_analysis.cache.spec import ByteLimit, CacheSpec
from ib_analysis.errors import EstimatorError
from ib_analysis.estimators.estimate import Estimate, Estimator
from ib_analysis.model.shape import CacheShape, LayerShape
from ib_analysis.policies import Cell, Policy
from ib_analysis.scorers import SCORERS, Scorer
from ib_analysis.tasks import Prompt
from ib_analysis.tasks.text import embedded_tokenizer

__all__ = ["check_estimator", "check_format", "check_policy", "check_scorer", "check_task"]

BATCH, HEADS, KV_HEADS, TOKENS, DIM, PADDED = 2, 4, 2, 48, 16, 7


def check_scorer(scorer: Scorer) -> None:
    """Shapes, padding, few queries, half precision; that it is a value and changes nothing."""
    config = LlamaConfig(hidden_size=HEADS * DIM, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, num_hidden_layers=1)
    module = LlamaAttention(config, layer_idx=0)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(BATCH, HEADS, TOKENS, DIM, generator=generator)
    keys, values = torch.randn(2, BATCH, KV_HEADS, TOKENS, DIM, generator=generator)
    valid = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    valid[1, :PADDED] = False
    before = [tensor.clone() for tensor in (query, keys, values, valid)]

    def scores(queries: int = TOKENS, dtype: torch.dtype = torch.float32, begin: int = 0, rows: slice = slice(None)) -> Tensor:
        some = (query[rows, :, TOKENS - queries :], keys[rows, :, begin:], values[rows, :, begin:])
        q, k, v = (tensor.to(dtype) for tensor in some)
        found = scorer(module, q, k, v, valid[rows, begin:], DIM**-0.5)
        expected = (len(some[1]), KV_HEADS, TOKENS - begin)
        assert isinstance(found, Tensor) and found.shape == expected, (
            f"expected scores {expected}, got {getattr(found, 'shape', found)}"
        )
        return found

    first = scores()
    assert first.dtype == torch.float32, f"scores must be float32, got {first.dtype}"
    assert torch.isfinite(first[valid[:, None].expand_as(first)]).all(), "scores of tokens that are no padding must be finite"
    assert not first.requires_grad, "scores must not carry a graph: compute them under torch.no_grad(), or detach"
    assert torch.equal(first[0], scores()[0]), "the same tokens must get the same scores"
    for tensor, copy in zip((query, keys, values, valid), before):
        assert torch.equal(tensor, copy), "a scorer must not write to its arguments"
    alone = scores(rows=slice(0, 1))[0]
    torch.testing.assert_close(alone, first[0], msg="a sequence must be scored as it is alone, whatever is in the batch")
    without = scores(TOKENS - PADDED, begin=PADDED, rows=slice(1, 2))[0]
    assert torch.equal(_order(without), _order(first[1, :, PADDED:])), "padding on the left must not change the order of tokens"
    scores(queries=3)
    scores(dtype=torch.bfloat16)
    hash(scorer)  # the plan of a cache holds it
    assert scorer == scorer, "a scorer must equal itself: make it a function or a frozen dataclass"


def _order(scores: Tensor) -> Tensor:
    return scores.argsort(dim=-1, descending=True, stable=True)


def check_policy(policy: Policy) -> None:
    """Cells that fit their budget, whose plans fit the model, with a label; the same each time."""
    shape = CacheShape((LayerShape(2, 64), LayerShape(2, 64, sliding_window=16), LayerShape(2, 64)))
    spec, proposed = CacheSpec(shape, Recent(2, 6, 2), SCORERS["value_aware"]), 0
    for share, length in ((3 / 4, 128), (1 / 4, 128), (1 / 8, 301), (1 / 1000, 128)):
        limit = ByteLimit(spec, share, length)
        cells = list(policy(spec, limit))
        proposed += len(cells)
        assert cells == list(policy(spec, limit)), "a policy must propose the same cells each time"
        assert len({cell.plans for cell in cells}) == len(cells), f"some cells at a share of {share} are the same"
        for cell in cells:
            assert isinstance(cell, Cell) and cell.family and cell.setting, f"{cell} must be a Cell with a family and a setting"
            _check_plans(cell.plans, shape)
            excess = limit.excess(cell.plans)
            assert excess == 0, f"{cell.setting!r} exceeds a share of {share} from {length} tokens on by {excess} bytes"
    assert proposed > 0, "a policy must propose something at three quarters of the cache"


def _check_plans(plans: Plans, shape: CacheShape) -> None:
    assert len(plans) == len(shape.layers), f"plans need a row for each of {len(shape.layers)} layers, got {len(plans)}"
    for layer, row in zip(shape.layers, plans):
        if row is None:
            continue
        assert layer.sliding_window is None, "a layer with a sliding window is never compressed: its row must be None"
        assert len(row) == layer.kv_heads, f"a row needs {layer.kv_heads} head plans, got {len(row)}"
        for plan in row:
            assert plan.format in FORMATS, f"there is no format {plan.format!r}"
            assert all(0 < share <= 1 for share in plan.token_shares), f"shares of tokens must lie in (0, 1], got {plan}"
            assert plan.kept_share <= 1 + 1e-9, f"a head keeps more than all tokens: {plan}"
            bits = {bits for tier in plan.tiers for bits in (tier.key_bits, tier.value_bits)}
            assert bits <= {*BITS, RAW_BITS}, f"a head has tiers of {sorted(bits)} bits, which cannot be stored"


def check_estimator(estimator: Estimator) -> None:
    """What it says of rounded copies of normal variables, whose information is known, and that it refuses nonsense."""
    assert isinstance(estimator.name, str) and estimator.name, "an estimator needs a name"
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 1024, 1))
    documents = np.arange(1024) // 8
    coarse, fine = (step * (np.floor(x / step) + 0.5) for step in (1.0, 0.25))  # about 2.1 and 4.0 bits
    found = [estimator.estimate(x, y, documents) for y in (coarse, fine)]
    for estimate, limit in zip(found, (2.6, 4.5)):
        _check_estimate(estimate, (2,))
        assert (estimate.bits > -0.5).all() and (estimate.bits < limit).all(), f"{estimate.bits} bits of at most {limit}"
    (_, most), least = found[1].interval, found[0].bits
    assert (most > least).all(), f"a finer copy must tell more: at most {most}, where a coarse one gave {least} bits"
    single = estimator.estimate(torch.tensor(x[1]), torch.tensor(fine[1]), torch.tensor(documents))
    _check_estimate(single, ())
    assert np.allclose(single.bits, found[1].bits[1], atol=0.2), "one head must get what it gets among several"
    nothing = {"NaN": (x * np.nan, fine * np.nan), "one sample": (x[:, :1], fine[:, :1]), "no pairs": (x[:, :9], fine)}
    for name, (bad_x, bad_y) in nothing.items():
        try:
            estimator.estimate(bad_x, bad_y)
        except EstimatorError:
            continue
        raise AssertionError(f"{name} must be refused with EstimatorError")


def _check_estimate(estimate: Any, shape: tuple[int, ...]) -> None:
    assert isinstance(estimate, Estimate), f"expected an Estimate, got {type(estimate).__name__}"
    low, high = estimate.interval
    assert np.shape(estimate.bits) == np.shape(low) == np.shape(high) == shape, f"one estimate a head: expected shape {shape}"
    assert np.isfinite(estimate.bits).all(), f"{estimate.bits} bits"
    assert (low <= estimate.bits).all() and (estimate.bits <= high).all(), f"{estimate.bits} bits outside of {low} to {high}"


def check_task(task: Callable[[Random, int], Prompt]) -> None:
    """Prompts of about the length asked for, that depend on the generator passed and on nothing else."""
    for length in (128, 256, 512):
        state = getstate()
        prompts = [task(Random(f"check {seed}"), length) for seed in range(4)]
        assert getstate() == state, "a task must draw from the generator that it is given, not from the global one"
        assert prompts[0] == task(Random("check 0"), length), "the same generator must give the same prompt"
        assert len({prompt.text for prompt in prompts}) > 1, "different generators must give different prompts"
        for prompt in prompts:
            assert isinstance(prompt, Prompt) and prompt.task and prompt.context, f"{prompt} must be a Prompt with a context"
            assert prompt.turns and all(answer for _, answer in prompt.turns), "every turn needs an answer"
            assert 0 <= prompt.chance < 1 and 0 <= prompt.depth_share <= 1, f"chance {prompt.chance}, depth {prompt.depth_share}"
            tokens = len(embedded_tokenizer().encode(prompt.text).ids)
            assert length / 2 < tokens <= 1.1 * length, f"{tokens} tokens of the embedded model where {length} were asked for"
