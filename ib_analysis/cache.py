"""A transformers cache that keeps, in each layer and KV head, what its plan says, in packed storage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from ib_kernels import pad, partial_attention
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ib_analysis.attention import AnsweringLayer, causal_mask, finish, full_attention, grouped_attention
from ib_analysis.formats.packed import PackedTokens
from ib_analysis.plan import HeadPlan, Pinned, Plans
from ib_analysis.scorers import Scorer
from ib_analysis.shape import CacheShape


@dataclass
class PackedHeads:
    """Tokens of some KV heads at one format and precision. Run b * len(heads) + j is head heads[j] of sequence b."""

    heads: list[int]
    tokens: PackedTokens


@dataclass
class _Run:
    """Tokens to be packed: those of one sequence and head that one tier takes."""

    head: int
    keys: Tensor  # [n, D]
    values: Tensor  # [n, D]


class CompressedLayer(CacheLayerMixin, AnsweringLayer):
    """One layer. The first block that it sees is answered at full precision, then compressed.

    `keys` and `values` [B, H_kv, S + w, D] are the pinned tokens at 16 bits: S sinks, then w recent ones. `packed` holds
    the rest. Evicted tokens and padding are gone.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, plans: tuple[HeadPlan, ...], pinned: Pinned, scorer: Scorer) -> None:
        super().__init__()
        self.plans, self.pinned, self.scorer = plans, pinned, scorer
        self._clear()

    def _clear(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.is_initialized = False
        self.packed: list[PackedHeads] = []
        self.sink_mask: Tensor | None = None  # bool [B, S], false where a short sequence has no sink; None if all have
        self.compressible: list[int] = []  # per sequence, the tokens that have been compressed or evicted
        self.start = 0  # position where the window begins
        self.cumulative_length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        heads, head_dim = key_states.shape[1], key_states.shape[-1]
        if heads != len(self.plans) or head_dim != value_states.shape[-1]:
            raise ValueError(
                f"the plan is for {len(self.plans)} KV heads with keys and values of one size, but the model has {heads} "
                f"with keys of {head_dim} and values of {value_states.shape[-1]} channels"
            )
        self.dtype = key_states.dtype if key_states.dtype in (torch.float16, torch.bfloat16) else torch.float16
        self.device = key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.new = key_states, value_states
        self.cumulative_length += key_states.shape[-2]
        return self, self

    def attend(
        self, module: torch.nn.Module, query: Tensor, mask: Tensor | None, scaling: float, extras: dict[str, Any]
    ) -> Tensor:
        new_keys, new_values = self.new
        del self.new
        if self.keys is None or self.values is None:
            out = full_attention(module, query, new_keys, new_values, mask, scaling, extras)
            self._compress(query, new_keys, new_values, mask, scaling)
            return out
        self.keys = torch.cat([self.keys, new_keys.to(self.dtype)], dim=2)
        self.values = torch.cat([self.values, new_values.to(self.dtype)], dim=2)
        visible = self._exact_mask(query.shape[2], mask)  # [B or 1, 1, M, S + w]
        out, lse = grouped_attention(query, self.keys, self.values, visible, scaling, extras)
        outs, lses = [out], [lse]
        for part in self.packed:
            out, lse = self._attend_packed(part, query, scaling, extras)
            outs.append(out)
            lses.append(lse)
        self._flush(query, visible, scaling)
        return finish(outs, lses, query, extras)

    def _attend_packed(self, part: PackedHeads, query: Tensor, scaling: float, extras: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Attention to one part; heads that it does not hold see nothing. Shapes as `grouped_attention`."""
        batch, _, _, head_dim = query.shape
        grouped = query.reshape(batch, len(self.plans), -1, head_dim)  # [B, H_kv, G * M, D]
        keys, values = part.tokens.unpack()
        padded_keys, present = pad(keys, part.tokens.lengths)
        padded_values, _ = pad(values, part.tokens.lengths)
        some_out, some_lse = partial_attention(
            grouped[:, part.heads].flatten(0, 1),
            padded_keys,
            padded_values,
            present[:, None],
            scaling,
            extras.get("softcap"),
        )
        out = some_out.new_zeros(grouped.shape)
        lse = some_lse.new_full(grouped.shape[:3], -torch.inf)
        out[:, part.heads] = some_out.unflatten(0, (batch, -1))
        lse[:, part.heads] = some_lse.unflatten(0, (batch, -1))
        return out.flatten(0, 1), lse.flatten(0, 1)

    def _exact_mask(self, length: int, mask: Tensor | None) -> Tensor:
        """Which pinned tokens the `length` newest positions see: bool [B or 1, 1, length, S + w]."""
        assert self.keys is not None
        tokens = self.keys.shape[2]
        sinks = self._sink_count
        if mask is None:
            visible = causal_mask(length, tokens, self.device)
        else:
            visible = torch.ones(mask.shape[0], 1, length, tokens, dtype=torch.bool, device=self.device)
            visible[..., sinks:] = mask[..., mask.shape[-1] - (tokens - sinks) :]
        if self.sink_mask is not None:
            visible = visible.expand(self.sink_mask.shape[0], -1, -1, -1).clone()
            visible[..., :sinks] &= self.sink_mask[:, None, None, :]
        return visible

    @property
    def _sink_count(self) -> int:
        return min(self.pinned.sinks, self.start)

    def _compress(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> None:
        """Sinks and window to 16 bits, the tokens between them to packed storage."""
        batch, _, length, _ = keys.shape
        valid = _valid_tokens(mask, batch, length, self.device)
        first = (~valid).sum(1).tolist()  # position of each sequence's first token
        sinks = min(self.pinned.sinks, length)
        self.start = sinks + self.pinned.compressible(length)
        self.compressible = [max(0, self.start - position - sinks) for position in first]
        slots = torch.arange(sinks, device=self.device)
        sink_positions = torch.tensor(first, device=self.device)[:, None] + slots  # [B, S]
        in_front = sink_positions < self.start
        self.sink_mask = None if bool(in_front.all()) else in_front
        exact = torch.cat(
            [
                sink_positions.clamp(max=length - 1),
                torch.arange(self.start, length, device=self.device).expand(batch, -1),
            ],
            1,
        )
        rows = exact[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        self.keys, self.values = keys.gather(2, rows).to(self.dtype), values.gather(2, rows).to(self.dtype)
        if not any(self.compressible):
            return
        scores = self.scorer(query, keys, values, valid, scaling)
        runs: dict[tuple[str, int, int], list[_Run]] = {}
        for b in range(batch):
            middle = slice(first[b] + sinks, max(first[b] + sinks, self.start))
            for h, plan in enumerate(self.plans):
                counts = plan.counts(self.compressible[b])
                self._take(runs, h, counts, scores[b, h, middle], keys[b, h, middle], values[b, h, middle])
        for (fmt, key_bits, value_bits), some in runs.items():
            packed = PackedTokens.pack(fmt, *_flat(some), key_bits, value_bits, self.dtype)
            self.packed.append(PackedHeads([run.head for run in some[: len(some) // batch]], packed))

    def _take(
        self,
        runs: dict[tuple[str, int, int], list[_Run]],
        head: int,
        counts: list[int],
        scores: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> None:
        """Slice tokens [n, D], ranked by scores [n], into the tiers of `head`: counts[t] for tier t, in order of position."""
        ranked = scores.argsort(descending=True, stable=True)
        begin = 0
        for tier, count in zip(self.plans[head].tiers, counts):
            taken = ranked[begin : begin + count].sort().values
            key = (self.plans[head].format, tier.key_bits, tier.value_bits)
            runs.setdefault(key, []).append(_Run(head, keys[taken], values[taken]))
            begin += count

    def _flush(self, query: Tensor, visible: Tensor, scaling: float) -> None:
        """Moves the oldest tokens out of the window, as many as the length asks for, ranked by the newest queries."""
        assert self.keys is not None and self.values is not None
        sinks = min(self.pinned.sinks, self.cumulative_length)
        self._grow_sinks(sinks, visible)
        leaving = sinks + self.pinned.compressible(self.cumulative_length) - self.start
        if leaving <= 0:
            return
        batch = self.keys.shape[0]
        present = visible[:, 0, -1].expand(batch, -1)  # [B, S + w]: what the newest token sees is no padding
        scores = self.scorer(query, self.keys, self.values, present, scaling)
        runs: dict[tuple[str, int, int], list[_Run]] = {}
        for b in range(batch):
            chunk = sinks + present[b, sinks : sinks + leaving].nonzero()[:, 0]  # [n]
            before, after = self.compressible[b], self.compressible[b] + chunk.numel()
            for h, plan in enumerate(self.plans):
                counts = [new - old for new, old in zip(plan.counts(after), plan.counts(before))]
                self._take(runs, h, counts, scores[b, h, chunk], self.keys[b, h, chunk], self.values[b, h, chunk])
            self.compressible[b] = after
        self._append(runs, batch)
        self.keys = torch.cat([self.keys[:, :, :sinks], self.keys[:, :, sinks + leaving :]], dim=2)
        self.values = torch.cat([self.values[:, :, :sinks], self.values[:, :, sinks + leaving :]], dim=2)
        self.start += leaving

    def _grow_sinks(self, sinks: int, visible: Tensor) -> None:
        """While the cache is shorter than its sinks, every token becomes one."""
        grown = sinks - self._sink_count
        if grown > 0:
            if self.sink_mask is not None:
                self.sink_mask = visible[:, 0, -1, :sinks].clone()
            self.start += grown

    def _append(self, runs: dict[tuple[str, int, int], list[_Run]], batch: int) -> None:
        held = {(part.tokens.format_name, part.tokens.key_bits, part.tokens.value_bits): part for part in self.packed}
        for (fmt, key_bits, value_bits), some in runs.items():
            part = held.get((fmt, key_bits, value_bits))
            if part is None:
                packed = PackedTokens.pack(fmt, *_flat(some), key_bits, value_bits, self.dtype)
                self.packed.append(PackedHeads([run.head for run in some[: len(some) // batch]], packed))
            else:
                part.tokens.append(*_flat(some))

    def get_seq_length(self) -> int:
        """Tokens seen, kept or not: positions are counted by it."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        held = [t for t in (self.keys, self.values, self.sink_mask) if t is not None]
        return held + [tensor for part in self.packed for tensor in part.tokens.tensors().values()]

    def reset(self) -> None:
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest tokens; a negative number, as in transformers. Only tokens still in the window can go."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number, the tokens to remove, not {tokens_to_remove}")
        if tokens_to_remove == 0 or self.keys is None or self.values is None:
            return
        window = self.keys.shape[2] - self._sink_count
        if -tokens_to_remove > window:
            raise ValueError(
                f"cannot crop {-tokens_to_remove} tokens: only the {window} newest are not compressed; "
                "use an allocation with a longer window, or fill the cache again"
            )
        self.keys, self.values = self.keys[:, :, :tokens_to_remove], self.values[:, :, :tokens_to_remove]
        self.cumulative_length += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.keys is not None:
            self.batch_select_indices(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences that `indices` names, in its order; repeats allowed."""
        if self.keys is None or self.values is None:
            return
        indices = indices.to(self.keys.device)
        self.keys, self.values = self.keys[indices], self.values[indices]
        if self.sink_mask is not None:
            self.sink_mask = self.sink_mask[indices]
        self.compressible = [self.compressible[b] for b in indices.tolist()]
        for part in self.packed:
            heads = torch.arange(len(part.heads), device=indices.device)
            part.tokens = part.tokens.select((indices[:, None] * len(part.heads) + heads).flatten())

    def offload(self) -> None:
        self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        self._move(self.device)

    def _move(self, device: torch.device) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys.to(device), self.values.to(device)
            self.sink_mask = None if self.sink_mask is None else self.sink_mask.to(device)
            for part in self.packed:
                part.tokens = part.tokens.to(device)


class CompressedCache(Cache):
    """Pass it to `model.generate(..., past_key_values=cache)`. Build it with `Allocation.cache(model)`.

    `plans` has a row of head plans for each layer, None for one that stays at full precision, as sliding-window layers
    do. The model must use the attention function of `ib_analysis.attention.use_attention`.
    """

    def __init__(self, shape: CacheShape, plans: Plans, pinned: Pinned, scorer: Scorer) -> None:
        layers: list[CacheLayerMixin] = []
        for layer, heads in zip(shape.layers, plans, strict=True):
            if layer.sliding_window is not None:
                layers.append(DynamicSlidingWindowLayer(sliding_window=layer.sliding_window))
            else:
                layers.append(DynamicLayer() if heads is None else CompressedLayer(heads, pinned, scorer))
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor that the cache holds."""
        return sum(_layer_nbytes(layer) for layer in self.layers)

    @property
    def sliding_nbytes(self) -> int:
        """Of these, the bytes of sliding-window layers, which are never compressed."""
        return sum(_layer_nbytes(layer) for layer in self.layers if layer.is_sliding)


def _layer_nbytes(layer: CacheLayerMixin) -> int:
    tensors = layer.tensors() if isinstance(layer, CompressedLayer) else [layer.keys, layer.values]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _flat(runs: list[_Run]) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [N, D], values [N, D] and lengths [P] of runs, one after the other."""
    lengths = torch.tensor([len(run.keys) for run in runs], device=runs[0].keys.device)
    return torch.cat([run.keys for run in runs]), torch.cat([run.values for run in runs]), lengths


def _valid_tokens(mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """Which tokens of the first block are no padding: bool [B, T]. Raises ValueError unless padding is on the left."""
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    valid = mask[:, 0, -1].expand(batch, -1)
    if not bool((valid[:, 1:] >= valid[:, :-1]).all()):
        raise ValueError("a compressed cache needs padding on the left: set tokenizer.padding_side = 'left'")
    return valid
