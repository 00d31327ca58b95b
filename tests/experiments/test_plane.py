"""The information plane: its ends, its families, its rates, and the time-sharing line between its ends."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import ib_analysis as ib
from ib_analysis.errors import CalibrationError
from ib_analysis.experiments.plane import measure_points, time_sharing
from ib_analysis.policies import POLICIES
from ib_analysis.replay.measurement import measure_plans
from ib_analysis.search.optimize import allocate_all
from ib_analysis.tasks.mixture import mixture

pytestmark = pytest.mark.slow

SHARES = (1 / 4, 1 / 8)


@pytest.fixture(scope="module")
def allocations(bench):
    return allocate_all(bench, SHARES)


@pytest.fixture(scope="module")
def points(bench, allocations):
    return measure_points(bench.validation, allocations)


def end(points, family):
    found = points[points.family == family]
    assert len(found) == 1
    return found.iloc[0]


def test_ends(points):
    null, full = end(points, "null point"), end(points, "full point")
    assert null.retained_bits == 0 and null.code_rate_bits == 0 and null.time_sharing_bits == 0
    assert full.retained_bits == pytest.approx(full.information_bits, abs=1e-6)
    assert full.time_sharing_bits == pytest.approx(full.information_bits)
    assert full.stored_bits == 16384  # 4 layers, 2 heads, 64 channels, keys and values, 16 bits
    assert null.stored_bits < points[points.family == "optimal"].stored_bits.min()


def test_families_are_the_policies(bench, points):
    profile = bench.profile
    for share in SHARES:
        at = points[points.budget_share == share]
        found = {name: (at.family == name).sum() for name in ("optimal", "prune-only", "quantize-only", "quantized pruning")}
        names = ("uniform", "prune-only", "quantize-only")
        uniform, pruned, quantized = (len(list(POLICIES[name](profile.spec, profile.limit(share)))) for name in names)
        assert found["optimal"] == 1
        assert (found["prune-only"], found["quantize-only"]) == (pruned, quantized)
        assert sum(found.values()) == 1 + uniform


def test_points_are_what_is_measured_and_stored(bench, allocations, points):
    for allocation, measured in zip(allocations, measure_plans(bench.validation, [a.plans for a in allocations])):
        point = points[(points.family == "optimal") & (points.budget_share == allocation.budget_share)].iloc[0]
        assert point.retained_bits == pytest.approx(measured.retained_bits)
        assert point.information_bits == pytest.approx(measured.information_bits)
        lengths = np.array([replay.length for replay in bench.validation])
        nbytes = allocation.spec.nbytes(allocation.plans, lengths)
        assert point.stored_bits == pytest.approx(8 * nbytes.sum() / lengths.sum())


def test_laws(points):
    assert (points.retained_bits <= points.information_bits + 1e-9).all()  # KL >= 0
    assert ((points.low_bits <= points.retained_bits) & (points.retained_bits <= points.high_bits)).all()
    assert (points.tight_code_rate_bits <= points.code_rate_bits + 1e-9).all()
    packed = points[~points.family.isin(["null point", "full point"])]
    full = end(points, "full point")
    assert (packed.code_rate_bits < full.code_rate_bits).all() and (packed.stored_bits < full.stored_bits).all()
    best = packed[packed.best]
    assert not best.duplicated(["family", "budget_share"]).any()
    for _, group in packed.groupby(["family", "budget_share"]):
        assert group.retained_bits[group.best].item() == group.retained_bits.max()


def test_random_eviction_is_the_straight_line(points):
    """A coin's rate and information are means of those of the two ends."""
    (null_rate, nothing), (full_rate, everything) = time_sharing(points, "stored_bits")
    ordered = points.sort_values("stored_bits")
    for p in (0.0, 0.3, 1.0):
        rate = p * full_rate + (1 - p) * null_rate
        expected = p * everything + (1 - p) * nothing
        assert np.interp(rate, ordered.stored_bits, ordered.time_sharing_bits) == pytest.approx(expected, abs=1e-6)


def test_a_whole_plane_from_few_prompts(embedded, tmp_path):
    model, tokenizer = embedded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few prompts
        plane = ib.information_plane(model, prompts=mixture("plane", 20, 128), tokenizer=tokenizer, shares=(1 / 4,))
    assert {"optimal", "quantized pruning", "prune-only", "null point", "full point"} <= set(plane.points.family)
    assert plane.allocations[0].budget_share == 1 / 4
    plane.plot(tmp_path / "plane")
    plane.plot_local(tmp_path / "local")
    assert {path.name for path in tmp_path.iterdir()} == {f"{n}.{k}" for n in ("plane", "local") for k in ("pdf", "png", "csv")}
    assert "optimal" in str(plane) and "above the Gaussian bottleneck" in str(plane)
    assert pd.read_csv(tmp_path / "plane.csv").family.tolist() == plane.points.family.tolist()  # no name that reads as absent


def test_too_few_tokens_for_a_local_plane_leave_the_points():
    size = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 100}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **size)).eval()
    with pytest.warns(UserWarning, match=r"Plane.local is empty: .* more than 96 compressible tokens"):
        plane = ib.information_plane(model, prompts=list(torch.randint(3, 99, (4, 80))), shares=(1 / 2,))
    assert "optimal" in set(plane.points.family)
    assert plane.local.empty
    with pytest.raises(CalibrationError, match="no local plane"):
        plane.plot_local()
