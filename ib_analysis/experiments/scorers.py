"""Which scorer? What caches lose that keep the same number of tokens, ranked by each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ib_analysis.cache.plan import Recent
from ib_analysis.cache.spec import ByteLimit, CacheSpec
from ib_analysis.errors import BudgetError
from ib_analysis.experiments.setup import check_shares
from ib_analysis.model.shape import cache_shape
from ib_analysis.policies import POLICIES, Cell
from ib_analysis.replay.examples import Prompts, check_lengths, make_examples, median_length
from ib_analysis.replay.measurement import bootstrap_interval, ratio_interval
from ib_analysis.replay.replay import Replay
from ib_analysis.replay.replays import Replays
from ib_analysis.scorers import SCORERS, RereadingScorer, Scorer, get_scorer
from ib_analysis.scorers.learned import Learned
from ib_analysis.search.fit_scorer import fit_scorer, read_tokens

SHARES = (1 / 4, 1 / 8, 1 / 16)


def scorer_losses(
    model: PreTrainedModel,
    calibrating: Prompts,
    fresh: Prompts,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    scorers: Sequence[str] = tuple(SCORERS),
    policies: Sequence[str] = ("prune-only",),
    shares: Sequence[float] = SHARES,
    question_aware: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """One row for each budget, policy and scorer, measured on the fresh prompts. The model is left as it was.

    Columns: budget_share, policy, scorer; setting, bits_per_token of the policy's cell that is best on these very prompts under
    this scorer; kl_bits = E KL(full || compressed) in bits per predicted token with its 95% interval low_bits, high_bits; ratio,
    ratio_low, ratio_high: that KL over the first scorer's, a paired bootstrap.

    Args:
        calibrating: prompts that a learned scorer is fitted to, used for nothing else.
        fresh: prompts that are measured.
        scorers: names; the others are compared with the first.

    The other arguments are those of `optimal_allocation`. Raises BudgetError, CalibrationError, UnknownNameError.
    """
    check_shares(shares)
    chosen = {name: get_scorer(name) for name in scorers}
    examples = make_examples(model, tokenizer, fresh, question_aware=question_aware, seed=seed + 1)
    length = median_length(examples)
    spec = CacheSpec(cache_shape(model.config), Recent.within(min(shares), length), SCORERS["value_aware"])
    check_lengths(examples, spec.recent)
    cells = _cells(spec, policies, shares, length)
    for name, scorer in chosen.items():
        if scorer == Learned():
            seen = make_examples(model, tokenizer, calibrating, question_aware=question_aware, seed=seed)
            chosen[name] = fit_scorer(spec, [rows for rows, _ in read_tokens(Replays(model, spec, seen), seed)])
    plans = [cell.plans for some in cells.values() for cell in some]
    replays = Replays(model, spec, examples)

    def measure(number: int) -> list[Tensor]:
        watching = _All(chosen)
        replay = Replay(model, replace(spec, scorer=watching), examples[number])
        again = {name: replay.reread_scores(scorer) for name, scorer in chosen.items() if isinstance(scorer, RereadingScorer)}
        found = []
        for name in chosen:
            replay.rank_by(again[name] if name in again else {layer: scores[name] for layer, scores in watching.scores.items()})
            found.append(replay.measure(plans)[0])
        return found

    rows = list(replays.each(measure, range(len(examples)), "held-out prompts"))
    kl_bits = np.stack([torch.stack(row).cpu().numpy() for row in rows], 1)  # [scorers, prompts, plans]
    return _table(spec, cells, dict(zip(chosen, kl_bits)), length)


def _cells(spec: CacheSpec, policies: Sequence[str], shares: Sequence[float], length: int) -> dict[tuple[float, str], list[Cell]]:
    """Cells by budget and policy, where there are any. Raises BudgetError if there are none at all."""
    cells = {
        (share, policy): list(POLICIES[policy](spec, ByteLimit(spec, share, length))) for share in shares for policy in policies
    }
    found = {key: some for key, some in cells.items() if some}
    if not found:
        raise BudgetError(f"no cell of {', '.join(policies)} fits: take larger shares, or longer prompts")
    return found


def _table(
    spec: CacheSpec, cells: Mapping[tuple[float, str], list[Cell]], kl_bits: Mapping[str, NDArray[np.float64]], length: int
) -> pd.DataFrame:
    """From the losses [prompts, plans] of each scorer, plans in the order of the cells."""
    rows, begin = [], 0
    for (share, policy), some in cells.items():
        of_cells = {name: losses[:, begin : begin + len(some)] for name, losses in kl_bits.items()}
        best = {name: int(losses.mean(0).argmin()) for name, losses in of_cells.items()}
        of_best = {name: losses[:, best[name]] for name, losses in of_cells.items()}
        for name, losses in of_best.items():
            cell, (low, high) = some[best[name]], bootstrap_interval(losses)
            ratio, ratio_low, ratio_high = ratio_interval(losses, next(iter(of_best.values())))
            rows.append(
                {
                    "budget_share": share,
                    "policy": policy,
                    "scorer": name,
                    "setting": cell.setting,
                    "bits_per_token": 8 * int(spec.nbytes(cell.plans, length)) / length,
                    "kl_bits": float(losses.mean()),
                    "low_bits": low,
                    "high_bits": high,
                    "ratio": ratio,
                    "ratio_low": ratio_low,
                    "ratio_high": ratio_high,
                }
            )
        begin += len(some)
    return pd.DataFrame(rows)


class _All:
    """Ranks by the first scorer, and keeps each layer's scores [H_kv, T] by all of them: one prefill serves them all."""

    def __init__(self, scorers: Mapping[str, Scorer]) -> None:
        self.scorers = scorers
        self.scores: dict[int, dict[str, Tensor]] = {}

    def __call__(self, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float) -> Tensor:
        found = {name: scorer(module, query, keys, values, valid, scaling) for name, scorer in self.scorers.items()}
        layer = module.layer_idx
        assert isinstance(layer, int)
        self.scores[layer] = {name: scores[0] for name, scores in found.items()}
        return next(iter(found.values()))


def scorers_text(table: pd.DataFrame) -> str:
    """`scorer_losses` as Markdown: a table for each policy, a column for each budget."""
    lines: list[str] = []
    for policy, of_policy in table.groupby("policy", sort=False):
        shares = list(dict.fromkeys(of_policy.budget_share))
        lines += ["", f"| {policy} | {' | '.join(f'{share:.4g}' for share in shares)} |", "|---|" + "---:|" * len(shares)]
        for scorer, some in of_policy.groupby("scorer", sort=False):
            rows = some.set_index("budget_share").loc[shares].itertuples()
            told = [f"{row.kl_bits:.4f}, {row.ratio:.2f} [{row.ratio_low:.2f}, {row.ratio_high:.2f}]" for row in rows]
            lines.append(f"| {scorer} | {' | '.join(told)} |")
    return "\n".join(lines[1:])
