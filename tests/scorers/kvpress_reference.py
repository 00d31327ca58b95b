"""Token scores of kvpress 0.5.5 on a tiny random model, to test this project's scorers against.

kvpress needs an older transformers than this project, so run it in an environment of its own:

    python -m venv kvpress-env
    kvpress-env/bin/pip install kvpress==0.5.5 transformers==5.2.0
    kvpress-env/bin/python kvpress_reference.py FOLDER

It writes FOLDER/kvpress.safetensors: what the attention layers saw of one prompt, and the scores that every press gives.
"""

import json
import math
import sys
from pathlib import Path
from unittest import mock

import torch
from kvpress import (
    BasePress,
    CompactorPress,
    CriticalKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    LeverageScorePress,
    NonCausalAttnPress,
    ObservedAttentionPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from safetensors.torch import save_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

TOKENS, VOCABULARY, HEAD_DIM = 96, 100, 16
RATIO = 0.5  # of the tokens evicted, where a score depends on it
PRESSES = {
    "knorm": KnormPress(),
    "keydiff": KeyDiffPress(),
    "tova": TOVAPress(),
    "snapkv": SnapKVPress(window_size=8),
    "streaming_llm": StreamingLLMPress(RATIO),
    "expected_attention": ExpectedAttentionPress(),
    "leverage_exact": LeverageScorePress(sketch_dimension=HEAD_DIM),  # with the identity as its sketch
    "non_causal": NonCausalAttnPress(chunk_size=32),
    "compactor_exact": CompactorPress(RATIO, sketch_dimension=HEAD_DIM, chunk_size=42, blending=0.35),
    "criticalkv": CriticalKVPress(SnapKVPress(RATIO, window_size=8)),
    "observed_attention": ObservedAttentionPress(),
}


def tiny_model() -> LlamaForCausalLM:
    """Its attention is far from uniform, and its queries and keys have a mean."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        tie_word_embeddings=True,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1 + 0.2 * noise)
            elif "embed" in name:
                weight.copy_(noise + 0.5 * torch.randn(weight.shape[-1], generator=generator))
            else:
                weight.copy_((0.18 if "q_proj" in name or "k_proj" in name else 0.12) * noise)
    return model


def identity(*shape, **_):
    """In place of torch.randn: what kvpress scales to the identity."""
    return torch.eye(shape[-1]).expand(shape) * math.sqrt(shape[-1])


class Recorder(BasePress):
    """Compresses nothing: notes what every attention layer saw, and what the presses make of it."""

    def __init__(self):
        self.tensors = {}

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        layer, (cos, sin) = module.layer_idx, kwargs["position_embeddings"]
        heads = (1, TOKENS, -1, HEAD_DIM)
        unrotated = [project(hidden_states).view(heads).transpose(1, 2) for project in (module.q_proj, module.k_proj)]
        found = {"keys": keys, "values": values, "keys_unrotated": unrotated[1]}
        found["query"] = apply_rotary_pos_emb(*unrotated, cos, sin)[0]
        for name, press in PRESSES.items():
            weights = attentions if name == "observed_attention" else None
            with mock.patch.object(torch, "randn", identity if "exact" in name else torch.randn):
                found[f"score.{name}"] = press.score(module, hidden_states, keys, values, weights, kwargs)
        self.tensors |= {f"layer{layer}.{name}": tensor[0] for name, tensor in found.items()}
        self.tensors[f"layer{layer}.o_proj"] = module.o_proj.weight
        return keys, values


@torch.no_grad()
def main(folder: Path):
    model = tiny_model().eval()
    model.set_attn_implementation("eager")  # H2O reads its weights
    ids = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(1))[None, :TOKENS]  # distinct: no ties in layer 0
    recorder = Recorder()
    with recorder(model):
        model(input_ids=ids, past_key_values=DynamicCache())
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in recorder.tensors.items()}
    save_file(
        tensors, folder / "kvpress.safetensors", {"presses": json.dumps({name: repr(press) for name, press in PRESSES.items()})}
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
