"""A format without kernels whose runs keep the mean of their first tokens, keys and values alike, in one file."""

import torch
from ib_kernels import Format, MetadataRows
from torch import Tensor


class OffsetSide:
    """scale [N, 1] of each token, offset [P, D] of each run."""

    def metadata(self, head_dim: int) -> dict[str, MetadataRows]:
        return {"scale": MetadataRows(1), "offset": MetadataRows(head_dim, tokens_per_row=0)}

    def fit(self, x: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        runs = x.double().split(lengths.tolist())
        return {"offset": torch.stack([run.mean(0) if len(run) else run.new_zeros(run.shape[1]) for run in runs]).half()}

    def quantize(self, x: Tensor, lengths: Tensor, bits: int, fitted: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        centred = x - fitted["offset"].float().repeat_interleave(lengths.long(), 0)
        half = (2**bits - 1) / 2
        scale = (centred.abs().amax(1, keepdim=True) / half).clamp(2.0**-20, 65504).half()
        codes = (centred / scale.float() + half).round().clamp(0, 2**bits - 1)
        return codes.to(torch.uint8), {"scale": scale, "offset": fitted["offset"]}

    def dequantize(self, codes: Tensor, metadata: dict[str, Tensor], lengths: Tensor, bits: int) -> Tensor:
        centred = (codes.float() - (2**bits - 1) / 2) * metadata["scale"].float()
        return centred + metadata["offset"].float().repeat_interleave(lengths.long(), 0)


OFFSET = Format("offset", OffsetSide(), OffsetSide())
