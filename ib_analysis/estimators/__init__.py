"""How much information is left? Estimates of mutual information from samples. One file a method; `ESTIMATORS` is the registry."""

from ib_analysis.estimators.code_entropy import CodeEntropy
from ib_analysis.estimators.copula import CopulaGaussian
from ib_analysis.estimators.dithered_channel import DitheredChannel
from ib_analysis.estimators.estimate import Estimate, Estimator
from ib_analysis.estimators.gaussian import Gaussian
from ib_analysis.estimators.infonce import InfoNCE
from ib_analysis.estimators.ksg import KSG
from ib_analysis.estimators.mine import MINE
from ib_analysis.estimators.moments import Moments
from ib_analysis.estimators.nwj import NWJ

_METHODS: tuple[Estimator, ...] = (
    Gaussian(),
    CopulaGaussian(),
    KSG(),
    InfoNCE(),
    MINE(),
    NWJ(),
    CodeEntropy(),
    DitheredChannel(),
)
ESTIMATORS: dict[str, Estimator] = {method.name: method for method in _METHODS}

__all__ = [
    "ESTIMATORS",
    "KSG",
    "MINE",
    "NWJ",
    "CodeEntropy",
    "CopulaGaussian",
    "DitheredChannel",
    "Estimate",
    "Estimator",
    "Gaussian",
    "InfoNCE",
    "Moments",
]
