"""What a cache launches most, and what is hardest to compile, for three generations of GPUs, none of which is needed.

`make compile` compiles all variants; kernels/benchmarks/compiled.csv is what it found.
"""

from collections import Counter, defaultdict
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import MachineCode, compile_for, instructions
from compile import BITS, CAPABILITIES, faults, variants
from ib_kernels.decoding_triton import attend_kernel, programs_per_core, programs_that_fit
from ib_kernels.launch_table import Asked
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

pytestmark = pytest.mark.slow

CHOSEN = [
    "attend rotated k4 v4 d128 rows 8 float32",
    "attend rotated k2 v2 d128 rows 8 float32",
    "attend rotated k2 v3 d128 rows 8 float32",
    "attend rotated k4 v2 d96 rows 8 float32",
    "attend spectral k4 v4 d128 rows 8 float32",
    "attend spectral k2 v4 d64 rows 8 float32",
    "attend kivi k4 v4 d128 rows 8 bfloat16",
    "attend kivi k2 v2 d128 rows 8 bfloat16",
    "attend kivi k4 v4 d64 rows 8 bfloat16 softcap",
    "attend kivi k3 v3 d128 rows 8 float32",
    "attend kivi k4 v4 d96 rows 8 bfloat16",
    "attend kivi k3 v3 d96 rows 8 float32",
    "raw d128 bf16 window mask",
    "merge_kernel d128 window rotated",
    "rotate_query_kernel d128",
    "turn_query_kernel d128",
    "pack_keys_kernel kivi b4 d128 bf16",
    "pack_values_kernel kivi b2 d128 bf16",
    "unpack_kernel kivi b4 d128 values",
    "pack_kernel rotated b4 d128 keys bf16",
    "pack_kernel rotated b4 d256 keys fp32",
]


def find(name, capability):
    head_dim = next(int(word[1:]) for word in name.split() if word[0] == "d" and word[1:].isdigit())
    return next(variant for variant in variants(capability, head_dim, BITS) if variant.name == name)


def compiled(variant, capability, **launch):
    return compile_for(variant.kernel, variant.types, variant.constants, variant.launch | launch, capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", CHOSEN)
def test_machine_code_has_no_faults(name, capability):
    variant = find(name, capability)
    assert faults(variant, compiled(variant, capability)) == []


def test_a_variant_without_enough_registers_spills():
    variant = find(CHOSEN[0], 90)
    assert "spills" in faults(variant, compiled(variant, 90, maxnreg=64))[0]


def test_every_kind_of_fault_is_found():
    variant = replace(find(CHOSEN[0], 90), elements=64, budget=2.0)
    good = MachineCode(255, 0, 0, 0, Counter(HMMA=1, LDGSTS=1), Counter(HMMA=4), warps=1)
    assert faults(variant, good) == []
    assert "registers" in faults(variant, replace(good, registers=256))[0]
    assert "spills 24" in faults(variant, replace(good, stack_bytes=16, local_bytes=8))[0]
    assert faults(variant, replace(good, program=Counter(LDGSTS=1))) == ["no matrix instructions"]
    assert faults(variant, replace(good, program=Counter(HMMA=1))) == ["no asynchronous copies"]
    assert "instructions per element" in faults(variant, replace(good, loop=Counter(HMMA=4, FADD=1)))[0]


@pytest.mark.parametrize(
    ("registers", "warps", "shared_bytes", "core_bytes", "programs"),
    [
        (128, 1, 8000, 228 << 10, 16),
        (168, 1, 8000, 228 << 10, 12),
        (255, 1, 8000, 228 << 10, 8),
        (255, 2, 8000, 228 << 10, 4),
        (128, 1, 12352, 228 << 10, 14),  # of 13,440 bytes, in 196 KB
        (128, 1, 12352, 164 << 10, 10),
        (168, 1, 12800, 164 << 10, 9),
        (128, 1, 12352, 227 << 10, 16),
        (128, 1, 90000, 100 << 10, 1),
    ],
)
def test_registers_and_shared_memory_limit_the_programs_of_a_core(registers, warps, shared_bytes, core_bytes, programs):
    launch = {"num_warps": warps, "num_stages": 3, "maxnreg": registers}
    assert programs_that_fit(launch, shared_bytes, core_bytes) == programs


@pytest.mark.parametrize(
    ("asked", "name", "programs"),
    [
        (Asked("tokens", 128, 4, 4, False, True, False, 90), "attend rotated k4 v4 d128 rows 8 float32", 14),
        (Asked("tokens", 128, 4, 4, True, True, False, 90), "attend rotated k4 v4 d128 rows 16 float32", 8),
        (Asked("quarters", 128, 4, 4, False, True, False, 90), "attend spectral k4 v4 d128 rows 8 float32", 8),
        (Asked("groups", 128, 4, 4, False, False, False, 90), "attend kivi k4 v4 d128 rows 8 bfloat16", 12),
        (Asked("groups", 128, 4, 4, False, True, True, 90), "attend kivi k4 v4 d128 rows 8 float32 softcap", 8),
    ],
)
def test_the_programs_of_a_core_are_those_of_what_is_compiled(asked, name, programs, monkeypatch):
    """The driver that Triton asks for the GPU, and PyTorch's properties of it, without one: nothing is launched."""
    gpu = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: GPUTarget("cuda", 90, 32)
    )
    h100 = SimpleNamespace(shared_memory_per_multiprocessor=228 << 10)
    monkeypatch.setattr(driver, "_active", gpu)
    monkeypatch.setattr(attend_kernel, "device_caches", defaultdict(attend_kernel.create_binder))  # not to stay for others
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h100)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    variant = find(name, 90)
    expected = programs_that_fit(variant.launch, compiled(variant, 90).shared_bytes, 228 << 10)
    dtype = torch.float32 if asked.fp32 else torch.bfloat16
    assert programs_per_core.__wrapped__(asked, dtype, torch.device("cuda", 0)) == expected == programs


def test_instructions_of_the_longest_loop():
    assembly = """
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDGSTS.E [R1], desc[UR4][R2.64] ;
        /*0020*/              @!P0 HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0030*/               @P1 BRA `(.L_x_0) ;
        /*0040*/                   EXIT ;
.L_x_1:
        /*0050*/                   BRA `(.L_x_1);
"""
    program, loop = instructions(assembly)
    assert loop == Counter(LDGSTS=1, HMMA=1, BRA=1)
    assert program == Counter(S2R=1, LDGSTS=1, HMMA=1, BRA=2, EXIT=1)
    straight, none = instructions(assembly.split(".L_x_0:")[0])
    assert straight == Counter(S2R=1) and not none
