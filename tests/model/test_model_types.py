"""Every causal model type of transformers that can be built small: its cache is compressed right, or refused by name.

`python -m tests.model.test_model_types` prints the lists of docs/reliability.md.
"""

import re
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ib_analysis.cache.attention import cache_argument, use_attention
from ib_analysis.cache.compressed import CompressedCache
from ib_analysis.cache.plan import RAW, Recent
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.errors import UnsupportedModelError
from ib_analysis.model.load import _is_encoder
from ib_analysis.model.shape import cache_shape
from ib_analysis.replay.examples import Example
from ib_analysis.replay.replay import Replay
from ib_analysis.scorers import SCORERS

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"
MOST_PARAMETERS = 10**7
SMALL = {  # by all the names that configs have for these
    **dict.fromkeys(("hidden_size", "intermediate_size", "n_embd", "n_inner", "d_model", "ffn_dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 512),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "num_key_value_heads", "max_window_layers"), 2),
    "vocab_size": 100,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MORE = {"head_dim": 16, "rotary_dim": 16}
WINDOW = {"sliding_window": 16}  # where a model has layers without one, too


def small_model(kind):
    """None if there is no such model in this size."""
    for sizes in ({**SMALL, **MORE}, SMALL):
        with suppress(Exception):  # whatever a class says of sizes that it does not take
            config = small_config(kind, sizes)
            with torch.device("meta"):
                parameters = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
            if parameters <= MOST_PARAMETERS:
                torch.manual_seed(0)
                return AutoModelForCausalLM.from_config(config).eval()
    return None


def small_config(kind, sizes):
    config = transformers.CONFIG_MAPPING[kind]()
    text = config.get_text_config(decoder=True)
    window = WINDOW if getattr(text, "layer_types", None) else {"sliding_window": None}
    known = {name: size for name, size in {**sizes, **window}.items() if hasattr(text, name)}
    if text is config:
        return type(config)(**known)
    for name, size in known.items():
        setattr(text, name, size)
    return config


@torch.no_grad()
def outcome(kind):
    """ "works", the reason why it is refused, or None for what does not read a few tokens with a DynamicCache itself."""
    model = small_model(kind)
    if model is None or _is_encoder(model.config):
        return None
    for weight in model.parameters():
        weight.data.mul_(2 if weight.ndim > 1 else 1)  # so that attention is far from uniform
    ids = torch.randint(3, 99, (1, 40), generator=torch.Generator().manual_seed(1))
    try:
        expected = read(model, ids, DynamicCache(config=model.config))
    except Exception:
        return None
    nothing = torch.zeros(0, dtype=torch.int64)
    try:
        spec = CacheSpec(cache_shape(model.config), Recent(2, 4, 4), SCORERS["value_aware"])
        Replay(model, spec, Example("text", ids[0, :30], ids[0, 30:35], torch.arange(4), nothing, nothing))
        use_attention(model)
    except UnsupportedModelError as error:
        return str(error)
    cache = CompressedCache(spec, spec.uniform(RAW))
    found = read(model, ids, cache)
    assert cache.get_seq_length() == 40, f"{kind} did not use the cache"
    assert (found - expected).abs().max() < 0.03 * expected.std(), f"{kind} answers otherwise"
    return "works"


def read(model, ids, cache):
    model(ids[:, :30], **cache_argument(model, cache))
    return torch.cat([model(token, **cache_argument(model, cache)).logits for token in ids[:, 30:].split(1, 1)], 1)


def outcomes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {kind: outcome(kind) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}


@pytest.mark.slow
def test_all_types_work_or_are_refused_by_name():
    """Raises for one that crashes or answers otherwise."""
    found = outcomes()
    works = {kind for kind, said in found.items() if said == "works"}
    assert len(works) > 50
    text = DOCUMENT.read_text()
    version, listed = re.search(r"of transformers ([\d.]+) ", text), re.search(r"^Work: (.*?)\.$", text, re.M | re.S)
    assert version is not None and listed is not None
    if transformers.__version__.startswith(version[1]):
        assert {*re.findall(r"[\w-]+", listed[1])} == works


if __name__ == "__main__":
    everything = outcomes()
    print("Work:", ", ".join(sorted(kind for kind, said in everything.items() if said == "works")) + ".\n")
    for refused, reason in everything.items():
        if reason not in (None, "works"):
            print(f"| {refused} | {reason} |")
