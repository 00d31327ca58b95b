import torch
from timing import BLOCK, read_stream


def test_the_stream_reads_every_number(device):
    x = torch.randint(-1000, 1000, (2 * BLOCK,), dtype=torch.int32, generator=torch.Generator().manual_seed(0)).to(device)
    x[BLOCK - 1], x[BLOCK] = 5000, 6000
    largest = torch.zeros(2, dtype=torch.int32, device=device)
    read_stream(x, largest)
    assert largest.tolist() == [5000, 6000]
