"""Whether a storage format keeps what `Quantizer` promises: `check_format` is for whoever adds one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from ib_kernels.bitpack import PLANES
from ib_kernels.encoding import decode, encode
from ib_kernels.formats import FORMATS
from ib_kernels.formats.format import RAW_BITS, Format, Quantizer, Side, SideName, layout, row_count
from ib_kernels.nbytes import tokens_nbytes
from ib_kernels.packed_tokens import PackedTokens
from torch import Tensor

SIDES: tuple[SideName, SideName] = ("keys", "values")
HEAD_DIMS = (8, 20, 64)
LENGTHS = (33, 0, 1, 7)
MAX_RELATIVE_ERROR = {2: 0.5, 3: 0.2, 4: 0.05, 8: 2e-3}  # mean squared error over variance


def check_format(fmt: Format) -> None:
    """Raise AssertionError, and say why, unless `fmt` can store the tokens of a cache.

    Names and shapes of metadata, codes, errors, independence of runs, exact bytes, appending, selecting and raw storage are
    checked on small random runs, some of them empty, in plain torch. The format need not be in FORMATS.

        >>> from ib_kernels import FORMATS
        >>> check_format(FORMATS["rotated"])
    """
    with _registered(fmt):
        for head_dim in HEAD_DIMS:
            for side in SIDES:
                _check_quantizer(getattr(fmt, side), f"{side} of {fmt.name} with head_dim {head_dim}", head_dim)
            if _group_tokens(fmt, head_dim) > 1:
                for side in SIDES:
                    _check_requantizing(getattr(fmt, side), f"{side} of {fmt.name} with head_dim {head_dim}", head_dim)
            for bits in (*PLANES, RAW_BITS):
                _check_storage(fmt, head_dim, bits)


def random_rows(lengths: tuple[int, ...], head_dim: int, seed: int = 0) -> Tensor:
    """Rows [N, D] with offsets that differ by channel."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), head_dim, generator=generator) + 3 * torch.randn(head_dim, generator=generator)


def _check_quantizer(quantizer: Quantizer, what: str, head_dim: int) -> None:
    x, lengths = random_rows(LENGTHS, head_dim), torch.tensor(LENGTHS)
    shapes = layout(quantizer, 4, head_dim)
    assert "words" not in quantizer.metadata(head_dim), f"{what}: 'words' is the name of the packed codes"
    once = {name: rows.width for name, rows in shapes.items() if rows.tokens_per_row == 0}
    fitted = quantizer.fit(x, lengths)
    assert fitted.keys() == once.keys(), f"{what}: fit gives {list(fitted)}, but metadata of one row a run is {list(once)}"
    errors = []
    for bits in PLANES:
        codes, metadata = encode(quantizer, x, lengths, bits)
        assert codes.dtype == torch.uint8, f"{what}: codes of {bits} bits are {codes.dtype}, not uint8"
        assert codes.shape == x.shape, f"{what}: codes are {list(codes.shape)}, not {list(x.shape)}"
        assert int(codes.max()) < 2**bits, f"{what}: a code of {bits} bits is {int(codes.max())}"
        _check_metadata(metadata, quantizer, what, bits, head_dim)
        for name, tensor in fitted.items():
            assert torch.equal(metadata[name], tensor), f"{what}: {name} is not what was fitted"
        decoded = decode(quantizer, codes, metadata, lengths, bits)
        assert decoded.dtype == torch.float32 and bool(decoded.isfinite().all()), f"{what}: {bits} bits are no finite fp32"
        errors.append(float((decoded - x).square().mean() / x.var()))
        assert errors[-1] <= MAX_RELATIVE_ERROR[bits], f"{what}: the error of {bits} bits is {errors[-1]:.2g} of the variance"
        _check_runs_apart(quantizer, x, decoded, what, bits)
    assert errors == sorted(errors, reverse=True), f"{what}: errors {errors} do not fall with the bits {list(PLANES)}"


def _check_metadata(metadata: Side, quantizer: Quantizer, what: str, bits: int, head_dim: int) -> None:
    shapes = quantizer.metadata(head_dim)
    assert metadata.keys() == shapes.keys(), f"{what}: metadata is {list(metadata)}, but {list(shapes)} was said"
    for name, rows in shapes.items():
        expected = [sum(row_count(rows.tokens_per_row, n) for n in LENGTHS), rows.width]
        found = metadata[name]
        assert list(found.shape) == expected, f"{what}: {name} of {bits} bits is {list(found.shape)}, not {expected}"
        assert found.dtype == rows.dtype, f"{what}: {name} is {found.dtype}, not {rows.dtype}"


def _check_runs_apart(quantizer: Quantizer, x: Tensor, decoded: Tensor, what: str, bits: int) -> None:
    for run, expected in zip(x.split(LENGTHS), decoded.split(LENGTHS)):
        alone = torch.tensor([len(run)])
        found = decode(quantizer, *encode(quantizer, run, alone, bits), alone, bits)
        assert torch.equal(found, expected), f"{what}: a run of {len(run)} tokens is not the same alone at {bits} bits"


def _check_requantizing(quantizer: Quantizer, what: str, head_dim: int) -> None:
    """A group of tokens is completed by quantizing its decoded tokens again, together with new ones."""
    x, lengths = random_rows(LENGTHS, head_dim), torch.tensor(LENGTHS)
    for bits in PLANES:
        codes, metadata = encode(quantizer, x, lengths, bits)
        fitted = {name: metadata[name] for name in quantizer.fit(x, lengths)}
        decoded = decode(quantizer, codes, metadata, lengths, bits)
        again, metadata_again = encode(quantizer, decoded, lengths, bits, fitted=fitted)
        same = torch.equal(again, codes) and all(torch.equal(metadata_again[name], metadata[name]) for name in metadata)
        assert same, f"{what}: quantizing decoded tokens again gives other codes or metadata at {bits} bits"


def _check_storage(fmt: Format, head_dim: int, bits: int) -> None:
    what = f"{fmt.name} with head_dim {head_dim} at {bits} bits"
    x, lengths = random_rows(LENGTHS, head_dim), torch.tensor(LENGTHS)
    packed = PackedTokens.pack(fmt.name, x, -x, lengths, bits, bits)
    expected = sum(tokens_nbytes(fmt.name, n, head_dim, bits, bits) for n in LENGTHS)
    assert packed.nbytes == expected, f"{what}: {packed.nbytes} bytes are held, but {expected} are said"
    if bits == RAW_BITS:
        assert torch.equal(packed.unpack()[0], x.half().float()), f"{what}: 16 bits are not raw storage"
    runs = torch.tensor([2, 0, 1])
    selected = torch.cat([x.split(LENGTHS)[run] for run in runs])
    _check_same(
        packed.select(runs), PackedTokens.pack(fmt.name, selected, -selected, lengths[runs], bits, bits), f"{what}, selected"
    )
    _check_same(packed.to("cpu"), packed, f"{what}, moved")
    _check_appending(fmt, packed, head_dim, bits, what)


def _check_appending(fmt: Format, packed: PackedTokens, head_dim: int, bits: int, what: str) -> None:
    """Append other tokens to packed ones, at once and one by one: bytes, and what must not change."""
    counts = (5, 3, 0, 2)
    x = 40 + random_rows(counts, head_dim, seed=1)
    before, all_runs = packed.unpack(), torch.arange(len(LENGTHS))
    at_once, one_by_one = packed.select(all_runs), packed.select(all_runs)
    at_once.append(x, -x, torch.tensor(counts))
    begins = torch.tensor(counts).cumsum(0) - torch.tensor(counts)
    for i in range(max(counts)):
        some = [n > i for n in counts]
        rows = (begins + i)[torch.tensor(some)]
        one_by_one.append(x[rows], -x[rows], torch.tensor(some).int())
    totals = [held + new for held, new in zip(LENGTHS, counts)]
    expected = sum(tokens_nbytes(fmt.name, n, head_dim, bits, bits) for n in totals)
    found = at_once.nbytes, one_by_one.nbytes
    assert found == (expected, expected), f"{what}: appended at once and one by one tokens take {found} bytes, not {expected}"
    first = PackedTokens.pack(fmt.name, x, -x, torch.tensor(counts), bits, bits).tensors()
    for side in SIDES:
        for name, rows_of in layout(getattr(fmt, side), bits, head_dim).items():
            if rows_of.tokens_per_row == 0:
                key = f"{side}.{name}"
                held = torch.tensor(LENGTHS)[:, None] > 0
                kept = torch.where(held, packed.tensors()[key], first[key])
                assert torch.equal(at_once.tensors()[key], kept), f"{what}: appending changes {name} of {side}, which was fitted"
    group = _group_tokens(fmt, head_dim)
    for old, new in zip(before, at_once.unpack()):
        for a, b in zip(old.split(LENGTHS), new.split(totals)):
            whole = len(a) - len(a) % group
            assert torch.equal(a[:whole], b[:whole]), f"{what}: appending changes tokens that were packed"


def _check_same(a: PackedTokens, b: PackedTokens, what: str) -> None:
    for name, tensor in b.tensors().items():
        assert torch.equal(a.tensors()[name], tensor), f"{what}: {name} differs"


def _group_tokens(fmt: Format, head_dim: int) -> int:
    """Tokens of a run that are quantized together."""
    return max(1, *(rows.tokens_per_row for side in SIDES for rows in layout(getattr(fmt, side), 4, head_dim).values()))


@contextmanager
def _registered(fmt: Format) -> Iterator[None]:
    """`fmt` is in FORMATS, for a while if it was not."""
    known = fmt.name in FORMATS
    assert FORMATS.setdefault(fmt.name, fmt) is fmt, f"there is another format called {fmt.name!r}: choose another name"
    try:
        yield
    finally:
        if not known:
            del FORMATS[fmt.name]
