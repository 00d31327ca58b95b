"""The table of every estimator on every task."""

from dataclasses import replace
from itertools import product

import pandas as pd
import pytest

from ib_analysis.errors import EstimatorError
from ib_analysis.estimators import ESTIMATORS, CodeEntropy, Gaussian
from ib_analysis.estimators.comparison import MAX_ERROR_BITS, compare, comparison_text, trust
from ib_analysis.estimators.known_information import KNOWN_TASKS, normal, quantized_gaussian


def test_rows_say_how_each_method_did():
    tasks = [normal(), quantized_gaussian(2, bits=2, step=1.0)]
    table = compare(500, [Gaussian(), CodeEntropy()], tasks)
    assert table[["task", "estimator"]].to_numpy().tolist() == [[t.name, m] for t in tasks for m in ("gaussian", "code_entropy")]
    assert (table["truth_bits"] == [task.information_bits for task in tasks for _ in range(2)]).all()
    done = table[table["refused"] == ""]
    assert len(done) == 3
    assert (done["error_bits"] == done["bits"] - done["truth_bits"]).all()
    assert (done["covers"] == ((done["low_bits"] <= done["truth_bits"]) & (done["truth_bits"] <= done["high_bits"]))).all()
    assert (done["seconds"] > 0).all()
    refused = table[table["refused"] != ""]
    assert refused["estimator"].tolist() == ["code_entropy"]
    assert refused["bits"].isna().all()
    assert table.loc[3, "error_bits"] == pytest.approx(0, abs=0.1)


def test_every_estimator_meets_every_task_by_default(monkeypatch):
    """Also those that were registered after the import."""

    class Declines:
        name = "declines"

        def estimate(self, x, y, documents=None):
            raise EstimatorError("nothing to say")

    for name, method in ESTIMATORS.items():
        monkeypatch.setitem(ESTIMATORS, name, type("Declines", (Declines,), {"name": method.name})())
    monkeypatch.setitem(ESTIMATORS, "declines", Declines())
    monkeypatch.setitem(KNOWN_TASKS, "late", replace(normal(), name="late"))
    table = compare(2)
    assert list(zip(table.task, table.estimator)) == list(product(KNOWN_TASKS, ESTIMATORS))
    assert set(table.refused) == {"nothing to say"}


def test_text_says_all_that_the_table_says():
    table = compare(500, [Gaussian(), CodeEntropy()], [normal(), quantized_gaussian(2, bits=2, step=1.0)])
    blocks = comparison_text(table).split("\n\n")
    assert len(blocks) == 2
    title, header, gaussian, refused = blocks[0].splitlines()
    assert title == f"1v1 normal 0.75: {normal().information_bits:.3f} bits"
    assert header.split() == ["estimator", "estimate", "error", "95%", "interval", "covers", "seconds", "flags"]
    first = table.iloc[0]
    assert gaussian.split()[:3] == ["gaussian", f"{first.bits:.3f}", f"{first.error_bits:+.3f}"]
    assert f"[{first.low_bits:.3f}, {first.high_bits:.3f}]" in gaussian
    assert "refused: y takes as many values" in refused


def test_trust_counts_what_is_right_and_what_is_flagged():
    off = 1.1 * MAX_ERROR_BITS
    rows = [("a", 0.0, ""), ("a", off, ""), ("a", -off, ""), ("a", 0.01, "saturated"), ("b", -off, "saturated")]
    table = pd.DataFrame([{"estimator": name, "error_bits": error, "flags": flags, "refused": ""} for name, error, flags in rows])
    table.loc[len(table)] = {"estimator": "b", "refused": "no codes"}
    assert trust(table).to_dict("records") == [
        {"estimator": "a", "estimates": 4, "right": 2, "right_flagged": 1, "wrong_unflagged": 2},
        {"estimator": "b", "estimates": 1, "right": 0, "right_flagged": 0, "wrong_unflagged": 0},
        {"estimator": "all", "estimates": 5, "right": 2, "right_flagged": 1, "wrong_unflagged": 2},
    ]
