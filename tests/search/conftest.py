"""Files that the version before the house had folders wrote, of `small_llama`."""

import gzip
from pathlib import Path

import pytest

from ib_analysis import Profile

DATA = Path(__file__).parent / "data"


@pytest.fixture
def profile_v1_path(tmp_path):
    """A profile of version 1, that of `allocation_v1.json`."""
    path = tmp_path / "profile_v1.safetensors"
    path.write_bytes(gzip.decompress((DATA / "profile_v1.safetensors.gz").read_bytes()))
    return path


@pytest.fixture
def profile_v1(profile_v1_path):
    return Profile.load(profile_v1_path)
