"""Views never hold more than there is, and find what a correlation does not."""

import numpy as np
import pytest
import torch

from ib_analysis.estimators.copula import normal_scores
from ib_analysis.estimators.hard_tasks import SEEN
from ib_analysis.estimators.known_information import KNOWN_TASKS
from ib_analysis.estimators.views import grid_nats, negentropy_deviation_nats, negentropy_nats, seen_nats


def scores(task, count, seed=0):
    x, y = task.sample(count, np.random.default_rng(seed))
    return normal_scores(torch.tensor(x)[None]), normal_scores(torch.tensor(y)[None])


def seen_bits(task, count):
    x, y = scores(task, count)
    return float(seen_nats(x, y, np.arange(count))[0]) / np.log(2)


@pytest.mark.parametrize("name", SEEN)
def test_no_view_holds_more_than_there_is(name):
    assert seen_bits(SEEN[name], 2000) <= SEEN[name].information_bits + 0.02


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("letter Z", 0.6),
        ("board of 4", 0.8),
        ("cross of two correlations", 0.8),
        ("student 3x3 df=2", 0.8),
        ("parity of two signs", 0.7),
        ("label against 20", 0.8),
        ("erased normal", 0.8),
    ],
)
def test_views_find_most_of_what_correlations_miss(name, share):
    assert seen_bits(SEEN[name], 4000) >= share * SEEN[name].information_bits


@pytest.mark.parametrize("dims", [(1, 1), (3, 2), (20, 20)])
def test_independent_samples_share_nothing(dims):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, 1000, dim, generator=generator, dtype=torch.float64) for dim in dims)
    seen = seen_nats(x, y, np.arange(1000))
    assert (seen < 0.02).all() and (seen == 0).sum() >= 34


@pytest.mark.parametrize("dims", [(1, 1), (4, 4)])
def test_documents_of_equal_tokens_share_nothing(dims):
    """300 documents of 20 nearly equal tokens: a grid that took them for 6,000 samples would see much."""
    generator = torch.Generator().manual_seed(0)
    documents = np.repeat(np.arange(300), 20)
    x, y = (torch.randn(20, 300, dim, generator=generator, dtype=torch.float64)[:, documents] for dim in dims)
    x, y = (values + 0.01 * torch.randn(values.shape, generator=generator, dtype=torch.float64) for values in (x, y))
    assert (seen_nats(x, y, documents) < 0.05).sum() >= 18
    assert (seen_nats(x, y, np.arange(6000)) > 0.05).sum() >= 10


def test_heads_are_seen_alone():
    x, y = (torch.cat(pair) for pair in zip(*(scores(SEEN[name], 1000) for name in ("letter Z", "board of 4"))))
    both = seen_nats(x, y, np.arange(1000))
    alone = [seen_nats(x[[head]], y[[head]], np.arange(1000))[0] for head in range(2)]
    assert torch.allclose(both, torch.stack(alone))


def test_few_samples_show_nothing():
    x, y = scores(KNOWN_TASKS["1v1 normal 0.75"], 200)
    assert seen_nats(x, y, np.arange(200)).tolist() == [0]


def test_a_grid_holds_the_entropy_of_labels():
    label = torch.arange(4000)[None] % 4
    assert grid_nats(label, label, 4000).item() == pytest.approx(np.log(4), abs=0.02)
    assert grid_nats(label, torch.rand(1, 4000, generator=torch.Generator().manual_seed(0)), 4000).item() < 0.01


def test_negentropy_of_normal_uniform_and_double_exponential_columns():
    """Cells see less than all, above all of the tails."""
    generator = np.random.default_rng(0)
    count, half = 20_000, 3**0.5
    uniform = generator.uniform(-half, half, (1, count, 2))
    laplace = generator.laplace(0, 0.5**0.5, (1, count, 1))
    normal = generator.standard_normal((50, count, 3))
    of = [negentropy_nats(torch.tensor(values), count) for values in (uniform, laplace, normal)]
    truths = 2 * (np.log(2 * np.pi * np.e) / 2 - np.log(2 * half)), np.log(2 * np.pi * np.e) / 2 - 1 - np.log(2**0.5)
    for found, truth in zip(of, truths):
        assert 0.6 * truth < found.item() < truth
    assert of[2].std().item() == pytest.approx(negentropy_deviation_nats(count, 3), rel=0.4)
    assert abs(of[2].mean().item()) < 3 * negentropy_deviation_nats(count, 3) / 50**0.5
