"""What tells one model from another: its config, and its weights."""

from __future__ import annotations

import hashlib
import json

from transformers import PreTrainedConfig, PreTrainedModel

from ib_analysis.model.devices import stored_parameters

# Parts of a config that do not change what a model computes.
ORIGIN = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
LABELS = ("id2label", "label2id", "problem_type")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id")
RETURNED = ("use_cache", "output_hidden_states", "output_attentions", "return_dict")
VOLATILE = (*ORIGIN, *LABELS, *TOKENS, *RETURNED)
DIGESTED = 256  # elements of each weight


def model_fingerprint(config: PreTrainedConfig) -> str:
    """A hash of all that a config says about the model's shape."""
    content = {key: value for key, value in config.to_dict().items() if key not in VOLATILE}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def weights_digest(model: PreTrainedModel) -> str:
    """A hash of the first elements of every weight: a model trained further is another model."""
    digest = hashlib.sha256()
    for parameter in stored_parameters(model):
        digest.update(parameter.detach().flatten()[:DIGESTED].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
