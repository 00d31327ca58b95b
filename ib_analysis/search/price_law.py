"""What the measured losses of some options of a head say of its others.

The gradient is right to second order only, so log(measured loss / price) of a head changes with log(price), smoothly: a Gaussian
process over log(price) for each head, around the mean over heads, known at knots and linear between them. An option departs from
the law of its head by a little, independently of others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]  # [U, O]: U heads, O options

KNOTS = 1.0  # nats of price between knots
REACH = 2.0  # nats of price over which a head's ratio changes
OPTION_SPREAD = 0.2  # nats by which an option departs from its head's law
HEAD_SPREAD = 1.0  # nats by which heads depart from their mean, until some are measured
LEAST_SPREAD = 0.3
FEW = 8  # measured losses that tell the spread
TINY_BITS = 1e-7  # losses below are rounding


@dataclass(frozen=True, eq=False)
class PriceLaw:
    """Losses of all options given those measured: log-normal, and what was measured without error is as it was measured."""

    centre: Table  # of log losses, [U, O], if nothing had been measured
    weights: NDArray[np.float64]  # [U, O, J], of J knots in each option
    knots: NDArray[np.float64]  # [U, J], posterior means
    factors: NDArray[np.float64]  # [U, J, J], of posterior covariances
    measured: Table  # log losses less centre; 0 where there are none
    trust: Table  # in what was measured, against the law: 0 where there is none, 1 if it has no error
    spread: Table  # nats that remain of what was measured with an error

    @property
    def expected(self) -> Table:
        """Medians, in bits."""
        return self._losses(self.knots)

    def draw(self, generator: np.random.Generator) -> Table:
        """Losses as they may be, in bits. What is not measured is on the law of its head: that of hundreds of options some depart
        from it to the better by luck is no reason to measure them."""
        knots = self.knots + np.einsum("ujk,uk->uj", self.factors, generator.standard_normal(self.knots.shape))
        return self._losses(knots) * np.exp(self.spread * generator.standard_normal(self.spread.shape))

    def _losses(self, knots: NDArray[np.float64]) -> Table:
        smooth = np.einsum("uoj,uj->uo", self.weights, knots)
        losses: Table = np.exp(self.centre + smooth + self.trust * (self.measured - smooth))
        return losses


def price_law(prices: Table, losses: Table, errors: Table) -> PriceLaw:
    """From prices, measured losses (NaN where there are none) and their standard errors, all in bits."""
    known = ~np.isnan(losses)
    log_prices = np.log(prices + TINY_BITS)
    ratios = np.where(known, np.log(losses + TINY_BITS) - log_prices, 0.0)
    mean, spread = 0.0, HEAD_SPREAD
    if known.sum() >= FEW:
        mean, spread = float(ratios[known].mean()), max(LEAST_SPREAD, float(ratios[known].std()))
    measured = np.where(known, ratios - mean, 0.0)
    noise = np.where(known, np.log1p((errors / (losses + TINY_BITS)) ** 2), np.inf)  # variances of logs

    places = np.arange(log_prices.min(), log_prices.max() + KNOTS, KNOTS)  # [J]
    weights = np.maximum(0, 1 - np.abs(log_prices[..., None] - places) / KNOTS)  # [U, O, J]
    prior = spread**2 * np.exp(-(((places[:, None] - places) / REACH) ** 2) / 2) + 1e-6 * np.eye(len(places))
    precision = 1 / (OPTION_SPREAD**2 + noise)  # [U, O]
    weighted = weights * precision[..., None]
    covariance = np.linalg.inv(np.linalg.inv(prior) + np.einsum("uoj,uok->ujk", weighted, weights))  # [U, J, J]
    knots = np.einsum("ujk,uok,uo->uj", covariance, weighted, measured)
    trust = OPTION_SPREAD**2 * precision
    return PriceLaw(
        centre=log_prices + mean,
        weights=weights,
        knots=knots,
        factors=np.linalg.cholesky((covariance + covariance.transpose(0, 2, 1)) / 2).astype(np.float64),
        measured=measured,
        trust=trust,
        spread=np.where(known, OPTION_SPREAD * np.sqrt(1 - trust), 0.0),
    )
