"""Keys of small norm attract attention (Devoto et al. 2024, arXiv 2406.11430): the scorer of a stranger, in one file."""

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class KeyNorm:
    """Minus the norm of a token's key, to a power."""

    power: float = 1.0

    def __call__(self, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float) -> Tensor:
        return -(keys.detach().float().norm(dim=-1) ** self.power)
