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
    KVgradPress,
    KVzipPress,
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
CHUNK = 64  # tokens that are read again at a time
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


class NoWords:
    """In place of a tokenizer: the model is asked nothing, and repeats the context behind itself."""

    chat_template = None

    def encode(self, *_, **__):
        return torch.zeros(1, 0, dtype=torch.int64)


def repetitions(model, ids, press, name):
    """What the attention layers saw when chunks of the context were read again, and the scores of their tokens."""
    found = {}

    def attention(self, module, hidden_states, keys, kwargs):
        """Chunks are told apart by where they begin."""
        key, (cos, sin) = f"layer{module.layer_idx}.{name}{self.start_idx}", kwargs["position_embeddings"]
        query = module.q_proj(hidden_states).view(1, -1, 4, HEAD_DIM).transpose(1, 2)
        chunk = slice(self.start_idx, self.end_idx)
        found[f"{key}.query"] = apply_rotary_pos_emb(query, query, cos, sin)[0][0]
        sinks = min(self.n_sink, self.start_idx)
        read = [keys[0, :, :sinks], keys[0, :, chunk], keys[0, :, -hidden_states.shape[1] :]]
        found[f"{key}.keys"] = torch.cat(read, 1)
        found[f"{key}.values"] = self._cache.layers[module.layer_idx].values[0, :, chunk]
        return plain(self, module, hidden_states, keys, kwargs)

    def gradients(self, model, cache, layer, captures):
        found[f"layer{layer}.{name}{self.start_idx}.gradient"] = captures["attention_outputs"][layer].grad[0]
        updated(self, model, cache, layer, captures)

    def scores(self, model):
        for key in [key for key in found if key.endswith("values")]:
            begin = int(key.split(".")[1].removeprefix(name))
            of_layer = self.score_val[int(key.split(".")[0].removeprefix("layer"))][0]
            found[key.replace("values", "score")] = of_layer[:, begin : begin + found[key].shape[1]]

    plain, updated = KVzipPress._compute_cross_attention, KVgradPress._update_scores
    with (
        mock.patch.object(KVzipPress, "_compute_cross_attention", attention),
        mock.patch.object(KVgradPress, "_update_scores", gradients),
        mock.patch.object(KVzipPress, "compress_post", scores),
        mock.patch("kvpress.presses.kvzip_press.AutoTokenizer.from_pretrained", return_value=NoWords()),
        press(model),
    ):
        model(input_ids=ids, past_key_values=DynamicCache())
    return found


@torch.no_grad()
def main(folder: Path):
    model = tiny_model().eval()
    model.set_attn_implementation("eager")  # H2O reads its weights
    ids = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(1))[None, :TOKENS]  # distinct: no ties in layer 0
    recorder = Recorder()
    with recorder(model):
        model(input_ids=ids, past_key_values=DynamicCache())
    model.set_attn_implementation("sdpa")
    for name, kind in {"kvzip": KVzipPress, "kvgrad": KVgradPress}.items():
        press = kind(chunk_size=CHUNK, compression_ratio=RATIO)
        recorder.tensors |= repetitions(model, ids, press, name)
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in recorder.tensors.items()}
    save_file(
        tensors, folder / "kvpress.safetensors", {"presses": json.dumps({name: repr(press) for name, press in PRESSES.items()})}
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
