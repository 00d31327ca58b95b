"""Compiling a kernel for a GPU that is not here, and what its machine code shows."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WARP = 32
Kind = str | tuple[str, ...]  # of an argument
MATRIX = ("HMMA", "HGMMA", "UTCHMMA")
ASYNCHRONOUS_COPY = ("LDGSTS", "UTMALDG")


@dataclass(frozen=True)
class MachineCode:
    """What the machine code of one variant of a kernel uses."""

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    program: Counter[str]  # all instructions of one warp, by name
    loop: Counter[str]  # those of the longest loop
    warps: int

    @property
    def spills(self) -> bool:
        return self.stack_bytes > 0 or self.local_bytes > 0

    @property
    def matrix_instructions(self) -> int:
        return sum(self.program[name] for name in MATRIX)

    @property
    def asynchronous_copies(self) -> int:
        return sum(self.program[name] for name in ASYNCHRONOUS_COPY)

    def instructions_per(self, elements: int) -> float:
        """Thread instructions for each of `elements`, which one pass of the longest loop, or a program without loops, handles."""
        return (self.loop or self.program).total() * WARP * self.warps / elements


def compile_for(
    kernel: Any, types: dict[str, Kind], constants: dict[str, Any], launch: dict[str, Any], capability: int
) -> MachineCode:
    """Compile a kernel ahead of time.

    Args:
        kernel: a `triton.jit` function.
        types: type of every argument that is no constant ("*fp16", "i32", ..., or a named tuple of them), and more. A pointer is
            a multiple of 16 bytes; "i32:16" is an integer that is a multiple of 16, which the compiler is told at a launch too.
        constants: value of every constant.
        launch: num_warps, num_stages, ...
        capability: 80, 90 or 100 for sm_80, sm_90 or sm_100.
    """
    kinds = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = [path for path, kind in _paths(kinds) if "*" in kind or ":16" in kind]
    source = ASTSource(
        fn=kernel,
        signature={name: _plain(kind) for name, kind in kinds.items()},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={path: [["tt.divisibility", 16]] for path in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, WARP), options=launch)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        resources = _run("cuobjdump", "-res-usage", str(binary))
        assembly = _run("nvdisasm", "-c", str(binary))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", resources)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resources: {resources!r}")
    registers, stack, local = map(int, found.groups())
    program, loop = instructions(assembly)
    return MachineCode(registers, stack, local, compiled.metadata.shared, program, loop, launch["num_warps"])


def _plain(kind: Kind) -> Kind:
    """The type, or the named tuple of types, without what is said about alignment."""
    if isinstance(kind, str):
        return kind.split(":")[0]
    plain = (part.split(":")[0] for part in kind)
    return type(kind)(*plain) if hasattr(kind, "_fields") else tuple(plain)


def _paths(kinds: dict[str, Kind]) -> Iterator[tuple[tuple[int, ...], str]]:
    """Type of every argument, and of every part of those that are tuples, by position."""
    for i, kind in enumerate(kinds.values()):
        if isinstance(kind, str):
            yield (i,), kind
        else:
            yield from (((i, j), part) for j, part in enumerate(kind))


def instructions(assembly: str) -> tuple[Counter[str], Counter[str]]:
    """Instructions by name without modifiers: all, and those from the label to the branch back of the longest loop."""
    names: list[str] = []
    labels: dict[str, int] = {}
    longest: list[str] = []
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", line):
            names.append(instruction[1])
            back = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
            if back and back[1] in labels and len(names) - labels[back[1]] > max(1, len(longest)):  # 1: the trap at the end
                longest = names[labels[back[1]] :]
    return Counter(names), Counter(longest)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout
