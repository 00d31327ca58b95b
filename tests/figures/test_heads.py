"""What the heatmaps show is what the heads were given."""

import math

import pandas as pd
import pytest

from ib_analysis.figures.heads import draw_heads, head_table

TIERS = pd.DataFrame(
    [
        (0, 0, 0, "kivi", 0.25, 8, 4, 100),
        (0, 0, 1, "kivi", 0.75, 2, 2, 100),
        (0, 1, 0, "evicted", 0.0, 0, 0, 0),
        (2, 0, 0, "rotated", 0.5, 4, 3, 50),
        (2, 1, 0, "kivi", 1.0, 16, 16, 400),
    ],
    columns=["layer", "head", "tier", "format", "token_share", "key_bits", "value_bits", "head_bytes"],
)


def test_tiers_are_averaged_over_the_tokens_that_they_keep():
    heads = head_table(TIERS)
    assert heads[["layer", "head"]].to_numpy().tolist() == [[0, 0], [0, 1], [2, 0], [2, 1]]
    assert heads.token_share.tolist() == [1.0, 0.0, 0.5, 1.0]
    assert heads.key_bits[0] == pytest.approx(0.25 * 8 + 0.75 * 2)
    assert heads.value_bits[0] == pytest.approx(0.25 * 4 + 0.75 * 2)
    assert math.isnan(heads.key_bits[1])


def test_three_panels_with_every_head():
    figure = draw_heads(TIERS)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["tokens kept (share)", "key bits", "value bits"]
    cells = figure.axes[0].collections[0].get_array()
    assert cells is not None
    assert cells.reshape(2, 2).tolist() == [[1.0, 0.0], [0.5, 1.0]]
