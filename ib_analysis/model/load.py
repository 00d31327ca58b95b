"""Loading a decoder and its tokenizer: the embedded model, a local folder, or a name on the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ib_analysis.errors import CorruptFileError, IBAnalysisError, ModelNotFoundError, UnsupportedModelError
from ib_analysis.files import expanded
from ib_analysis.model.bundled import MODEL

MAX_NUMBERS_PER_BYTE = 16  # of weights; those of 1 bit have 8
SMALL = 2**24  # numbers that a model may have, whatever its files hold


def load(
    name: str | Path | None = None, *, trust_remote_code: bool = False, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer), the model in evaluation mode.

    Nothing is the embedded model; an existing folder or GGUF file, or a name that begins with ".", "/" or "~", is local and never
    looked up on the network; anything else is a name on the hub. Weights are read from safetensors, or from one GGUF file, whose
    codes become numbers of `dtype` again; that needs `pip install "ib-analysis[gguf]"`. `options` go on to `from_pretrained`:
    `device_map`, `offload_folder`, `quantization_config`, ...
    Raises ModelNotFoundError, UnsupportedModelError for what is no decoder, CorruptFileError.
    """
    source = MODEL if name is None else expanded(name)
    local = name is None or source.exists() or str(name).startswith((".", "/", "~"))
    weights: dict[str, Any] = {"use_safetensors": True}
    file: dict[str, Any] = {}
    if source.suffix == ".gguf" and source.is_file():
        _check_gguf(source)
        source, file = source.parent, {"gguf_file": source.name}
        # Newer versions of transformers leave the codes as they are unless they are asked to.
        weights = {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    elif local:
        _check_folder(source)
    place = str(source if local else name)
    try:
        with _damage_named(place):
            config = AutoConfig.from_pretrained(place, local_files_only=local, trust_remote_code=trust_remote_code, **file)
        if type(config) not in AutoModelForCausalLM._model_mapping and not trust_remote_code:
            raise UnsupportedModelError(f"{place} is a {config.model_type} model, not a decoder that predicts next tokens")
        if getattr(config, "is_encoder_decoder", False) or _is_encoder(config):
            raise UnsupportedModelError(f"{place} is a {config.model_type} model with an encoder: pass a decoder-only model")
        if local and not file and not trust_remote_code:
            with _damage_named(place):
                _check_size(source, config)
        model, report = AutoModelForCausalLM.from_pretrained(
            place,
            local_files_only=local,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            **weights,
            **file,
            **options,
            ignore_mismatched_sizes=True,  # they are in the report
            output_loading_info=True,
        )
        _check_weights(place, report)
        tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=local, trust_remote_code=trust_remote_code, **file)
    except SafetensorError as error:
        raise CorruptFileError(f"the weights of {place} are no complete safetensors file ({error}): get them again") from error
    except json.JSONDecodeError as error:
        raise CorruptFileError(f"a JSON file of {place} was cut or edited ({error}): get it again") from error
    except (OSError, ValueError) as error:
        if isinstance(error, IBAnalysisError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ModelNotFoundError(f"cannot load {place!r}: {reason} (pass a hub name, or a folder with the model)") from error
    return model.eval(), tokenizer


def check_model(model: object) -> None:
    """Raises UnsupportedModelError for what is no model of transformers, or one that torch.compile has wrapped."""
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModelError("compiled models are not supported: pass the model that torch.compile was given")
    if not hasattr(model, "config") or not hasattr(model, "set_attn_implementation"):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no model of transformers: pass a PreTrainedModel (ib.load gives a model and a tokenizer)"
        )


def _check_folder(folder: Path) -> None:
    if folder.is_file():
        raise ModelNotFoundError(f"{folder} is a file: pass the folder that it is in")
    config = folder / "config.json"
    if not config.is_file():
        raise ModelNotFoundError(f"there is no model in {folder}: it has no config.json")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptFileError(f"{config} was cut or edited ({error}): get it again") from error
    if not list(folder.glob("*.safetensors")):
        raise ModelNotFoundError(f"{folder} has no *.safetensors weights; other formats are not read, convert them first")


def _check_gguf(file: Path) -> None:
    absent = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if absent:
        raise ModelNotFoundError(f'reading {file} needs {" and ".join(absent)}: pip install "ib-analysis[gguf]"')
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise CorruptFileError(f"{file} is no GGUF file: get it again")


@contextmanager
def _damage_named(place: str) -> Iterator[None]:
    """What transformers makes of a config that describes no model is many kinds of error."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise CorruptFileError(f"the config of {place} describes no model that can be built ({error!r}): get it again") from error


def _check_size(folder: Path, config: PreTrainedConfig) -> None:
    """Before memory is taken for numbers that the files do not have, as a damaged config may ask for terabytes."""
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if numbers > max(MAX_NUMBERS_PER_BYTE * held, SMALL):
        raise CorruptFileError(f"the config.json of {folder} asks for {numbers:,} numbers, but its weights are {held:,} bytes")


def _check_weights(place: str, report: dict[str, Any]) -> None:
    """transformers fills absent weights with random numbers and only warns."""
    absent = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if absent:
        raise CorruptFileError(f"the weights of {place} do not fit its config.json: {absent[0]} is absent or of another shape")


def _is_encoder(config: object) -> bool:
    """BERT and its kin have a causal head in transformers but are trained as encoders, which their config tells."""
    return getattr(config, "is_decoder", None) is False and getattr(config, "model_type", "") in (
        "bert", "roberta", "electra", "xlm-roberta", "camembert", "roformer", "rembert", "megatron-bert", "big_bird",
        "data2vec-text", "ernie", "bert-generation", "roberta-prelayernorm", "xlm-roberta-xl", "xmod", "roc_bert",
    )  # fmt: skip
