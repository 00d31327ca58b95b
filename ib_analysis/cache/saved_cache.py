"""A filled cache as a file: a context that is compressed once, and asked on another day."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from ib_kernels import Packed, PackedTokens, in_bases, quantize_pack, tokens_nbytes
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from ib_analysis.cache.key_bases import KeyBases
from ib_analysis.cache.layer import CompressedLayer
from ib_analysis.cache.plan import QUANTIZED_FORM, Form, HeadPlan, Plans
from ib_analysis.cache.quantized_window import QuantizedWindow
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.errors import ProfileMismatchError
from ib_analysis.files import load_tensors, save_tensors
from ib_analysis.model.devices import is_dispatched
from ib_analysis.model.fingerprint import model_fingerprint, weights_digest
from ib_analysis.model.shape import cache_shape

VERSION = 1
COUNTS = ("compressible", "padding", "start", "cumulative_length")  # of a compressed layer, beside its tensors
OF_LAYER = "layers.{}."


def write_cache(path: Path, spec: CacheSpec, plans: Plans, layers: list[CacheLayerMixin], model: PreTrainedModel) -> None:
    """See `CompressedCache.save`."""
    if cache_shape(model.config) != spec.shape:
        raise ProfileMismatchError(f"the cache is not one of this {type(model).__name__}: pass the model that filled it")
    tensors = {
        OF_LAYER.format(i) + name: tensor.detach().cpu().contiguous()
        for i, layer in enumerate(layers)
        for name, tensor in _named_tensors(layer)
    }
    bases = () if spec.bases is None else spec.bases.layers
    tensors |= {f"bases.{i}": layer.cpu().contiguous().clone() for i, layer in enumerate(bases) if layer is not None}
    header = {
        "version": VERSION,
        **_identity(model),
        **replace(spec, bases=None).to_json(),
        "plans": [None if row is None else [asdict(plan) for plan in row] for row in plans],
        "layers": [_numbers(layer) for layer in layers],
    }
    save_tensors(path, tensors, header)


def read_cache(path: Path, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file that this model's cache was saved to. Raises as `CompressedCache.load` does."""
    tensors, header = load_tensors(path)
    if header.get("version") != VERSION:
        raise ProfileMismatchError(f"{path} has format version {header.get('version')}, not {VERSION}: fill the cache again")
    for name, value in _identity(model).items():
        if header.get(name) != value:
            raise ProfileMismatchError(f"{path} was filled by a model with other {name}: load that one")
    if is_dispatched(model):
        raise ProfileMismatchError("the model is spread over devices, where a saved cache cannot be put: load it on one")
    return tensors, header


def plans_of(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> tuple[CacheSpec, Plans]:
    spec = CacheSpec.from_json(dict(header))
    layers = tuple(tensors.get(f"bases.{i}") for i in range(len(spec.shape.layers)))
    if any(layer is not None for layer in layers):
        spec = replace(spec, bases=KeyBases(layers))
    plans = tuple(None if row is None else tuple(map(HeadPlan.from_json, row)) for row in header["plans"])
    return spec, plans


def _identity(model: PreTrainedModel) -> dict[str, str]:
    return {
        "config": model_fingerprint(model.config),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": weights_digest(model),
    }


def fill_layers(
    layers: list[CacheLayerMixin], tensors: Mapping[str, Tensor], numbers: list[dict[str, Any]], device: torch.device
) -> None:
    """Puts what a file holds into empty layers."""
    for i, (layer, of_layer) in enumerate(zip(layers, numbers, strict=True)):
        prefix = OF_LAYER.format(i)
        held = {name.removeprefix(prefix): tensor.to(device) for name, tensor in tensors.items() if name.startswith(prefix)}
        if not held:
            continue  # a cache that was never filled
        layer.lazy_initialization(held["keys"], held["values"])
        layer.keys, layer.values = held["keys"], held["values"]
        for name in _numbers(layer).keys() - {"quantized"}:
            setattr(layer, name, of_layer[name])
        if isinstance(layer, CompressedLayer):
            layer.sink_mask = held.get("sink_mask")
            forms = [form for form, _ in layer.forms] if "packed.0.lengths" in held else []
            layer.packed = [_packed_tokens(layer, form, f"packed.{n}.", held) for n, form in enumerate(forms)]
            if "quantized.lengths" in held:
                tokens = _packed_tokens(layer, QUANTIZED_FORM, "quantized.", held)
                length, mask = of_layer["quantized"], held.get("quantized_mask")
                layer.quantized = QuantizedWindow(tokens, len(held["keys"]), length, mask)
        if {name for name, _ in _named_tensors(layer)} != held.keys():
            raise ValueError(f"layer {i} has tensors {sorted(held)}")
        if layer.keys.shape != layer.values.shape or layer.keys.ndim != 4 or layer.keys.dtype != layer.values.dtype:
            kinds = [f"{x.dtype} {list(x.shape)}" for x in (layer.keys, layer.values)]
            raise ValueError(f"layer {i} has keys {kinds[0]} and values {kinds[1]}")
        if isinstance(layer, CompressedLayer):
            _check(layer)
    if len({layer.get_seq_length() for layer in layers}) > 1:
        raise ValueError("layers hold different numbers of tokens")


def _check(layer: CompressedLayer) -> None:
    """Raises ValueError unless what was read is what this layer would hold after so many tokens."""
    assert layer.keys is not None
    (batch, heads, exact, _), sinks = layer.keys.shape, min(layer.recent.sinks, layer.start)
    held = 0 if layer.quantized is None else len(layer.quantized)
    counts = [layer.start, layer.cumulative_length, *layer.compressible, *layer.padding]
    if not all(isinstance(count, int) and 0 <= count <= layer.cumulative_length for count in counts):
        raise ValueError(f"a layer counts {counts} tokens")
    if heads != len(layer.plans) or not len(layer.compressible) == len(layer.padding) == batch:
        raise ValueError(f"a layer of {len(layer.plans)} heads holds keys {list(layer.keys.shape)}")
    if exact != sinks + layer.cumulative_length - layer.start or held > layer.recent.quantized:
        raise ValueError(f"a layer holds {exact} tokens at 16 bits and {held} before these")
    mask = layer.sink_mask
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, sinks)):
        raise ValueError(f"a mask is {mask.dtype} {list(mask.shape)}")
    for part, (_, tiers) in zip(layer.packed, layer.forms):
        of_sequences = [[layer.plans[h].counts(n)[t] for h, t in tiers] for n in layer.compressible]
        run_heads = torch.tensor([h for h, _ in tiers], device=layer.keys.device)
        pairs = (torch.arange(batch, device=run_heads.device)[:, None] * heads + run_heads).flatten()
        _check_part(layer, part, torch.tensor(of_sequences).flatten(), pairs)
    if layer.quantized is not None:
        present = layer.quantized.present
        if present.dtype != torch.bool or present.shape != (batch, held):
            raise ValueError(f"a mask is {present.dtype} {list(present.shape)}")
        lengths = present.sum(1).repeat_interleave(heads)
        _check_part(layer, layer.quantized.tokens, lengths, torch.arange(batch * heads, device=lengths.device))


def _check_part(layer: CompressedLayer, part: PackedTokens, lengths: Tensor, pairs: Tensor) -> None:
    assert layer.keys is not None
    packed, nothing = part.packed, torch.zeros(0, dtype=torch.int64, device=layer.keys.device)
    no_keys = layer.keys[:, :, :0].contiguous()
    form = packed.format, packed.key_bits, packed.value_bits
    empty = quantize_pack(
        form[0],
        no_keys,
        no_keys,
        nothing,
        nothing.int(),
        nothing.int(),
        *form[1:],
        raw_dtype=part.dtype,
        backend="reference",
        bases=packed.bases,
    )
    expected = PackedTokens(empty, part.dtype).tensors()
    for name, tensor in part.tensors().items():
        if tensor.dtype != expected[name].dtype or tensor.shape[1:] != expected[name].shape[1:]:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}")
    nbytes = sum(tokens_nbytes(form[0], n, packed.head_dim, *form[1:]) for n in lengths.tolist())
    if packed.lengths.tolist() != lengths.tolist() or packed.pairs.tolist() != pairs.tolist() or part.nbytes != nbytes:
        raise ValueError(f"runs of {packed.lengths.tolist()} tokens of pairs {packed.pairs.tolist()} in {part.nbytes} bytes")


def _named_tensors(layer: CacheLayerMixin) -> Iterator[tuple[str, Tensor]]:
    if layer.keys is None or layer.values is None or layer.get_seq_length() == 0:
        return
    yield "keys", layer.keys
    yield "values", layer.values
    if isinstance(layer, CompressedLayer):
        parts = [(f"packed.{n}.", part) for n, part in enumerate(layer.packed)]
        if layer.quantized is not None:
            parts.append(("quantized.", layer.quantized.tokens))
        for prefix, part in parts:
            yield from ((prefix + name, tensor) for name, tensor in part.tensors().items())
        masks = {"sink_mask": layer.sink_mask, "quantized_mask": None if layer.quantized is None else layer.quantized.mask}
        yield from ((name, mask) for name, mask in masks.items() if mask is not None)


def _numbers(layer: CacheLayerMixin) -> dict[str, Any]:
    if isinstance(layer, CompressedLayer):
        quantized = 0 if layer.quantized is None else len(layer.quantized)
        return {"quantized": quantized, **{name: getattr(layer, name) for name in COUNTS}}
    return {"cumulative_length": layer.cumulative_length} if isinstance(layer, DynamicSlidingWindowLayer) else {}


def _packed_tokens(layer: CompressedLayer, form: Form, prefix: str, held: Mapping[str, Tensor]) -> PackedTokens:
    own = {name.removeprefix(prefix): tensor for name, tensor in held.items() if name.startswith(prefix)}
    keys, values = (
        {name.removeprefix(side): tensor for name, tensor in own.items() if name.startswith(side)}
        for side in ("keys.", "values.")
    )
    bases = layer.bases if in_bases(form[0], "keys", form[1]) else None
    packed = Packed(*form, held["keys"].shape[3], keys, values, own["lengths"], own["pairs"], bases)
    return PackedTokens(packed, layer.dtype, layer.backend)
