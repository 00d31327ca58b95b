import os
import subprocess
import sys
from pathlib import Path


def test_kernels_under_the_interpreter():
    """Runs tests/kernels/interpreted, which needs Triton to be imported as an interpreter."""
    folder = Path(__file__).parent / "interpreted"
    arguments = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(folder)]
    run = subprocess.run(
        arguments, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
