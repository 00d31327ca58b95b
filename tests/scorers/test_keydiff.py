"""KeyDiff against its definition."""

import torch
from materialised import H_KV, PADDED, SCALING, B, T, left_padded

from ib_analysis.scorers.keydiff import keydiff


def test_scores_are_minus_cosines_to_the_mean_direction():
    query, keys, values, valid = left_padded()
    found = keydiff(torch.nn.Module(), query, keys, values, valid, SCALING)
    for b in range(B):
        first = 0 if b == 0 else PADDED
        for h in range(H_KV):
            unit = [key / key.norm() for key in keys[b, h, first:].double()]
            mean = sum(unit) / len(unit)
            expected = torch.tensor([-float(u @ mean / mean.norm()) for u in unit], dtype=torch.float64)
            torch.testing.assert_close(found[b, h, first:T].double(), expected, atol=1e-6, rtol=1e-5)
