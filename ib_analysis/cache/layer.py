"""One layer of a cache that keeps, in each KV head, what its plan says, in packed storage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from ib_kernels import RAW_BITS, Bases, PackedTokens, Schedule, Window, packed_attention, quantize_pack, schedule
from ib_kernels.backends import pick_backend
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from ib_analysis.cache.attention import AnsweringLayer, causal_mask, finish, full_attention
from ib_analysis.cache.leading_layers import LeadingLayers
from ib_analysis.cache.masks import MaskCheck, check_use, valid_tokens
from ib_analysis.cache.newest_scores import newest_scores
from ib_analysis.cache.numbers import check_range, readable, warn_if_cut
from ib_analysis.cache.plan import QUANTIZED_FORM, HeadPlan, Recent, forms_of
from ib_analysis.cache.quantized_window import QuantizedWindow
from ib_analysis.cache.tiers import ranks, tier_rows
from ib_analysis.scorers import Scorer

QUERY_ROWS = 256  # of a KV head that attend to packed tokens at once: they bound the memory of a long follow-up


class CompressedLayer(CacheLayerMixin, AnsweringLayer):
    """The layer of this number in a cache. The first block that it sees is answered at full precision, then compressed.

    `keys` and `values` [B, H_kv, S + w, D] are the tokens at 16 bits: S sinks, then w recent ones. Those just before these are in
    `quantized`. `packed` holds the rest, one part for each of `forms`. Evicted tokens and padding are gone.
    """

    is_sliding = False
    is_croppable = False  # only what is in the window can go, so assisted generation is refused before it begins

    def __init__(
        self,
        number: int,
        plans: tuple[HeadPlan, ...],
        recent: Recent,
        scorer: Scorer,
        masks: MaskCheck,
        bases: Bases | None = None,
    ) -> None:
        super().__init__()
        self.number, self.plans, self.recent = number, plans, recent
        self.scorer, self.masks, self.bases = scorer, masks, bases
        self.forms = forms_of(plans)
        self.leading = LeadingLayers()  # of the first compressed layer: those before it
        self._clear()

    def _clear(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.is_initialized = False
        self.packed: list[PackedTokens] = []  # run b * len(tiers) + j is what tiers[j] takes of sequence b
        self.quantized: QuantizedWindow | None = None
        self.schedule: Schedule | None = None  # of the kernels, while lengths stay as they are
        self.sink_mask: Tensor | None = None  # bool [B, S], false where a short sequence has no sink; None if all have
        self.compressible: list[int] = []  # per sequence, the tokens that have been compressed or evicted
        self.padding: list[int] = []  # per sequence, the positions before `start` that hold no token
        self.start = 0  # position where the window at 16 bits begins
        self.cumulative_length = 0
        self.changing = False  # while a block is added; and after that, if it was interrupted

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        heads, head_dim = key_states.shape[1], key_states.shape[-1]
        if heads != len(self.plans) or head_dim != value_states.shape[-1]:
            raise ValueError(
                f"the plan is for {len(self.plans)} KV heads with keys and values of one size, but the model has {heads} "
                f"with keys of {head_dim} and values of {value_states.shape[-1]} channels"
            )
        self.dtype = key_states.dtype if key_states.dtype in (torch.float16, torch.bfloat16) else torch.float16
        self.device = key_states.device
        forms = [form for form, _ in self.forms] + [QUANTIZED_FORM] * (self.recent.quantized > 0)
        self.backend = pick_backend(self.device, head_dim, forms)
        self.bases = None if self.bases is None else self.bases.to(self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not self.is_initialized:
            with self.leading.given_back_on_error():
                self.lazy_initialization(key_states, value_states)
        self.new = key_states, value_states
        return self, self

    def attend(self, module: nn.Module, query: Tensor, mask: Tensor | None, scaling: float, extras: dict[str, Any]) -> Tensor:
        new_keys, new_values = self.new
        del self.new
        with self.leading.given_back_on_error():
            check_range(self.number, new_keys, new_values)
            valid = self._check_step(len(new_keys), new_keys.shape[2], mask, extras)
        self.leading.forget()
        if valid is not None:
            out = full_attention(module, query, new_keys, new_values, mask, scaling, extras)
            self.changing = True
            self._compress(new_keys, new_values, valid, lambda: self.scorer(module, query, new_keys, new_values, valid, scaling))
        else:
            self.changing = True
            out = self._append(module, query, new_keys, new_values, mask, scaling, extras)
        self.changing = False
        return out

    def _check_step(self, batch: int, length: int, mask: Tensor | None, extras: dict[str, Any]) -> Tensor | None:
        """Which tokens of a first block are no padding, bool [B, T]; None for a later one. Raises ValueError."""
        if self.keys is None:
            return valid_tokens(mask, batch, length, self.device)
        check_use(extras, self.cumulative_length, length)
        if mask is not None:
            self.masks.check(mask, self.cumulative_length + length, self.start, self.padding)
        return None

    def fill(self, keys: Tensor, values: Tensor, valid: Tensor, scores: Tensor) -> None:
        """Compresses a first block of keys and values [B, H_kv, T, D], ranked by scores [B, H_kv, T].

        `valid` bool [B, T] is false at padding, which is in front.
        """
        self.lazy_initialization(keys, values)
        self.changing = True
        self._compress(keys, values, valid, lambda: scores)
        self.changing = False

    def _append(
        self,
        module: nn.Module,
        query: Tensor,
        new_keys: Tensor,
        new_values: Tensor,
        mask: Tensor | None,
        scaling: float,
        extras: dict[str, Any],
    ) -> Tensor:
        """Adds a later block, whose queries see what is packed, too."""
        assert self.keys is not None and self.values is not None
        self.cumulative_length += new_keys.shape[2]
        self.keys = torch.cat([self.keys, new_keys.to(self.dtype)], dim=2)
        self.values = torch.cat([self.values, new_values.to(self.dtype)], dim=2)
        length = query.shape[2]
        visible = self._exact_mask(length, mask)
        block = max(1, QUERY_ROWS * len(self.plans) // query.shape[1])
        outs = [
            self._attend_all(
                query[:, :, i : i + block], None if visible is None else visible[:, 0, i : i + block], scaling, extras
            )
            for i in range(0, length, block)
        ]
        self._flush(module, query, visible, scaling)
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)

    def _attend_all(self, query: Tensor, visible: Tensor | None, scaling: float, extras: dict[str, Any]) -> Tensor:
        """Output [B, H, M, D] for queries [B, H, M, D], which see what `visible` [B or 1, M, S + w] says, and what is packed."""
        assert self.keys is not None and self.values is not None
        pairs = self.keys.shape[0] * self.keys.shape[1]
        parts = [part.packed for part in self._parts]
        query32 = query.float() if query.dtype == torch.float64 else query
        softcap = extras.get("softcap")
        if self.backend == "triton" and self.schedule is None:  # for the steps of one token that follow
            grouped = query.shape[1] // self.keys.shape[1]
            capped = softcap is not None
            self.schedule = schedule(parts, pairs, self.device, rows=grouped, dtype=query32.dtype, softcap=capped)
        rows = query32.reshape(pairs, -1, query.shape[-1]).contiguous()  # [B * H_kv, G * M, D]
        seen = None if visible is None else visible.contiguous()
        window = Window(self.keys.flatten(0, 1), self.values.flatten(0, 1), seen)
        out, lse = packed_attention(rows, parts, window, scaling, softcap, schedule=self.schedule, backend=self.backend)
        return finish([out], [lse], query, extras)

    def _exact_mask(self, length: int, mask: Tensor | None) -> Tensor | None:
        """Which tokens at 16 bits the `length` newest positions see: bool [B or 1, 1, length, S + w], or None if all are seen."""
        assert self.keys is not None
        if length == 1 and mask is None and self.sink_mask is None:
            return None
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
    def _parts(self) -> list[PackedTokens]:
        return self.packed if self.quantized is None else [*self.packed, self.quantized.tokens]

    @property
    def _sink_count(self) -> int:
        return min(self.recent.sinks, self.start)

    def _compress(self, keys: Tensor, values: Tensor, valid: Tensor, scores: Callable[[], Tensor]) -> None:
        """Sinks and windows as they are kept, the tokens between them, if there are any, packed by their scores [B, H_kv, T].

        `valid` bool [B, T] are those of the block.
        """
        batch, _, length, _ = keys.shape
        self.cumulative_length = length
        first = (~valid).sum(1)  # position of each sequence's first token
        sinks = min(self.recent.sinks, length)
        self.start = sinks + self.recent.past_window(length)
        ranked = sinks + self.recent.compressible(length)  # position where the quantized window begins
        sink_positions = first[:, None] + torch.arange(sinks, device=self.device)  # [B, S]
        in_front = sink_positions < self.start
        self.sink_mask = None if bool(in_front.all()) else in_front
        position = torch.arange(length, device=self.device)
        exact = torch.cat([sink_positions.clamp(max=length - 1), position[self.start :].expand(batch, -1)], 1)
        rows = exact[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        self.keys, self.values = keys.gather(2, rows).to(self.dtype), values.gather(2, rows).to(self.dtype)
        self.compressible = [0] * batch
        self.padding = (~valid[:, : self.start]).sum(1).tolist()
        no_sinks = position >= first[:, None] + sinks  # [B, T]
        if self.start > ranked:
            window = slice(ranked, self.start)
            self._quantize(keys[:, :, window], values[:, :, window], no_sinks[:, window])
        leaving = no_sinks & (position < ranked)
        if ranked > sinks and bool(leaving.any()):
            self._pack(leaving, scores(), keys, values)

    def _flush(self, module: nn.Module, query: Tensor, visible: Tensor | None, scaling: float) -> None:
        """Moves the oldest tokens out of the windows, as many as the length asks for, ranked by the newest queries."""
        assert self.keys is not None and self.values is not None
        sinks = min(self.recent.sinks, self.cumulative_length)
        self._grow_sinks(sinks, visible)
        count = sinks + self.recent.past_window(self.cumulative_length) - self.start
        if count <= 0:
            return
        present = self._present(visible)
        held = 0 if self.quantized is None else len(self.quantized)
        leaving = sinks + self.recent.compressible(self.cumulative_length) - (self.start - held)  # the quantized window
        if leaving > 0:
            self._rank(module, query, leaving, present, scaling)
        begin, end = sinks + max(0, leaving - held), sinks + count  # of a long block some only pass through it
        if begin < end:
            self._quantize(self.keys[:, :, begin:end], self.values[:, :, begin:end], present[:, begin:end])
        self._count_padding(present[:, sinks : sinks + count])
        self.keys = torch.cat([self.keys[:, :, :sinks], self.keys[:, :, sinks + count :]], dim=2)
        self.values = torch.cat([self.values[:, :, :sinks], self.values[:, :, sinks + count :]], dim=2)
        self.start += count

    def _quantize(self, keys: Tensor, values: Tensor, present: Tensor) -> None:
        """Tokens [B, H_kv, n, D] that leave the window at 16 bits; `present` bool [B, n]."""
        warn_if_cut(self.number, keys, values)
        if self.quantized is None:
            self.quantized = QuantizedWindow.pack(readable(keys), readable(values), present, self.dtype, self.backend)
        else:
            self.quantized.append(keys, values, present)
        self.schedule = None

    def _rank(self, module: nn.Module, query: Tensor, count: int, present: Tensor, scaling: float) -> None:
        """Packs or evicts the `count` oldest tokens that have not been ranked, of which the window at 16 bits has `present`."""
        assert self.keys is not None and self.values is not None
        keys, values, sinks = self.keys, self.values, self._sink_count
        if self.quantized is not None:
            older = (x.to(self.dtype) for x in self.quantized.unpack())
            keys, values = (torch.cat([x[:, :, :sinks], old, x[:, :, sinks:]], 2) for x, old in zip((keys, values), older))
            present = torch.cat([present[:, :sinks], self.quantized.present, present[:, sinks:]], 1)
            self.quantized.drop(min(count, len(self.quantized)))
        leaving = present.clone()
        leaving[:, :sinks] = leaving[:, sinks + count :] = False
        scores = newest_scores(self.scorer, module, query, keys, values, present, scaling)
        self._pack(leaving, scores, keys, values)

    def _count_padding(self, present: Tensor) -> None:
        """Counts what is no token among positions [B, n] that are now before `start`."""
        self.padding = [known + more for known, more in zip(self.padding, (~present).sum(1).tolist())]

    def _present(self, visible: Tensor | None) -> Tensor:
        """Which tokens at 16 bits are no padding, because the newest token sees them: bool [B, S + w]."""
        assert self.keys is not None
        batch, tokens = self.keys.shape[0], self.keys.shape[2]
        if visible is None:
            return torch.ones(batch, tokens, dtype=torch.bool, device=self.device)
        return visible[:, 0, -1].expand(batch, -1)

    def _grow_sinks(self, sinks: int, visible: Tensor | None) -> None:
        """While the cache is shorter than its sinks, every token becomes one."""
        grown = sinks - self._sink_count
        if grown > 0:
            seen = self._present(visible)[:, :sinks]
            self._count_padding(seen[:, sinks - grown :])
            self.sink_mask = None if bool(seen.all()) else seen.clone()
            self.start += grown

    def _pack(self, leaving: Tensor, scores: Tensor, keys: Tensor, values: Tensor) -> None:
        """Packs tokens `leaving` bool [B, T] of keys and values [B, H_kv, T, D]; those of the highest scores come first.

        Tiers take what their shares of all compressible tokens ask for, in order of position.
        """
        if any(min(bits) < RAW_BITS for (_, *bits), _ in self.forms):
            warn_if_cut(self.number, keys, values)
        before = np.array(self.compressible)
        after = before + np.array(leaving.sum(1).tolist())
        rank = ranks(scores, leaving[:, None])  # [B, H_kv, T]
        edges = [head.edges(after, before) for head in self.plans]  # of each head, for its tiers and one more: [B]
        packed = []
        for i, (form, tiers) in enumerate(self.forms):
            heads = torch.tensor([h for h, _ in tiers], device=self.device)
            begin, end = (torch.tensor(np.stack([edges[h][t + n] for h, t in tiers], 1)) for n in (0, 1))  # [B, tiers]
            rows = tier_rows(rank, heads, begin.to(self.device), end.to(self.device))
            lengths = (end - begin).flatten().to(self.device, torch.int32)
            if self.packed:
                self.packed[i].append(keys.flatten(0, 2)[rows], values.flatten(0, 2)[rows], lengths)
            else:
                pairs = self._pairs(heads, len(before))
                fmt, key_bits, value_bits = form
                tokens = (readable(keys), readable(values), rows, lengths, pairs)
                where: dict[str, Any] = {"raw_dtype": self.dtype, "backend": self.backend, "bases": self.bases}
                made = quantize_pack(fmt, *tokens, key_bits, value_bits, **where)
                packed.append(PackedTokens(made, self.dtype, self.backend))
        self.packed = self.packed or packed
        self.compressible = after.tolist()
        self.schedule = None

    def _pairs(self, heads: Tensor, batch: int) -> Tensor:
        """The (sequence, KV head) pairs of the runs of a part: int32 [B * tiers]."""
        sequence = torch.arange(batch, device=self.device)
        return (sequence[:, None] * len(self.plans) + heads).flatten().to(torch.int32)

    def get_seq_length(self) -> int:
        """Tokens seen, kept or not: positions are counted by it."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def tensors(self) -> list[Tensor]:
        """Every tensor that holds tokens, or says which there are."""
        held = [t for t in (self.keys, self.values, self.sink_mask) if t is not None]
        held += [] if self.quantized is None else self.quantized.tensors()
        return held + [tensor for part in self.packed for tensor in part.tensors().values()]

    def reset(self) -> None:
        self._clear()

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError if `crop` cannot be done."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number, the tokens to remove, not {tokens_to_remove}")
        window = 0 if self.keys is None else self.keys.shape[2] - self._sink_count
        if self.keys is not None and -tokens_to_remove > window:
            raise ValueError(
                f"cannot crop {-tokens_to_remove} tokens: only the {window} newest are not compressed; "
                "use an allocation with a longer window, or fill the cache again"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest tokens; a negative number, as in transformers. Only tokens still in the window can go."""
        self.check_crop(tokens_to_remove)
        if tokens_to_remove == 0 or self.keys is None or self.values is None:
            return
        # Copied: a view would keep the forgotten tokens in memory.
        self.keys, self.values = (x[:, :, :tokens_to_remove].clone() for x in (self.keys, self.values))
        self.cumulative_length += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.keys is not None:
            self.batch_select_indices(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences that `indices` names, in its order, as it would select rows of a tensor; repeats allowed."""
        if self.keys is None or self.values is None:
            return
        indices = torch.arange(len(self.keys))[torch.as_tensor(indices, device="cpu")].to(self.keys.device)
        self.keys, self.values = self.keys[indices], self.values[indices]
        if self.sink_mask is not None:
            mask = self.sink_mask[indices]
            self.sink_mask = None if bool(mask.all()) else mask
        self.compressible = [self.compressible[b] for b in indices.tolist()]
        self.padding = [self.padding[b] for b in indices.tolist()]
        if self.quantized is not None:
            self.quantized.select(indices)
        for i, (_, tiers) in enumerate(self.forms[: len(self.packed)]):
            runs = indices[:, None] * len(tiers) + torch.arange(len(tiers), device=indices.device)
            heads = torch.tensor([h for h, _ in tiers], device=indices.device)
            self.packed[i] = self.packed[i].select(runs.flatten(), self._pairs(heads, len(indices)))
        self.schedule = None

    def offload(self) -> None:
        self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        self._move(self.device)

    def _move(self, device: torch.device) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys.to(device), self.values.to(device)
            self.sink_mask = None if self.sink_mask is None else self.sink_mask.to(device)
            self.packed = [part.to(device) for part in self.packed]
            if self.quantized is not None:
                self.quantized.to(device)
            self.schedule = None
