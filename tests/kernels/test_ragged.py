import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ib_kernels import pad
from ib_kernels.ragged import check_pairs, place, places, rows_from, starts

run_lengths = st.lists(st.integers(0, 7), max_size=6)


def rows_of(lengths: list[int], offset: int = 0) -> torch.Tensor:
    return (torch.arange(sum(lengths) * 3) + offset).reshape(-1, 3)


def vector(lengths: list[int]) -> torch.Tensor:
    return torch.tensor(lengths, dtype=torch.int32)


@given(run_lengths)
@settings(deadline=None)
def test_pad_masks_exactly_the_padding(lengths):
    flat = rows_of(lengths, offset=1)
    padded, mask = pad(flat, vector(lengths))
    assert padded.shape == (len(lengths), max(lengths, default=0), 3)
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == lengths
    assert torch.equal(padded[mask], flat)
    assert not padded[~mask].any()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=6))
@settings(deadline=None)
def test_places_append_run_by_run_and_rows_from_inverts_it(lengths):
    a_lengths, b_lengths = [a for a, _ in lengths], [b for _, b in lengths]
    a, b = rows_of(a_lengths), rows_of(b_lengths, offset=1000)
    of_a, of_b = vector(a_lengths), vector(b_lengths)
    joined = place(a, b, places(of_a, sum(a_lengths), of_b, sum(b_lengths)))
    expected = [run for pair in zip(a.split(a_lengths), b.split(b_lengths)) for run in pair]
    assert torch.equal(joined, torch.cat([rows_of([]), *expected]))
    first = starts(of_a + of_b)
    assert torch.equal(joined[rows_from(first, of_a, sum(a_lengths))], a)
    assert torch.equal(joined[rows_from(first + of_a, of_b, sum(b_lengths))], b)


@given(run_lengths.filter(len), st.data())
@settings(deadline=None)
def test_rows_from_gathers_runs_in_order_with_repeats(lengths, data):
    pairs = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=8))
    flat = rows_of(lengths)
    chosen, counts = torch.tensor(pairs, dtype=torch.int64), vector(lengths)
    rows = rows_from(starts(counts)[chosen], counts[chosen], sum(lengths[pair] for pair in pairs))
    runs = flat.split(lengths)
    assert torch.equal(flat[rows], torch.cat([rows_of([]), *(runs[pair] for pair in pairs)]))


def test_rows_may_have_any_shape():
    lengths = vector([2, 0, 1])
    flat = torch.randn(3, 4, 5)
    padded, _ = pad(flat, lengths)
    assert padded.shape == (3, 2, 4, 5)
    scalars, _ = pad(flat[:, 0, 0], lengths)
    assert scalars.shape == (3, 2)


def test_all_runs_empty():
    lengths = vector([0, 0])
    padded, mask = pad(torch.zeros(0, 4), lengths)
    assert padded.shape == (2, 0, 4)
    assert mask.shape == (2, 0)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.tensor([1, 1]), "sum to 2, but there are 3 rows"),
        (torch.tensor([4, -1]), "negative"),
        (torch.tensor([1.0, 2.0]), "integer vector"),
        (torch.tensor([[1, 2]]), "integer vector"),
    ],
)
def test_lengths_that_do_not_fit(lengths, message):
    with pytest.raises(ValueError, match=message):
        pad(torch.zeros(3, 2), lengths)


@pytest.mark.parametrize("pairs", [torch.tensor([2]), torch.tensor([-1]), torch.tensor([True, False])])
def test_pairs_name_runs(pairs):
    with pytest.raises(ValueError, match="pairs must"):
        check_pairs(pairs, 2)
