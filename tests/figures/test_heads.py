"""What the heatmaps show is what the heads were given."""

import math
import subprocess
import sys

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


@pytest.mark.slow
def test_saved_twice_the_same_bytes_and_the_table_of_heads(tmp_path):
    contents = []
    for _ in range(2):
        draw_heads(TIERS, tmp_path / "heads")
        contents.append([(tmp_path / f"heads.{kind}").read_bytes() for kind in ("pdf", "png", "csv")])
    assert contents[0] == contents[1]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "heads.csv"), head_table(TIERS))


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "heads"), [(30, 8), (126, 8)])  # of a 405B model
def test_memory_stays_small(layers, heads, tmp_path):
    """Tick labels once had a canvas each: of 300 dots per inch, they took gigabytes."""
    program = f"""
import resource
import pandas as pd
from ib_analysis.figures.heads import draw_heads
rows = [(i, h, 0, "kivi", 0.5, 4, 4, 100) for i in range({layers}) for h in range({heads})]
tiers = pd.DataFrame(rows, columns={list(TIERS.columns)})
draw_heads(tiers[:1], {str(tmp_path / "first")!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
draw_heads(tiers, {str(tmp_path / "heads")!r})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300  # MiB
    assert len(pd.read_csv(tmp_path / "heads.csv")) == layers * heads


def test_a_notebook_shows_a_figure_whatever_the_backend():
    """Also in a cell of a notebook that has chosen none; and once where `%matplotlib inline` has chosen one."""
    formatters = pytest.importorskip("IPython.core.formatters")
    data, _ = formatters.DisplayFormatter().format(draw_heads(TIERS))
    assert data["image/png"].startswith(b"\x89PNG") and set(data) == {"image/png", "text/plain"}
