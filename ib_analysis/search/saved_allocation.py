"""Allocations as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

from ib_analysis.cache.plan import MAX_LENGTH, HeadPlan, Plans
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.errors import CorruptFileError, ProfileMismatchError
from ib_analysis.files import expanded, number_from_json, read_sealed_json, sealed_json, write_whole
from ib_analysis.replay.measurement import Measurement

VERSION = 2
NUMBERS = ("loss_sum_bits", "in_sample_loss_bits", "solver_gap", "dual_bound")  # that may be NaN, null in JSON
RENAMED = {"price_sum_bits": "loss_sum_bits", "predicted_loss_bits": "in_sample_loss_bits"}  # since version 1
SPEC = ("shape", "recent", "pinned", "scorer", "bases")  # fields of all versions that make a CacheSpec

Made = TypeVar("Made")


def allocation_json(fields: Mapping[str, Any], path: str | Path | None) -> str:
    """The fields of an allocation as `read_allocation` reads them; see `Allocation.to_json`."""
    content = {
        **fields,
        "plans": [None if row is None else [asdict(plan) for plan in row] for row in fields["plans"]],
        "validation": None if fields["validation"] is None else asdict(fields["validation"]),
    }
    text = sealed_json(_finite({"schema": VERSION, **content.pop("spec").to_json(), **content}))
    if path is not None:
        write_whole(Path(path), lambda partial: partial.write_text(text, encoding="utf-8"))
    return text


def read_allocation(make: Callable[..., Made], source: str | Path) -> Made:
    """What `make` makes of the fields that a text or a file has; see `Allocation.from_json`."""
    text = source.lstrip("\ufeff \t\r\n") if isinstance(source, str) else None
    is_text = text is not None and text[:1] in ("", "{")
    name = "the allocation" if is_text else str(source)
    content = read_sealed_json(str(text) if is_text else _read_text(Path(source)), name)
    if content.pop("schema", None) not in (1, VERSION):
        raise ProfileMismatchError(f"{name} has another schema version than {VERSION}: optimise again")
    try:
        return make(**_fields(content))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ProfileMismatchError(f"{name} has other fields than an allocation ({error}): optimise again") from error


def _fields(content: dict[str, Any]) -> dict[str, Any]:
    content = {RENAMED.get(name, name): value for name, value in content.items()}
    spec = CacheSpec.from_json({name: content.pop(name) for name in SPEC if name in content})
    plans = tuple(None if row is None else tuple(map(HeadPlan.from_json, row)) for row in content["plans"])
    _check(spec, plans, content["context_length"], content["budget_share"])
    return {
        **content,
        **{name: number_from_json(content[name]) for name in NUMBERS},
        "spec": spec,
        "plans": plans,
        "validation": Measurement.from_json(content["validation"]),
        "budget_curve": tuple((share, number_from_json(loss)) for share, loss in content["budget_curve"]),
    }


def _check(spec: CacheSpec, plans: Plans, context_length: int, budget_share: float) -> None:
    """Raises ValueError for what no cache can be made of."""
    if len(plans) != len(spec.shape.layers):
        raise ValueError(f"there are plans for {len(plans)} layers of {len(spec.shape.layers)}")
    for number, (row, layer) in enumerate(zip(plans, spec.shape.layers)):
        if row is not None and (len(row) != layer.kv_heads or layer.sliding_window is not None):
            raise ValueError(f"layer {number} has plans for {len(row)} heads, which do not fit its {layer}")
    if not isinstance(context_length, int) or not 0 < context_length <= MAX_LENGTH:
        raise ValueError(f"context_length is {context_length!r}")
    if not 0 < budget_share <= 1:
        raise ValueError(f"budget_share is {budget_share!r}")


def _read_text(path: Path) -> str:
    path = expanded(path)
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder: pass the allocation.json in it")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{path} is no text, so no allocation ({error}): write it again") from error


def _finite(content: Any) -> Any:
    """JSON has no infinities or NaN: they become null."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not isfinite(content) else content
