"""Random packed tokens, and attention in float64, for all tests of the kernels."""

import os

import pytest
import torch
from ib_kernels import Packed, get_format, quantize_pack, unpack_tokens
from ib_kernels.bases import Bases

# Triton decides when it is imported whether it interprets: `make test-interpreted` runs the tests of interpreted/ in a process
# of their own. Where there is a GPU they run compiled in this one, too.
if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore = ["test_compiled.py"]
else:
    collect_ignore = [] if torch.cuda.is_available() else ["interpreted"]


def random_keys_and_values(tokens, head_dim, outlier, seed):
    """Keys with an offset in one channel and outliers in another, and values: [1, 1, N, D]."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 1, 1, tokens, head_dim, generator=generator)
    keys[..., 5] *= outlier
    keys[..., 7] += 8
    return keys, values


def random_bases(heads, head_dim, seed=0):
    """Matrices that stretch and turn: [heads, D, D]."""
    generator = torch.Generator().manual_seed(seed)
    turns = torch.linalg.qr(torch.randn(heads, head_dim, head_dim, generator=generator))[0]
    stretches = torch.linspace(2, 0.5, head_dim)
    return Bases((turns * stretches).contiguous(), (turns / stretches).mT.contiguous())


@pytest.fixture
def make_packed():
    def make(fmt, lengths, head_dim=128, key_bits=4, value_bits=4, outlier=1.0, seed=0, pairs=None):
        tokens = sum(lengths)
        keys, values = random_keys_and_values(tokens, head_dim, outlier, seed)
        counts = torch.tensor(lengths, dtype=torch.int32)
        pairs = torch.tensor(range(len(lengths)) if pairs is None else pairs, dtype=torch.int32)
        if key_bits == 16:
            raw_keys, raw_values = ({"words": x[0, 0].to(torch.float16)} for x in (keys, values))
            return Packed(fmt, 16, 16, head_dim, raw_keys, raw_values, counts, pairs)
        bases = random_bases(2, head_dim) if get_format(fmt).turns_keys else None
        return quantize_pack(fmt, keys, values, torch.arange(tokens), counts, pairs, key_bits, value_bits, bases=bases)

    return make


@pytest.fixture
def exact_attention():
    """Attention to all that the parts and the window hold, in float64: (out, log-sum-exp, largest value)."""

    def attend(query, parts, window, scaling, softcap=None, bias=None):
        pairs, rows, _ = query.shape
        out = torch.zeros(query.shape, dtype=torch.float64)
        lse = torch.full((pairs, rows), -torch.inf, dtype=torch.float64)
        largest = 0.0
        for pair in range(pairs):
            logits, values = [], []
            for part in parts:
                unpacked = zip(*(x.double().split(part.lengths.tolist()) for x in unpack_tokens(part)), part.pairs.tolist())
                for run_keys, run_values, owner in unpacked:
                    if owner == pair:
                        some = capped(query[pair].double() @ run_keys.T * scaling, softcap)
                        logits.append(some if bias is None else some + bias[pair, :, None])
                        values.append(run_values)
            if window is not None:
                some = capped(query[pair].double() @ window.keys[pair].double().T * scaling, softcap)
                if window.mask is not None:
                    sequences, positions, _ = window.mask.shape
                    mask = window.mask[pair * sequences // pairs].repeat(rows // positions, 1)
                    some = some.masked_fill(~mask, -torch.inf)
                logits.append(some)
                values.append(window.values[pair].double())
            if logits and torch.cat(values).shape[0]:
                joint = torch.cat(logits, 1)
                out[pair] = joint.softmax(-1).nan_to_num(0.0) @ torch.cat(values)
                lse[pair] = joint.logsumexp(-1)
                largest = max(largest, torch.cat(values).abs().max().item())
        return out, lse, largest

    return attend


def capped(logits, softcap):
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
