"""The figure of formats plots its table."""

import numpy as np
import pandas as pd
from matplotlib.container import ErrorbarContainer

from ib_analysis.figures.formats import draw_formats

TABLE = pd.DataFrame(
    [
        ("keys", "kivi", 3.0, 0.1, 0.05, 0.2),
        ("keys", "kivi", 2.25, 0.4, 0.3, 0.5),
        ("keys", "spectral", 2.25, 0.02, 0.01, 0.03),
        ("values", "spectral", 4.25, 0.01, 0.005, 0.02),
    ],
    columns=["side", "format", "stored_bits", "kl_bits", "low_bits", "high_bits"],
)


def test_every_row_is_a_point_of_its_side():
    figure = draw_formats(TABLE)
    assert [axes.get_title() for axes in figure.axes] == [f"{side} stored, all else at 16 bits" for side in ("keys", "values")]
    found = {str(some.get_label()): some.lines[0] for some in figure.axes[0].containers if isinstance(some, ErrorbarContainer)}
    assert np.asarray(found["kivi"].get_xydata()).tolist() == [[2.25, 0.4], [3.0, 0.1]]
    assert np.asarray(found["spectral"].get_xydata()).tolist() == [[2.25, 0.02]]


def test_saved_with_its_table(tmp_path):
    draw_formats(TABLE, tmp_path / "formats")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "formats.csv"), TABLE)
    assert (tmp_path / "formats.png").stat().st_size > 1000
