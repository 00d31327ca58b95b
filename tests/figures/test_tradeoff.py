"""The trade-off figure plots its table, and is written with it."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.container import ErrorbarContainer

from ib_analysis.figures.style import save_figure
from ib_analysis.figures.tradeoff import draw_tradeoff

TABLE = pd.DataFrame(
    [
        ("optimal", 0.25, 512.0, 1.9, 1.8, 1.95, 2.0),
        ("optimal", 0.125, 256.0, 1.7, 1.5, 1.8, 2.0),
        ("uniform", 0.25, 512.0, 1.5, 1.2, 1.6, 2.0),
        ("prune-only", 0.25, 512.0, -0.5, -0.8, -0.2, 2.0),
    ],
    columns=["policy", "share", "bits_per_token", "retained_bits", "low_bits", "high_bits", "information_bits"],
)


def test_every_row_is_a_point():
    axes = draw_tradeoff(TABLE).axes[0]
    lines = {str(found.get_label()): found.lines[0] for found in axes.containers if isinstance(found, ErrorbarContainer)}
    assert np.asarray(lines["optimal"].get_xydata()).tolist() == [[256.0, 1.7], [512.0, 1.9]]
    assert np.asarray(lines["prune-only"].get_xydata()).tolist() == [[512.0, -0.5]]
    assert "quantize-only" not in lines


def test_a_policy_that_nobody_knew_is_drawn_and_looks_like_no_other():
    table = pd.concat([TABLE, TABLE[TABLE.policy == "uniform"].assign(policy="pyramid", retained_bits=1.6)])
    axes = draw_tradeoff(table).axes[0]
    found = {str(some.get_label()): some.lines[0] for some in axes.containers if isinstance(some, ErrorbarContainer)}
    assert set(found) == {"optimal", "uniform", "prune-only", "pyramid"}
    assert np.asarray(found["pyramid"].get_xydata()).tolist() == [[512.0, 1.6]]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in found.values()}
    assert len(looks) == 4
    legend = axes.get_legend()
    assert legend is not None and "pyramid" in [text.get_text() for text in legend.get_texts()]


@pytest.mark.slow
def test_saved_twice_the_same_bytes_and_the_table(tmp_path):
    contents = []
    for _ in range(2):
        save_figure(draw_tradeoff(TABLE), TABLE, tmp_path / "figure")
        contents.append([(tmp_path / f"figure.{kind}").read_bytes() for kind in ("pdf", "png", "csv")])
    assert contents[0] == contents[1]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "figure.csv"), TABLE)


@pytest.mark.parametrize(("given", "stem"), [("budget_0.125", "budget_0.125"), ("budget.png", "budget")])
def test_names_with_dots(tmp_path, given, stem):
    save_figure(draw_tradeoff(TABLE), TABLE, tmp_path / given)
    assert {path.name for path in tmp_path.iterdir()} == {f"{stem}.pdf", f"{stem}.png", f"{stem}.csv"}
