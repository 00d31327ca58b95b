"""The files that say what to install agree with each other."""

import datetime
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).parents[1]
PACKAGES = ("ib_analysis", "ib_kernels")
FROM_PIP = {"torch", "transformers", "triton", "safetensors"}  # so that PyTorch has one source


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def project(pyproject) -> dict[str, Any]:
    return pyproject["project"]


@pytest.fixture(scope="module")
def conda() -> tuple[dict[str, Requirement], list[str]]:
    """What environment.yml takes from conda, by name, and what it hands to pip."""
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    (pip,) = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    return by_name([entry for entry in dependencies if isinstance(entry, str)]), pip


def by_name(lines: list[str]) -> dict[str, Requirement]:
    requirements = [Requirement(line) for line in lines]
    assert len({requirement.name for requirement in requirements}) == len(requirements)
    return {requirement.name: requirement for requirement in requirements}


def test_environment_and_pyproject_name_the_same_packages_and_versions(project, conda):
    from_conda, pip = conda
    wanted = by_name(project["dependencies"] + project["optional-dependencies"]["notebooks"])
    assert wanted.keys() >= FROM_PIP
    assert from_conda.keys() - {"python", "pip"} == wanted.keys() - FROM_PIP
    for name in wanted.keys() - FROM_PIP:
        assert from_conda[name].specifier == wanted[name].specifier, name
    assert pip == ["-c constraints.txt", "-e .[dev,notebooks]"]


def test_python_versions_agree(project, conda):
    lowest = SpecifierSet(project["requires-python"])
    python = conda[0]["python"].specifier
    for minor in range(6, 15):
        assert (f"3.{minor}" in lowest) == (f"3.{minor}" in python), minor


def test_constraints_are_allowed_by_pyproject(project):
    wanted = by_name(project["dependencies"])
    constraints = by_name((ROOT / "constraints.txt").read_text(encoding="utf-8").split("\n")[:-1])
    assert {"torch", "triton"} <= constraints.keys()
    for name, constraint in constraints.items():
        for one in constraint.specifier:
            if one.operator == "==":
                assert one.version in wanted[name].specifier, name
            else:
                assert str(one) in map(str, wanted[name].specifier), name


def test_every_extra_that_is_named_exists(project):
    assert {"dev", "notebooks"} <= project["optional-dependencies"].keys()
    for lines in project["optional-dependencies"].values():
        by_name(lines)


def test_every_folder_with_code_is_packed(pyproject):
    """And data/, as ib_analysis/data. A folder that pyproject.toml does not name would be missing from the wheel."""
    packed = set(pyproject["tool"]["setuptools"]["packages"])
    modules = [
        path.relative_to(base) for base in (ROOT, ROOT / "kernels") for name in PACKAGES for path in (base / name).rglob("*.py")
    ]
    assert {".".join(path.parts[:-1]) for path in modules} == packed - {"ib_analysis.data"}
    assert {".".join(path.parts[:-1]) for path in modules if path.name == "__init__.py"} == packed - {"ib_analysis.data"}


def test_what_the_wheel_takes_from_data_exists(pyproject):
    setuptools = pyproject["tool"]["setuptools"]
    assert setuptools["package-dir"]["ib_analysis.data"] == "data"
    assert all(any((ROOT / "data").glob(pattern)) for pattern in setuptools["package-data"]["ib_analysis.data"])
    assert not list((ROOT / "data").glob("*.py"))  # would be packed


def test_the_changelog_begins_with_this_version(project):
    first = re.search(r"^## \[(.+?)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert first and first[1] == project["version"]


def test_ci_runs_what_the_readme_says():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = re.findall(r"^make .+$", script.read_text(encoding="utf-8"), re.MULTILINE)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "make test" in commands
    for command in commands:
        assert command in readme
        assert f"\n{command.split()[1]}:" in makefile
    steps = [
        step.get("run", "")
        for job in yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"].values()
        for step in job["steps"]
    ]
    assert ".ci/run" in steps
    assert "make test-lowest" in steps and "--resolution lowest-direct" in makefile


def test_links_of_the_documents_lead_somewhere():
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    assert len(documents) > 3
    for document in documents:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (document.parent / link).exists(), f"{document.name}: {link}"


def test_citation(project):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    for field in ("cff-version", "message", "title", "authors", "version", "license"):
        assert citation[field], field
    assert str(citation["cff-version"]) == "1.2.0"
    assert str(citation["version"]) == project["version"]
    assert citation["license"] == project["license"]
    assert all("name" in author or "family-names" in author for author in citation["authors"])
    for reference in citation["references"]:
        assert reference["type"] and reference["title"] and reference["authors"]
        assert 2000 < reference["year"] <= datetime.date.today().year
    assert "2412.12706" in str(citation["references"])  # the paper whose trade-off this studies


def test_files_that_pyproject_names_exist(project):
    for file in (project["readme"], *project["license-files"], "constraints.txt"):
        assert (ROOT / file).is_file(), file
    module, function = project["scripts"]["ib-analysis"].split(":")
    assert f"def {function}(" in (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
