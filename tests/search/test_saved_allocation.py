"""The file of an allocation: whole or refused, and readable in its first version, too."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from ib_analysis import Allocation
from ib_analysis.cache.attention import borrowed, cache_argument
from ib_analysis.cache.compressed import CompressedCache
from ib_analysis.cache.plan import HeadPlan, Recent, Tier
from ib_analysis.errors import CorruptFileError, ProfileMismatchError, UnknownNameError
from ib_analysis.files import sealed_json
from ib_analysis.replay.measurement import Measurement
from ib_analysis.scorers import SCORERS
from ib_analysis.scorers.snapkv import SnapKV
from ib_analysis.search.optimize import allocate, full_allocation
from ib_analysis.tasks import TASKS

pytestmark = pytest.mark.slow

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Newest:
    """A scorer of no registry."""

    power: float = 1.0

    def __call__(self, module, query, keys, values, valid, scaling):
        return (torch.arange(keys.shape[2]) ** self.power).float().expand(keys.shape[:3])


@pytest.fixture(scope="module")
def allocation(bench):
    return allocate(bench, 1 / 8)


@pytest.fixture
def full(small_llama):
    return full_allocation(small_llama, SCORERS["value_aware"])


def sealed(text, **changes):
    """The JSON text of an allocation with other fields, those that are "left out" away, and a checksum that fits them."""
    content = {**json.loads(text), **changes}
    return sealed_json({name: value for name, value in content.items() if name != "checksum" and value != "left out"})


def test_json_round_trip(allocation, tmp_path):
    path = tmp_path / "allocation.json"
    assert Allocation.from_json(allocation.to_json(path)) == allocation == Allocation.from_json(path)
    marked = "\ufeff" + allocation.to_json()  # as editors on Windows begin a text
    (tmp_path / "marked.json").write_text(marked, encoding="utf-8")
    assert Allocation.from_json(marked) == allocation == Allocation.from_json(tmp_path / "marked.json")
    assert json.loads(path.read_text())["schema"] == 2


def test_bases_travel_with_the_plans_that_need_them(bench, embedded):
    model, tokenizer = embedded
    spec = bench.profile.spec
    rows = [[HeadPlan("kivi", (Tier(1 / 8, 4, 4),))] * 2 for _ in spec.shape.layers]
    rows[1][0] = HeadPlan("spectral", (Tier(1 / 4, 2, 4),))
    plans = tuple(map(tuple, rows))
    made = replace(allocate(bench, 1 / 8), plans=plans, spec=spec.for_plans(plans))
    assert made.spec.bases is not None
    assert [layer is None for layer in made.spec.bases.layers] == [i != 1 for i in range(len(rows))]
    assert f"bases of keys take {2 * 2 * 64 * 64 * 4:,} bytes beside the model's weights" in str(made)
    again = Allocation.from_json(made.to_json())
    assert again == made
    ids = tokenizer(TASKS["text"](Random("bases"), 200).context, return_tensors="pt").input_ids
    logits = []
    with torch.no_grad(), borrowed(model):
        for allocation in (made, again, replace(made, spec=spec)):
            cache = CompressedCache(allocation.spec, allocation.plans)
            model(ids[:, :-8], **cache_argument(model, cache))
            logits.append(model(ids[:, -8:], **cache_argument(model, cache)).logits)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_truncated_and_edited_json(allocation, tmp_path):
    text = allocation.to_json()
    edited = text.replace('"key_bits": 4', '"key_bits": 8', 1)
    assert edited != text
    for broken in (text[: len(text) // 2], edited, text.replace('"schema": 2', '"schema": 1')):
        assert broken != text
        with pytest.raises(CorruptFileError):
            Allocation.from_json(broken)
        path = tmp_path / "broken.json"
        path.write_text(broken)
        with pytest.raises(CorruptFileError, match=r"broken\.json"):
            Allocation.from_json(path)


def test_what_is_no_allocation(tmp_path):
    for empty in ("", "  \n"):
        with pytest.raises(CorruptFileError, match="the allocation is no complete JSON"):
            Allocation.from_json(empty)
    with pytest.raises(FileNotFoundError, match="is a folder"):
        Allocation.from_json(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        Allocation.from_json(tmp_path / "none.json")
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe{}")
    with pytest.raises(CorruptFileError, match=r"binary\.json is no text"):
        Allocation.from_json(binary)


def test_json_with_other_fields(full):
    text = full.to_json()
    assert Allocation.from_json(sealed(text)) == full
    others: list[dict[str, Any]] = [
        {"more": 1},
        {"dual_bound": "left out"},
        {"recent": {"sinks": 1}},
        {"recent": "left out"},
        {"plans": 3},
        {"shape": "left out"},
        {"scorer": "left out"},
        {"scorer": {"name": "snapkv", "no such field": 1}},
        {"scorer": "no such scorer"},
        {"recent": {"sinks": 1, "window": 10**12, "flush": 1}},
        {"recent": {"sinks": 1, "window": 4, "flush": 0}},
        {"context_length": 10**12},
        {"context_length": 0},
        {"budget_share": 0.0},
        {"budget_share": 7},
        {"plans": []},
        {"plans": json.loads(text)["plans"][:-1]},
    ]
    for changes in others:
        with pytest.raises(ProfileMismatchError, match="other fields"):
            Allocation.from_json(sealed(text, **changes))


@pytest.mark.parametrize(
    "tiers",
    [
        [{"token_share": 0.5, "key_bits": 1, "value_bits": 4}],
        [{"token_share": 0.5, "key_bits": 4, "value_bits": 5}],
        [{"token_share": -0.5, "key_bits": 4, "value_bits": 4}],
        [{"token_share": 1.5, "key_bits": 4, "value_bits": 4}],
        [{"token_share": 0.7, "key_bits": 4, "value_bits": 4}] * 2,
        [{"token_share": "half", "key_bits": 4, "value_bits": 4}],
    ],
)
def test_json_with_tiers_that_cannot_be_stored(tiers, allocation):
    plans = json.loads(allocation.to_json())["plans"]
    layer = next(i for i, row in enumerate(plans) if row)
    for head in ({"format": "kivi", "tiers": tiers}, {"format": "no such format", "tiers": []}):
        changed = [[head, *row[1:]] if i == layer else row for i, row in enumerate(plans)]
        with pytest.raises(ProfileMismatchError, match="other fields"):
            Allocation.from_json(sealed(allocation.to_json(), plans=changed))
    fewer = [row[1:] if i == layer else row for i, row in enumerate(plans)]
    with pytest.raises(ProfileMismatchError, match=f"layer {layer} has plans for"):
        Allocation.from_json(sealed(allocation.to_json(), plans=fewer))


def test_nan_in_json(full):
    measured = Measurement(1, 0.5, (math.nan, math.nan), 2.0, None, None)
    found = Allocation.from_json(replace(full, in_sample_loss_bits=math.nan, dual_bound=-math.inf, validation=measured).to_json())
    assert math.isnan(found.in_sample_loss_bits) and math.isnan(found.dual_bound)
    assert found.validation is not None and np.isnan(found.validation.loss_interval_bits).all()
    assert found.validation.accuracy is None
    assert math.isnan(found.held_out_ratio) and "loses 0.5000" in str(found)


def test_version_1(profile_v1):
    """Made by the version before: the plans are those of its profile."""
    found = Allocation.from_json(DATA / "allocation_v1.json")
    assert json.loads((DATA / "allocation_v1.json").read_text())["schema"] == 1
    assert found.spec == profile_v1.spec and found.spec.recent == Recent(1, 5, 1) and found.spec.scorer is SCORERS["value_aware"]
    assert found.plans[0] == (HeadPlan("kivi", (Tier(0.5, 4, 3),)), HeadPlan("kivi", (Tier(0.75, 4, 3),)))
    assert (found.source, found.objective, found.budget_share, found.context_length) == ("optimal", "usable", 0.25, 111)
    measured_bits = np.where(np.isnan(profile_v1.loss_bits), np.inf, profile_v1.loss_bits)
    solution = profile_v1.solve(profile_v1.limit(found.budget_share), measured_bits)
    assert found.plans == profile_v1.plans(solution.choice)
    assert found.loss_sum_bits == solution.loss == 2.0897368102877456
    assert found.in_sample_loss_bits == 1.6526157498613427
    assert found.validation is not None and found.validation.prompts == 2
    assert found.minimum_context <= found.context_length and len(found.curve()) == 35
    assert Allocation.from_json(found.to_json()) == found


def test_version_1_sealed_again_is_read_by_its_own_names_only():
    text = (DATA / "allocation_v1.json").read_text()
    assert Allocation.from_json(sealed(text)) == Allocation.from_json(text)
    for changes in ({"pinned": "left out"}, {"price_sum_bits": "left out"}, {"plans": [[{"format": "kivi"}]]}):
        with pytest.raises(ProfileMismatchError, match="other fields"):
            Allocation.from_json(sealed(text, **changes))


@pytest.mark.parametrize("schema", [0, 3, "2", None])
def test_another_version_is_refused(schema, full):
    with pytest.raises(ProfileMismatchError, match="the allocation has another schema version than 2: optimise again"):
        Allocation.from_json(sealed(full.to_json(), schema=schema))


def test_a_scorer_with_other_parameters_is_saved_with_them(full):
    found = replace(full, spec=replace(full.spec, scorer=SnapKV(window=16)))
    assert json.loads(found.to_json())["scorer"] == {"name": "snapkv", "window": 16, "kernel": 5}
    assert Allocation.from_json(found.to_json()) == found


def test_a_scorer_without_a_name_cannot_be_saved(full, monkeypatch, tmp_path):
    found = replace(full, spec=replace(full.spec, scorer=Newest(power=2.0)))
    with pytest.raises(UnknownNameError, match=r"Newest\(power=2\.0\) has no name .* SCORERS"):
        found.to_json(tmp_path / "allocation.json")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(SCORERS, "newest", Newest())
    assert Allocation.from_json(found.to_json()) == found
