"""The house: every folder on its floor, imports down only, no circle, no module that is too long to read."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from ib_kernels import FORMATS

ROOT = Path(__file__).parents[1]
FLOORS = (  # from the ground up; docs/design.md says what each answers
    {"errors", "files", "ib_kernels"},
    {"cache", "scorers", "estimators", "model"},
    {"figures", "tasks"},
    {"replay"},
    {"codes", "policies"},
    {"search"},
    {"experiments", "testing"},
    {"cli"},
)
MAX_LINES = 400


def modules():
    """Name to path of every module of the package and of the kernels."""
    found = {}
    for base, package in ((ROOT, "ib_analysis"), (ROOT / "kernels", "ib_kernels")):
        for path in (base / package).rglob("*.py"):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name):
    """Modules of ours that a module imports anywhere, in functions and for types too."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
    return {module for module in found if module in MODULES and module != name}


GRAPH = {name: imports(name) for name in MODULES if name != "ib_analysis"}  # whose face is imported when it is asked for


def room(name):
    """The folder, or the module at the root, that a module belongs to."""
    parts = name.split(".")
    return parts[0] if parts[0] == "ib_kernels" else parts[1]


def floor(name):
    return next(number for number, rooms in enumerate(FLOORS) if room(name) in rooms)


def test_every_folder_has_a_floor():
    rooms = {room(name) for name in GRAPH}
    assert rooms == set().union(*FLOORS)


def test_no_arrow_points_up():
    up = [(name, used) for name, users in GRAPH.items() for used in users if used in GRAPH and floor(used) > floor(name)]
    assert up == []


def test_no_circles():
    folders: dict[str, set[str]] = {}
    for name, used in GRAPH.items():
        folders.setdefault(room(name), set()).update(room(other) for other in used if other in GRAPH)
    TopologicalSorter({folder: used - {folder} for folder, used in folders.items()}).prepare()  # raises CycleError
    leaves = {
        name: {used for used in users if used in GRAPH and not name.startswith(f"{used}.")} for name, users in GRAPH.items()
    }
    TopologicalSorter(leaves).prepare()


def test_kernels_know_nothing_of_the_package():
    outside = {"torch", "triton", "numpy", "ib_kernels", *__import__("sys").stdlib_module_names}
    for name, path in MODULES.items():
        if name.startswith("ib_kernels"):
            nodes = list(ast.walk(ast.parse(path.read_text())))
            used = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
            used |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
            assert {module.split(".")[0] for module in used} <= outside, name


def test_one_screenful_of_modules():
    long = {name: lines for name, path in MODULES.items() if (lines := len(path.read_text().splitlines())) > MAX_LINES}
    assert long == {}


def test_no_format_is_compared_by_its_name():
    """Outside of its own folder a format is what its row in FORMATS says."""
    found = []
    for name, path in MODULES.items():
        if ".formats" in name:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                words = {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
                found += [(name, node.lineno)] if words & set(FORMATS) else []
    assert found == []


def test_text_files_say_their_encoding():
    """Elsewhere the machine's own is another: Windows writes what Linux cannot read."""
    found = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("read_text", "write_text")
            ):
                found += [] if "encoding" in {keyword.arg for keyword in node.keywords} else [(name, node.lineno)]
    assert found == []
