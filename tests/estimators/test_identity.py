"""The identity behind every measured loss, on a toy world whose posteriors can be enumerated.

E KL(p || r) = [I(X; Y | C) - I(T; Y | C)] + E KL(pbar || r), with p = p(y | x, c), T a function of X and C, pbar = p(y | t, c)
and r any prediction from (t, c).
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

CONTEXTS, SOURCES, KEPT, TOKENS = 3, 8, 3, 5


def conditional_information(joint):
    """I(A; Y | C) in bits of joint [C, A, Y], from entropies."""

    def entropy(p):
        positive = p[p > 0]
        return -np.sum(positive * np.log2(positive))

    return entropy(joint.sum(2)) + entropy(joint.sum(1)) - entropy(joint) - entropy(joint.sum((1, 2)))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("calibrated", [False, True])
def test_loss_is_lost_information_and_miscalibration(seed, calibrated):
    rng = np.random.default_rng(seed)
    p_xc = rng.dirichlet(np.ones(CONTEXTS * SOURCES)).reshape(CONTEXTS, SOURCES)
    p = rng.dirichlet(0.5 * np.ones(TOKENS), (CONTEXTS, SOURCES))  # p(y | x, c)
    kept = rng.integers(0, KEPT, (CONTEXTS, SOURCES))  # t of x and c
    joint_t = np.zeros((CONTEXTS, KEPT, TOKENS))
    for c, x in np.ndindex(CONTEXTS, SOURCES):
        joint_t[c, kept[c, x]] += p_xc[c, x] * p[c, x]
    p_tc = joint_t.sum(2, keepdims=True)
    mean = np.divide(joint_t, p_tc, out=np.ones_like(joint_t), where=p_tc > 0)  # pbar
    r = mean if calibrated else rng.dirichlet(np.ones(TOKENS), (CONTEXTS, KEPT))
    loss = sum(p_xc[c, x] * np.sum(p[c, x] * np.log2(p[c, x] / r[c, kept[c, x]])) for c, x in np.ndindex(CONTEXTS, SOURCES))
    miscalibration = np.sum(joint_t * np.log2(mean / r))
    lost = conditional_information(p_xc[..., None] * p) - conditional_information(joint_t)
    assert loss == pytest.approx(lost + miscalibration, abs=1e-6)
    assert miscalibration >= -1e-12
    assert lost >= -1e-12  # so what is measured is a lower bound on what T retains


@given(st.integers(0, 2**31), st.floats(0, 1))
@settings(deadline=None, max_examples=50)
def test_random_eviction_scales_information(seed, keep):
    """T' is T with probability `keep`, else a mark that says it is gone: I(X; T') = keep I(X; T)."""
    joint = np.random.default_rng(seed).dirichlet(np.ones(SOURCES * KEPT)).reshape(1, SOURCES, KEPT)
    gone = (1 - keep) * joint.sum(2, keepdims=True)
    erased = np.concatenate([keep * joint, gone], axis=2)
    assert conditional_information(erased) == pytest.approx(keep * conditional_information(joint), abs=1e-9)


@given(st.integers(0, 2**31), st.integers(1, KEPT))
@settings(deadline=None, max_examples=50)
def test_functions_of_the_compressed_cache_say_no_more(seed, fewer):
    """Data processing along X - T - T', and no KL divergence is negative."""
    rng = np.random.default_rng(seed)
    joint = rng.dirichlet(np.ones(SOURCES * KEPT)).reshape(1, SOURCES, KEPT)
    merged = np.zeros((1, SOURCES, fewer))
    for t, coarse in enumerate(rng.integers(0, fewer, KEPT)):
        merged[..., coarse] += joint[..., t]
    assert -1e-12 <= conditional_information(merged) <= conditional_information(joint) + 1e-12
    p, r = rng.dirichlet(np.ones(TOKENS), 2)
    assert np.sum(p * np.log2(p / r)) >= 0
