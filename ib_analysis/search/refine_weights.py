"""From weights that tell what evicting a token alone would cost to those that lose least when many are evicted together.

What tokens move the output may add up, or cancel: evicting a set costs the square of their sum. Which are evicted is a step in
their scores; in its place a slope is descended.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SHARES = (1 / 2, 1 / 4, 1 / 8)  # of the tokens that are kept
SLOPE = 0.3  # of the step, in standard deviations of the scores
STEPS, RATE = 60, 0.05
PROMPTS = 64  # from which weights move freely; from fewer they stay nearer to where they began
TINY = 1e-30


def refine_weights(weights: Tensor, prompts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Weights [U, signs] of U heads that lose less on these prompts, summed over SHARES; those of 0 stay.

    A prompt is the signs [U, n, signs] of its tokens and how evicting each would move the head's output along each of S
    sampled gradients, [U, S, n] (see `TokenLosses`). Each head's loss is relative to what it begins with.
    """
    prompts = [(signs, moved) for signs, moved in prompts if signs.shape[1] > 1]  # else there is no order
    if not prompts:
        return weights
    spread = torch.stack([signs.float().std(1) for signs, _ in prompts]).mean(0) + TINY  # [U, signs]
    size = (weights * spread).norm(dim=1, keepdim=True).clamp(min=TINY)
    begin = weights * spread / size  # scores count in standard deviations, so their size is free
    with torch.no_grad():
        first = torch.stack([_losses(begin, spread, prompt) for prompt in prompts]).mean(0) + TINY  # [U, shares]
    found = begin.clone().requires_grad_()
    optimizer = torch.optim.Adam([found], lr=RATE)
    near = max(1.0, PROMPTS / len(prompts))
    for _ in range(STEPS):
        optimizer.zero_grad()
        (near * (found - begin).square().sum()).backward()
        for prompt in prompts:  # one by one, so that the memory is that of one
            (_losses(found, spread, prompt) / first).mean(1).sum().div(len(prompts)).backward()
        optimizer.step()
    alive = weights.abs().sum(1, keepdim=True) > 0
    return torch.where(alive, found.detach() * size / spread, weights)


def _losses(weights: Tensor, spread: Tensor, prompt: tuple[Tensor, Tensor]) -> Tensor:
    """Of U heads with each of SHARES kept: [U, shares]."""
    signs, moved = prompt
    scores = torch.einsum("uns,us->un", signs.float(), weights / spread)
    scores = scores / (scores.detach().std(1, keepdim=True) + TINY)
    count = scores.shape[1]
    ordered = scores.detach().sort(1, descending=True).values
    losses = []
    for share in SHARES:
        kept = max(1, min(round(share * count), count - 1))
        edge = (ordered[:, kept - 1 : kept] + ordered[:, kept : kept + 1]) / 2
        evicted = torch.sigmoid((edge - scores) / SLOPE)  # [U, n]
        losses.append(torch.einsum("un,usn->us", evicted, moved.float()).square().mean(1))
    return torch.stack(losses, 1)
