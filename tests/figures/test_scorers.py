"""The figure of scorers plots its table."""

import numpy as np
import pandas as pd
from matplotlib.container import ErrorbarContainer

from ib_analysis.figures.scorers import draw_scorers

TABLE = pd.DataFrame(
    [
        ("prune-only", "value_aware", 512.0, 0.1, 0.05, 0.2),
        ("prune-only", "value_aware", 256.0, 0.4, 0.3, 0.5),
        ("prune-only", "learned", 512.0, 0.02, 0.01, 0.03),
        ("uniform", "learned", 512.0, 0.01, 0.005, 0.02),
    ],
    columns=["policy", "scorer", "bits_per_token", "kl_bits", "low_bits", "high_bits"],
)


def test_every_row_is_a_point_of_its_policy():
    figure = draw_scorers(TABLE)
    assert [axes.get_title() for axes in figure.axes] == ["prune-only", "uniform"]
    found = {str(some.get_label()): some.lines[0] for some in figure.axes[0].containers if isinstance(some, ErrorbarContainer)}
    assert np.asarray(found["value_aware"].get_xydata()).tolist() == [[256.0, 0.4], [512.0, 0.1]]
    assert np.asarray(found["learned"].get_xydata()).tolist() == [[512.0, 0.02]]


def test_saved_with_its_table(tmp_path):
    draw_scorers(TABLE, tmp_path / "scorers")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "scorers.csv"), TABLE)
    assert (tmp_path / "scorers.png").stat().st_size > 1000
