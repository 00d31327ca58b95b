"""The program of `make demo`, with few prompts: what it writes is there, and true."""

import re
import warnings
from collections.abc import Iterator
from fractions import Fraction

import pandas as pd
import pytest

import ib_analysis as ib
from ib_analysis.cache.plan import HeadPlan, Tier
from ib_analysis.cache.spec import ByteLimit, CacheSpec
from ib_analysis.experiments.demo import SEED, run
from ib_analysis.experiments.report import SHARES, SHOWN_SHARE
from ib_analysis.policies import POLICIES, Cell
from ib_analysis.replay.examples import PROMPT_LENGTH, make_examples
from ib_analysis.replay.replays import Replays
from ib_analysis.search.profile import Profile
from ib_analysis.tasks.mixture import mixture

pytestmark = pytest.mark.slow

HELD_OUT = 6


def pyramid(spec: CacheSpec, limit: ByteLimit) -> Iterator[Cell]:
    """More tokens in the lower layers, at 4 bits."""
    for percent in range(100, 0, -1):
        first, last = percent / 100, percent / 300
        layers = spec.shape.layers
        shares = [first + (last - first) * i / (len(layers) - 1) for i in range(len(layers))]
        plans = tuple((HeadPlan("rotated", (Tier(share, 4, 4),)),) * layer.kv_heads for share, layer in zip(shares, layers))
        if limit.excess(plans) == 0:
            yield Cell(plans, "pyramid", f"{first:.0%} to {last:.0%} of tokens")
            return


def demo(out):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few prompts
        run(out, calibrating=6, held_out=HELD_OUT)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(POLICIES, "pyramid", pyramid)
        demo(folder)
    return folder


def rows(out):
    """(budget, policy) to the cells of a line of the report's first table."""
    lines = [line.strip("| ").split(" | ") for line in (out / "report.md").read_text().splitlines() if line.startswith("| 1/")]
    return {(float(Fraction(cells[0])), cells[1]): cells for cells in lines if len(cells) == 8}


def test_every_file_is_there(out):
    names = {path.name for path in out.iterdir()}
    figures = {f"{stem}.{suffix}" for stem in ("tradeoff", "allocation") for suffix in ("pdf", "png", "csv")}
    assert names == {"report.md", "allocation.json", "profile.safetensors", *figures}


def test_the_report_is_true(out, embedded):
    """Loss, bytes and ratio of a budget, measured anew."""
    model, tokenizer = embedded
    allocation = ib.Allocation.from_json(out / "allocation.json")
    prompts = mixture("held out", HELD_OUT, PROMPT_LENGTH)
    spec = Profile.load(out / "profile.safetensors").spec  # with bases of all heads, whether or not the allocation uses them
    replays = Replays(model, spec, make_examples(model, tokenizer, prompts, seed=SEED + 1))
    cells = [cell.plans for cell in POLICIES["uniform"](spec, allocation.limit)]
    losses = replays.measure([allocation.plans, *cells])[0].mean(0)
    found = rows(out)[SHOWN_SHARE, "optimal"]
    assert found[3] == f"{allocation.spec.nbytes(allocation.plans, allocation.context_length):,}"
    assert float(found[5].split()[0]) == pytest.approx(losses[0], abs=6e-5)
    assert float(found[6].split()[0]) == pytest.approx(losses[0] / losses[1:].min(), abs=6e-3)
    assert allocation.validation is not None and allocation.validation.prompts == HELD_OUT
    uniform, best = rows(out)[SHOWN_SHARE, "uniform"], cells[losses[1:].argmin()]
    assert uniform[3] == f"{allocation.spec.nbytes(best, allocation.context_length):,}"
    assert float(uniform[5].split()[0]) == pytest.approx(losses[1:].min(), abs=6e-5)
    assert uniform[6].startswith("1.00 [1.00, 1.00]")


def test_every_policy_has_its_row_in_its_own_words(out):
    found = rows(out)
    assert {policy for _, policy in found} == {"optimal", "uniform", "prune-only", "quantize-only", "pyramid"}
    for share in SHARES:
        assert re.fullmatch(r"\d+% to \d+% of tokens", found[share, "pyramid"][2])
        assert re.fullmatch(r"[\d.]+% of tokens at 16 bits", found[share, "prune-only"][2])


def test_every_policy_is_drawn(out):
    table = pd.read_csv(out / "tradeoff.csv")
    assert set(table.policy) == {policy for _, policy in rows(out)}
    assert (table.low_bits <= table.retained_bits).all() and (table.retained_bits <= table.high_bits).all()


def test_a_second_run_uses_the_calibration_and_gives_the_same_report(out, monkeypatch):
    monkeypatch.setitem(POLICIES, "pyramid", pyramid)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr("ib_analysis.search.calibration.gradient_losses", None)
    demo(out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
