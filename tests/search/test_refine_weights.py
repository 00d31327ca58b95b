"""Weights after refining lose less when tokens are evicted together, on other prompts too."""

import pytest
import torch

from ib_analysis.search.refine_weights import SHARES, refine_weights

HEADS, SAMPLES, SIGNS = 3, 4, 5


def set_losses(weights, prompts):
    """What evicting all but the best tokens costs, by definition: [U, shares], means over prompts."""
    of_prompts = []
    for signs, moved in prompts:
        order = torch.einsum("uns,us->un", signs, weights).argsort(1, descending=True)
        ordered = moved.gather(2, order[:, None].expand_as(moved))
        evicted = [ordered[:, :, round(share * ordered.shape[2]) :].sum(2).square().mean(1) for share in SHARES]
        of_prompts.append(torch.stack(evicted, 1))
    return torch.stack(of_prompts).mean(0)


def prompts_of(count, seed):
    """Tokens that the first sign marks move the output much, each in a direction of its own; those of the second all in one."""
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for _ in range(count):
        signs = torch.randn(HEADS, 200, SIGNS, generator=generator)
        alone = torch.randn(HEADS, SAMPLES, 200, generator=generator) * signs[:, None, :, 0].exp()
        common = torch.randn(HEADS, SAMPLES, 1, generator=generator) * signs[:, None, :, 1].exp()
        prompts.append((signs, alone + common))
    return prompts


@pytest.mark.parametrize("count", [4, 64])
def test_sets_lose_less_on_other_prompts(count):
    alone = torch.tensor([[1.0, 0.2, 0.0, 0.0, 0.0]]).repeat(HEADS, 1)
    found = refine_weights(alone, prompts_of(count, 0))
    before, after = (set_losses(weights, prompts_of(100, 1)) for weights in (alone, found))
    assert (after < before).all()
    if count == 64:
        assert (after.mean(1) < 0.8 * before.mean(1)).all()
    assert torch.equal(found, refine_weights(alone, prompts_of(count, 0)))


def test_the_size_of_signs_and_of_losses_does_not_show():
    prompts, sizes = prompts_of(8, 0), torch.tensor([1e-3, 1.0, 10.0, 1e3, 5.0])
    weights = torch.randn(HEADS, SIGNS)
    found = refine_weights(weights, prompts)
    scaled = refine_weights(weights / sizes, [(signs * sizes, 1e-4 * moved) for signs, moved in prompts])
    torch.testing.assert_close(scaled * sizes, found, rtol=1e-2, atol=1e-3)


def test_heads_without_preferences_and_prompts_without_order_stay():
    weights = torch.randn(HEADS, SIGNS)
    weights[1] = 0
    found = refine_weights(weights, prompts_of(4, 0))
    assert torch.equal(found[1], weights[1]) and not torch.equal(found[0], weights[0])
    assert torch.equal(refine_weights(weights, [(torch.randn(HEADS, 1, SIGNS), torch.randn(HEADS, SAMPLES, 1))]), weights)
    nothing = [(signs, torch.zeros_like(moved)) for signs, moved in prompts_of(4, 0)]
    assert refine_weights(weights, nothing).isfinite().all()
