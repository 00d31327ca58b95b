"""The plane's figures plot their tables."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.container import ErrorbarContainer

from ib_analysis.errors import CalibrationError
from ib_analysis.figures.plane import draw_local_plane, draw_plane

COLUMNS = [
    "family",
    "budget_share",
    "stored_bits",
    "code_rate_bits",
    "retained_bits",
    "low_bits",
    "high_bits",
    "information_bits",
]
POINTS = pd.DataFrame(
    [
        ("optimal", 0.25, 4000.0, 2500.0, 1.9, 1.8, 1.95, 2.0),
        ("optimal", 0.125, 2000.0, 1200.0, 1.7, 1.5, 1.8, 2.0),
        ("quantized pruning", 0.25, 4000.0, 2400.0, 1.5, 1.2, 1.6, 2.0),
        ("quantized pruning", 0.25, 3900.0, 2300.0, -9.0, -9.5, -8.0, 2.0),
        ("null point", 0.0, 200.0, 0.0, 0.0, 0.0, 0.0, 2.0),
        ("full point", 1.0, 16000.0, 12000.0, 2.0, 1.8, 2.2, 2.0),
    ],
    columns=COLUMNS,
).assign(best=[True, True, True, False, True, True], ceiling_low_bits=1.8, ceiling_high_bits=2.2)
LOCAL = pd.DataFrame(
    [
        (0, 0, "keys", "bottleneck", None, np.nan, 0.0, 0.0),
        (0, 0, "keys", "bottleneck", None, np.nan, 9.0, 2.0),
        (0, 0, "keys", "dithered", "kivi", 2, 8.0, 1.5),
        (1, 0, "values", "bottleneck", None, np.nan, 0.0, 0.0),
        (1, 0, "values", "bottleneck", None, np.nan, 9.0, 3.0),
        (1, 0, "values", "dithered", "rotated", 4, 8.5, 2.5),
    ],
    columns=["layer", "head", "side", "kind", "format", "bits", "rate_bits", "relevance_bits"],
)


def test_best_cells_are_joined_on_both_panels():
    for axes, rates in zip(draw_plane(POINTS).axes, ([2000.0, 4000.0], [1200.0, 2500.0])):
        lines = {str(found.get_label()): found.lines[0] for found in axes.containers if isinstance(found, ErrorbarContainer)}
        assert np.asarray(lines["optimal"].get_xdata()).tolist() == rates
        assert np.asarray(lines["quantized pruning"].get_ydata()).tolist() == [1.5]
        assert "prune-only" not in lines
        assert -1 < axes.get_ylim()[0] < 0  # the cell at -9 is left to the table


def test_a_policy_that_nobody_knew_is_drawn():
    pyramid = POINTS[POINTS.best & (POINTS.family == "quantized pruning")].assign(family="pyramid", retained_bits=1.6)
    figure = draw_plane(pd.concat([POINTS, pyramid]))
    for axes, rate in zip(figure.axes, (4000.0, 2400.0)):
        lines = {str(found.get_label()): found.lines[0] for found in axes.containers if isinstance(found, ErrorbarContainer)}
        assert set(lines) == {"optimal", "quantized pruning", "pyramid"}
        assert np.asarray(lines["pyramid"].get_xydata()).tolist() == [[rate, 1.6]]
        assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines.values()}) == 3
    assert "pyramid" in [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.slow
def test_saved_twice_the_same_bytes_and_the_tables(tmp_path):
    for name, draw, table in (("plane", draw_plane, POINTS), ("local", draw_local_plane, LOCAL)):
        contents = []
        for _ in range(2):
            draw(table, tmp_path / name)
            contents.append([(tmp_path / f"{name}.{kind}").read_bytes() for kind in ("pdf", "png", "csv")])
        assert contents[0] == contents[1]
        assert pd.read_csv(tmp_path / f"{name}.csv").to_csv() == table.to_csv()


def test_time_sharing_joins_null_and_full():
    labelled = {str(line.get_label()): line for line in draw_plane(POINTS).axes[0].lines}
    line = np.asarray(labelled["random eviction (time sharing)"].get_xydata())
    assert line[0].tolist() == [200.0, 0.0]
    assert np.allclose(line[-1], [16000.0, 2.0])
    assert np.allclose(line[:, 1], (line[:, 0] - 200) / 15800 * 2)


def test_local_plane_shows_the_head_that_says_most():
    keys, values = draw_local_plane(LOCAL).axes
    assert values.get_title() == "layer 1, head 0: values"
    curve, kivi, rotated = values.lines
    assert np.asarray(curve.get_xydata()).tolist() == [[0.0, 0.0], [9.0, 3.0]]
    assert np.asarray(rotated.get_xydata()).tolist() == [[8.5, 2.5]]
    assert np.size(kivi.get_xdata()) == np.size(keys.lines[1].get_xdata()) == 0


def test_floors_lie_on_a_line_to_their_points():
    floor = LOCAL[LOCAL.format == "rotated"].assign(kind="floor", rate_bits=7.0, relevance_bits=2.25)
    keys, values = draw_local_plane(pd.concat([LOCAL, floor])).axes
    _, joined, floors, *_ = values.lines
    assert np.asarray(joined.get_xydata()).tolist() == [[7.0, 2.25], [8.5, 2.5]]
    assert np.asarray(floors.get_xydata()).tolist() == [[7.0, 2.25]]
    assert floors.get_label() == "fewest bits at the same error"
    assert len(keys.lines) == len(draw_local_plane(LOCAL).axes[0].lines)


def test_an_empty_local_plane_is_refused():
    with pytest.raises(CalibrationError, match="no local plane"):
        draw_local_plane(LOCAL[:0])
