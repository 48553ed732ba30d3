"""The CUDA LSTM kernels on the emulator, without Python: no race, no access out of bounds, right
results whatever the order; and that each of their precautions is needed, and would be missed.

A precaution is missed where its mutant (emulator/mutants.py) is noticed: by ThreadSanitizer, or in
a plain run with some seed; an overrun by AddressSanitizer. LSTM_EXT_ALL_MUTANTS=1 tries all of them
rather than one of each kind.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from emulator.build import FLAGS, HERE, MODES, ROOT, build, compiler, environment
from emulator.mutants import CONTROL, MUTANTS, OVERRUN, RACE, USUAL, uncovered

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux" or not shutil.which(compiler()[0]),
    reason="the emulator needs Linux on x86-64 and a C++ compiler",
)

ENGINE = ["tests/emulator/lstm_driver.cpp", "csrc/cuda/engine.cu", "csrc/cuda/plan.cpp"]
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("kernels_*.cu"))

# Arguments of lstm_driver.cpp: PASS DTYPE FAMILY MxN HELD+SHARED GROUPS DIRECTIONS T B H P BATCH.
# For all kernels, in plain runs.
PROBLEMS = [
    # Several tiles a block: with rounds (8x2, 4x4) and without, weights held, shared and streamed.
    "forward bfloat16 grid 8x2 0+1 1 2 5 37 37 37 lengths",
    "forward bfloat16 grid 2x1 4+1 2 1 4 33 65 65 dense",
    "forward bfloat16 grid 4x4 2+0 1 1 3 67 70 70 lengths",
    "forward float16 grid 4x2 2+0 2 2 4 41 300 300 lengths",
    "forward float16 step 2x4 0+0 1 2 3 70 37 37 packed",
    "forward float16 grid 4x8 0+1 2 1 3 90 37 37 lengths",
    "forward tf32 grid 8x4 0+0 1 1 3 41 37 37 lengths",
    "forward tf32 grid 4x1 0+1 2 1 4 40 33 33 dense",
    "forward tf32 step 8x1 0+0 3 1 3 19 40 11 lengths",
    "forward float32 grid 2x4 0+1 2 2 4 80 29 29 lengths",
    "forward float32 step 4x2 0+0 2 2 3 50 31 17 packed",
    "forward float64 grid 2x1 0+0 1 1 4 17 19 19 lengths",
    "forward float64 step 4x2 0+0 1 2 3 35 33 9 dense",
    "backward bfloat16 grid 2x4 4+1 1 2 4 70 37 37 lengths",
    "backward bfloat16 grid 1x2 0+0 3 1 4 41 33 33 dense",
    "backward bfloat16 step 2x1 0+0 1 1 3 17 65 21 packed",
    "backward float16 grid 1x4 8+0 1 1 3 67 70 70 lengths",
    "backward float16 grid 2x2 4+1 2 1 3 41 205 205 lengths",
    "backward float16 step 2x8 0+0 1 1 3 70 41 41 dense",
    "backward tf32 grid 1x1 8+1 2 2 4 19 37 37 lengths",
    "backward tf32 step 2x4 0+0 1 2 3 40 37 37 dense",
    "backward float32 grid 1x4 0+1 2 1 4 80 19 19 lengths",
    "backward float32 step 2x4 0+0 1 2 3 50 41 17 packed",
    "backward float64 grid 2x4 0+1 1 1 3 41 37 37 lengths",
    "backward float64 step 1x1 0+0 2 2 3 19 33 9 dense",
    # The smallest.
    "forward bfloat16 grid 2x1 0+1 1 1 2 1 1 1 dense",
    "forward float32 step 2x1 0+0 1 1 1 1 1 1 lengths",
    "backward bfloat16 step 1x1 0+0 1 1 1 1 1 1 dense",
    "backward float32 grid 1x1 0+0 1 1 2 1 1 1 lengths",
]
# For few_kernels.cu, besides CONTROL. T B / 8 blocks prepare a direction of backward: few, since a
# thread costs ThreadSanitizer half a millisecond.
SANITIZED = [
    "forward bfloat16 grid 2x1 4+1 2 1 3 17 21 21 lengths",
    "forward bfloat16 grid 8x4 0+0 1 1 3 35 37 37 packed",
    "forward bfloat16 grid 8x2 0+0 2 1 3 9 33 33 dense",  # tiles wider than a group
    "forward float32 grid 2x1 0+0 2 1 4 17 21 21 packed",
    "backward bfloat16 grid 2x2 4+1 1 1 2 17 37 37 lengths",
    "backward bfloat16 grid 2x8 0+1 1 1 2 33 37 37 lengths",
    "backward bfloat16 step 1x1 0+0 1 1 2 17 37 21 packed",
    "backward float32 grid 2x4 0+1 2 1 2 33 37 37 lengths",  # tiles wider than a group
    "backward float32 step 2x4 0+0 1 1 2 17 37 37 packed",
]
# Who notices most easily: the first that does is enough.
OBSERVERS = {RACE: ["tsan", "plain"], OVERRUN: ["asan"]}


def run(program, problem, mode, seeds=(0,), patience=60):
    environ = environment(mode) | {"EMU_TIMEOUT_S": str(patience)}
    if mode == "tsan":  # not a second's sleep at the end
        environ["TSAN_OPTIONS"] += ":atexit_sleep_ms=0"
    words = [*problem.split(), *map(str, seeds)]
    done = subprocess.run(
        [program, *words], env=environ, capture_output=True, text=True, timeout=300
    )
    return done.returncode, f"{problem} in {mode}:\n{done.stdout}{done.stderr}"


def link(mode, folder):
    """few_kernels.cu with the driver, headers in ``folder`` coming before those in csrc."""
    library = build("liblstm_driver.so", ENGINE, mode, kind="shared")
    program = folder / f"lstm_driver.{mode}"
    flags = [*FLAGS, "-iquote", str(folder), *(flag for part in MODES[mode] for flag in part)]
    command = [*compiler(), *flags, "-O0", "-g1", "-w", "-x", "c++", HERE / "few_kernels.cu"]
    command += ["-x", "none", library, f"-Wl,-rpath,{library.parent}", "-o", program]
    subprocess.run(command, check=True)
    return program


@pytest.fixture(scope="module")
def all_kernels():
    return build("lstm_driver", [*ENGINE, *KERNELS])


@pytest.fixture(scope="module")
def few_kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few_kernels")
    return {mode: link(mode, folder) for mode in ("plain", "tsan", "asan")}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_results(all_kernels, problem):
    code, said = run(all_kernels, problem, "plain", seeds=range(4))
    assert code == 0, said


@pytest.mark.parametrize("mode", ["tsan", "asan"])
@pytest.mark.parametrize("problem", CONTROL + SANITIZED)
def test_sanitized(few_kernels, problem, mode):
    code, said = run(few_kernels[mode], problem, mode, seeds=(0, 2))
    assert code == 0, said


@pytest.mark.parametrize("problem", CONTROL)
def test_control(few_kernels, problem):
    """What the mutants run passes when nothing is mutated."""
    code, said = run(few_kernels["plain"], problem, "plain", seeds=range(4))
    assert code == 0, said


def test_refused_plan(all_kernels):
    """It is neither right nor wrong."""
    code, said = run(all_kernels, "forward float32 grid 3x1 0+0 1 1 2 1 8 8 dense", "plain")
    assert code == 2 and "no kernel has these tiles" in said


def notice(mutant, folder):
    """None if a mutant is noticed as it should be, else what was said of it."""
    (folder / "cuda").mkdir(parents=True)
    (folder / "cuda" / mutant.file).write_text(mutant.apply())
    everything = f"{mutant.file}, {mutant.name}:\n"
    for mode in OBSERVERS.get(mutant.sign, ["plain", "tsan"]):
        seeds = range(4) if mode == "plain" else (0,)
        program = link(mode, folder)
        code, said = run(program, mutant.problem, mode, seeds, patience=3)
        program.unlink()  # pytest keeps the folder
        if code and re.search(mutant.sign, said):
            return None
        everything += said
    return everything


def test_mutants_are_noticed(few_kernels, tmp_path):
    mutants = MUTANTS if os.environ.get("LSTM_EXT_ALL_MUTANTS") == "1" else USUAL
    folders = [tmp_path / str(i) for i in range(len(mutants))]
    with ThreadPoolExecutor(2) as pool:
        survivors = [said for said in pool.map(notice, mutants, folders) if said]
    assert not survivors, "\n\n".join(survivors)


def test_the_list_is_complete():
    """Every mutant still applies, and every synchronisation of the kernels has one."""
    for mutant in MUTANTS:
        mutant.apply()
    assert not list(uncovered())
