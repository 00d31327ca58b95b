"""A block of tokens whose second sequence is padded on the left, and its attention, whole and in float64."""

import torch

B, H, H_KV, T, D = 2, 4, 2, 40, 8
GROUPS = H // H_KV
PADDED = 11  # tokens of the second sequence
SCALING = D**-0.5


def left_padded(queries=T):
    """(query, keys, values, valid), with padding that nobody must read."""
    query, (keys, values) = torch.randn(B, H, queries, D), torch.randn(2, B, H_KV, T, D)
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[1, :PADDED] = False
    keys[1, :, :PADDED] = values[1, :, :PADDED] = 50.0
    query[1, :, : queries - T + PADDED] = 50.0
    return query, 2 * keys, values, valid


def attention(query, keys, valid, causal=True):
    """Weights [B, H, M, T] of the last M positions; those of padded queries are 0."""
    queries, tokens = query.shape[2], keys.shape[2]
    logits = query.double() @ keys.double().repeat_interleave(query.shape[1] // keys.shape[1], 1).transpose(2, 3) * SCALING
    hidden = ~valid[:, None, None].expand_as(logits)
    if causal:
        hidden = hidden | torch.ones(queries, tokens, dtype=torch.bool).triu(tokens - queries + 1)
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
    return weights * valid[:, None, tokens - queries :, None]


def of_groups(of_heads):
    """Means over the query heads of each KV head: [B, H, ...] to [B, H_kv, ...]."""
    return of_heads.unflatten(1, (H_KV, GROUPS)).mean(2)
