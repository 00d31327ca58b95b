"""What is installed from a wheel works where there is no checkout: the embedded model, its prompts and the command line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "ib_analysis", "kernels", "data")
USE = """
from pathlib import Path
from random import Random

import ib_kernels

import ib_analysis as ib
from ib_analysis.tasks.mixture import mixture

for package in (ib, ib_kernels):
    assert Path(package.__file__).is_relative_to({site!r}), package.__file__
model, tokenizer = ib.load()
prompts = mixture("wheel", 4, 64)
assert any(prompt.task == "text" for prompt in mixture("wheel", 40, 64))  # from the held-out text that the wheel carries
allocation = ib.optimal_allocation(model, 1 / 2, prompts=[prompt.text for prompt in prompts], tokenizer=tokenizer)
allocation.to_json("allocation.json")
inputs = tokenizer(prompts[0].context, return_tensors="pt")
out = model.generate(**inputs, **ib.cache_argument(model, allocation.cache(model)), max_new_tokens=2)
assert out.shape[1] == inputs["input_ids"].shape[1] + 2
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """An empty folder into which the wheel was installed; the wheel was built from the source distribution."""
    source, built, site = (tmp_path_factory.mktemp(name) for name in ("source", "built", "site"))
    for name in BUILT_FROM:  # not in the checkout, where an older build may lie
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", built, source)
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site, wheel)
    return site


def run(*command, cwd=None, env=None):
    """What a command prints. Fails with its messages."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture
def python(site, tmp_path):
    """Runs Python in another folder. Without `site` (-S) no .pth file leads to the checkout, dependencies come from the path."""
    dependencies = [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), *dependencies])}
    return lambda *arguments: run(sys.executable, "-S", *arguments, cwd=tmp_path, env=env)


def test_it_carries_the_model_and_no_programs(site):
    carried = {str(path.relative_to(site / "ib_analysis" / "data")) for path in (site / "ib_analysis" / "data").rglob("*.*")}
    assert {"README.md", "PSF-LICENSE.txt", "heldout.jsonl", "model/model.safetensors", "model/tokenizer.json"} <= carried
    assert not any(name.endswith((".py", ".png")) for name in carried)
    folders = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert folders - {"bin"} == {"ib_analysis", "ib_kernels"}


def test_it_is_used_from_python(python, site):
    python("-W", "ignore", "-c", USE.format(site=str(site)))


def test_it_is_used_from_a_shell(python, tmp_path):
    assert "allocate" in python("-m", "ib_analysis.cli", "--help")
    filler = "The old clock stood near the tall road.\n" * 6
    texts = [f"- {word} violet\n- copper saddle\n{filler}Find {word}" for word in ("amber", "wolf", "grape", "lemon")]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    calibrated = python("-m", "ib_analysis.cli", "allocate", "--budget", "1/2", "--prompts", "texts.jsonl", "--out", "out")
    assert "written to out/" in calibrated
    saved = ("--allocation", "out/allocation.json")
    assert python("-m", "ib_analysis.cli", "generate", *saved, "--prompt", texts[0], "--tokens", "2").strip()
