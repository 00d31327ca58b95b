"""Heads are estimated a few at a time: how many changes nothing."""

import numpy as np
import pytest
import torch

from ib_analysis.errors import EstimatorError
from ib_analysis.estimators import CodeEntropy, CopulaGaussian, DitheredChannel, Gaussian, chunks
from ib_analysis.estimators.chunks import in_chunks

HEAD_BYTES = 2 * 203 * 2 * 8  # of the samples below


@pytest.fixture
def heads():
    """x and a decoded copy of 4 bits of 2 x 3 heads, each of another correlation."""
    x = np.random.default_rng(0).standard_normal((2, 3, 203, 2))
    x[..., 1] += np.arange(6).reshape(2, 3, 1) * x[..., 0]
    return x, 0.5 * (np.clip(np.floor(x / 0.5), -8, 7) + 0.5)


@pytest.mark.parametrize(
    "chunk_bytes", [1, HEAD_BYTES, 2 * HEAD_BYTES, 4 * HEAD_BYTES, 6 * HEAD_BYTES - 1, 6 * HEAD_BYTES, 2**40]
)
@pytest.mark.parametrize(
    "method", [Gaussian(), CopulaGaussian(), DitheredChannel(), CodeEntropy()], ids=lambda method: method.name
)
def test_any_chunk_gives_what_a_loop_gives(method, chunk_bytes, heads, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", chunk_bytes)
    x, y = heads
    batch = method.estimate(x, y)
    for head in np.ndindex(2, 3):
        alone = method.estimate(x[head], y[head])
        assert alone.bits == pytest.approx(batch.bits[head], abs=1e-11)
        assert alone.interval == pytest.approx([end[head] for end in batch.interval], abs=1e-11)
        assert set(alone.flags) == {name for name, mask in batch.flags.items() if mask[head]}


@pytest.mark.parametrize(("chunk_bytes", "calls"), [(1, 6), (2 * 5 * 8, 3), (4 * 5 * 8, 2), (2**20, 1)])
def test_as_many_heads_as_fit_are_passed(chunk_bytes, calls, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", chunk_bytes)
    values = torch.arange(30.0, dtype=torch.float64).reshape(2, 3, 5, 1)
    shapes = []

    def sums(chunk):
        shapes.append(chunk.shape)
        return chunk.sum((1, 2)), chunk[..., 0]

    total, same = in_chunks(sums, values)
    assert total.tolist() == values.sum((2, 3)).tolist()
    assert torch.equal(same, values[..., 0])
    assert len(shapes) == calls
    assert all(shape[1:] == (5, 1) for shape in shapes)


def test_refusal_in_a_later_chunk_names_the_head(heads, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2 * HEAD_BYTES)
    x, _ = heads
    y = np.random.default_rng(1).standard_normal(x.shape)
    y[1, 2] = x[1, 2]
    with pytest.raises(EstimatorError, match=r"head \[1, 2\]"):
        Gaussian().estimate(x, y)
