"""The CUDA LSTM kernels on the emulator, without Python: no race, no access out of bounds, right
results whatever the order; and that each of their precautions is needed, and would be missed.

A precaution is missed where its mutant (emulator/mutants.py) is noticed: by ThreadSanitizer, or in
a plain run with some seed; an overrun by AddressSanitizer. LSTM_EXT_ALL_MUTANTS=1 tries all of them
rather than one of each kind.
"""

import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from emulator.build import FLAGS, HERE, KERNELS, MODES, build, compiler, environment
from emulator.cluster_mutants import SPARE
from emulator.cluster_problems import (
    BACKWARD_TAGGED_LARGE,
    BACKWARD_TAGGED_SHARED,
    TAGGED_LARGE,
)
from emulator.mutant import BEYOND, OVERRUN, RACE
from emulator.mutants import CONTROL, MUTANTS, USUAL, uncovered

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux" or not shutil.which(compiler()[0]),
    reason="the emulator needs Linux on x86-64 and a C++ compiler",
)

ALL_MUTANTS = os.environ.get("LSTM_EXT_ALL_MUTANTS") == "1"
ENGINE = ["tests/emulator/lstm_driver.cpp", "tests/emulator/vendor.cpp"]
ENGINE += [
    *(f"csrc/cuda/{name}plan.cpp" for name in ("", "describe_", "resident_", "vendor_")),
    *(f"csrc/cuda/{name}.cu" for name in ("engine", "vendor_steps")),
]
FEW = ("few_kernels.cu", "few_cluster_kernels.cu")

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
    "forward tf32 grid 4x8 0+0 1 1 3 41 37 37 lengths",
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
    # Every tile of the clusters; groups that are not full, blocks without units, weights in shared
    # memory, and the element by element loads of backward (H no multiple of 16 bytes).
    "forward bfloat16 cluster 4x1 4+0 3 1 4 17 37 37 lengths",
    "forward float16 cluster 4x1 4+1 3 2 4 23 150 150 packed",
    "forward bfloat16 cluster 4x1 4+0 5 1 3 5 70 70 lengths",  # a sequence a group
    "forward float16 cluster 8x1 8+0 2 2 4 11 75 75 lengths",
    "forward bfloat16 cluster 8x1 8+1 1 1 3 2 500 500 dense",  # a block for each slice
    "forward bfloat16 cluster 8x2 8+0 1 2 4 11 75 75 lengths",
    "forward float16 cluster 8x2 8+1 2 1 3 25 270 270 dense",
    "forward float16 cluster 8x2 8+0 4 1 3 59 129 129 packed",
    "forward bfloat16 cluster 12x1 6+1 1 2 4 4 400 400 lengths",
    "forward float16 cluster 12x1 6+0 3 1 3 7 90 90 packed",
    "forward tf32 cluster 4x1 4+1 2 1 4 13 70 70 lengths",
    "forward tf32 cluster 4x1 4+0 2 2 4 15 37 37 packed",
    "forward tf32 cluster 8x1 8+2 3 1 3 24 300 300 dense",
    "forward tf32 cluster 8x1 8+0 3 1 3 9 131 131 lengths",
    "backward bfloat16 cluster 1x1 2+0 3 1 4 17 37 37 lengths",
    "backward bfloat16 cluster 1x2 2+0 2 2 4 23 150 150 packed",
    "backward float16 cluster 1x1 2+0 4 1 3 4 72 72 lengths",  # a sequence a group
    "backward float16 cluster 1x2 2+0 2 1 3 27 72 72 lengths",
    "backward float16 cluster 2x1 4+0 2 2 4 11 75 75 lengths",
    "backward float16 cluster 2x1 4+0 4 1 3 25 270 270 dense",
    "backward bfloat16 cluster 2x1 4+1 9 1 3 59 300 300 packed",
    "backward bfloat16 cluster 3x1 3+1 1 2 3 4 400 400 lengths",
    "backward float16 cluster 3x1 3+0 3 1 3 7 90 90 packed",
    "backward tf32 cluster 1x1 2+0 2 1 4 13 70 70 lengths",
    "backward tf32 cluster 1x1 2+0 2 2 4 15 37 37 packed",
    "backward tf32 cluster 2x1 2+1 3 1 3 24 300 300 dense",
    "backward tf32 cluster 2x1 2+0 3 1 3 9 131 131 lengths",
    # The family tagged: the clusters' cases, and more blocks than a cluster has.
    "forward float16 tagged 4x1 8+0 3 2 4 17 37 37 lengths",
    "forward bfloat16 tagged 4x1 8+0 5 1 3 5 300 300 packed",  # a sequence a group
    TAGGED_LARGE,
    "forward float16 tagged 8x1 8+0 2 2 4 11 75 75 lengths",
    "forward bfloat16 tagged 8x1 8+2 1 1 3 2 600 600 dense",
    "forward tf32 tagged 4x1 8+1 2 1 3 16 530 530 dense",
    "forward tf32 tagged 4x1 8+0 2 2 4 15 37 37 packed",
    "forward tf32 tagged 8x1 8+2 3 1 3 24 300 300 dense",
    "forward tf32 tagged 8x1 8+0 3 1 3 9 131 131 lengths",
    "backward float16 tagged 1x1 8+0 3 2 4 17 37 37 lengths",
    "backward bfloat16 tagged 1x1 8+0 5 1 3 5 300 300 packed",  # a sequence a group
    "backward float16 tagged 2x1 4+0 2 2 4 11 75 75 lengths",
    "backward bfloat16 tagged 2x1 4+1 1 1 3 7 600 600 dense",
    BACKWARD_TAGGED_SHARED,
    BACKWARD_TAGGED_LARGE,
    "backward tf32 tagged 1x1 4+0 2 2 4 15 37 37 packed",
    # A part of the steps a launch; both directions.
    "forward bfloat16 cluster 4x1 4+0 3 2 5 23 150 150 packed+parts",
    "forward float16 cluster 8x1 8+0 2 2 4 11 75 75 lengths+parts",
    "forward float16 cluster 8x2 8+0 2 1 5 25 131 131 lengths+parts",
    "forward tf32 cluster 8x1 8+0 2 1 3 9 131 131 lengths+parts",
    "forward bfloat16 cluster 12x1 6+1 1 2 7 4 400 400 dense+parts",
    "backward bfloat16 cluster 1x2 2+0 2 2 5 23 150 150 packed+parts",
    "backward float16 cluster 2x1 4+0 2 2 4 11 75 75 lengths+parts",
    "backward bfloat16 cluster 3x1 3+1 1 2 3 4 400 400 lengths+parts",
    "backward tf32 cluster 2x1 2+0 2 1 7 9 131 131 dense+parts",
    # Layer norm, several units a thread among them (H above 256), and with a projection.
    "forward float64 step 2x1 0+0 1 1 3 5 21 21 norm+lengths",
    "forward float32 step 4x2 0+0 1 1 2 3 300 300 norm",
    "forward tf32 step 2x4 0+0 1 2 3 19 37 18 norm+packed",
    "forward bfloat16 step 4x2 0+0 2 2 3 19 37 37 norm+packed",
    "forward float16 step 2x4 0+0 1 2 3 35 41 18 norm+lengths",
    "backward float64 step 1x1 0+0 1 1 3 5 21 21 norm+lengths",
    "backward float32 step 2x4 0+0 1 1 2 3 300 300 norm",
    "backward tf32 step 1x4 0+0 1 2 3 19 37 18 norm+packed",
    "backward bfloat16 step 1x4 0+0 2 2 3 19 37 37 norm+packed",
    "backward float16 step 2x4 0+0 1 2 3 35 41 18 norm+lengths",
    # The vendor's products: one and two blocks of units, one and several sequences a thread.
    "forward float64 vendor 0x0 0+0 7 1 4 7 21 21 lengths",
    "forward float32 vendor 0x0 0+0 1 2 3 5 300 300 packed",
    "forward tf32 vendor 0x0 0+0 3 2 3 7 261 261 lengths",
    "forward bfloat16 vendor 0x0 0+0 3 1 4 8 37 37 dense",
    "forward float16 vendor 0x0 0+0 2 2 3 9 70 70 packed",
    "forward float32 vendor 0x0 0+0 1 2 3 5 37 37 norm+lengths",
    "backward float64 vendor 0x0 0+0 7 1 4 7 21 21 lengths",
    "backward float32 vendor 0x0 0+0 1 2 3 5 300 300 packed",
    "backward tf32 vendor 0x0 0+0 3 2 3 7 261 261 lengths",
    "backward bfloat16 vendor 0x0 0+0 3 1 4 8 37 37 dense",
    "backward float16 vendor 0x0 0+0 2 2 3 9 70 70 packed",
    "backward bfloat16 vendor 0x0 0+0 1 2 3 5 37 37 norm+packed",
    # The smallest.
    "forward bfloat16 grid 2x1 0+1 1 1 2 1 1 1 dense",
    "forward float32 step 2x1 0+0 1 1 1 1 1 1 lengths",
    "backward bfloat16 step 1x1 0+0 1 1 1 1 1 1 dense",
    "backward float32 grid 1x1 0+0 1 1 2 1 1 1 lengths",
    "forward bfloat16 vendor 0x0 0+0 1 1 2 1 1 1 dense",
    "backward float32 vendor 0x0 0+0 1 1 2 1 1 1 lengths",
    "forward bfloat16 cluster 4x1 4+0 1 1 2 1 1 1 dense",
    "forward bfloat16 tagged 4x1 8+0 1 1 2 1 1 1 dense",
    "forward tf32 tagged 4x1 8+0 1 1 1 1 1 1 lengths",
    "backward bfloat16 cluster 1x1 2+0 1 1 2 1 1 1 lengths",
    "backward bfloat16 tagged 1x1 8+0 1 1 2 1 1 1 dense",
    "backward tf32 tagged 1x1 4+0 1 1 1 1 1 1 lengths",
    "forward float32 step 2x1 0+0 1 1 1 1 1 1 norm",
    "backward bfloat16 step 1x1 0+0 1 1 2 1 1 1 norm",
]
# For few_kernels.cu, besides CONTROL. T B / 8 blocks prepare a direction of backward: few, since a
# thread costs ThreadSanitizer half a millisecond.
SANITIZED = [
    "forward bfloat16 grid 2x1 4+1 2 1 3 17 21 21 lengths",
    "forward bfloat16 grid 4x8 0+0 1 1 3 35 37 37 packed",
    "forward bfloat16 grid 8x2 0+0 2 1 3 9 33 33 dense",  # tiles wider than a group
    "forward float32 grid 2x1 0+0 2 1 4 17 21 21 packed",
    "backward bfloat16 grid 2x2 4+1 1 1 2 17 37 37 lengths",
    "backward bfloat16 grid 2x8 0+1 1 1 2 33 37 37 lengths",
    "backward bfloat16 grid 1x1 8+1 1 1 3 7 37 37 lengths",  # kept after arrival
    "backward bfloat16 step 1x1 0+0 1 1 2 17 37 21 packed",
    "backward float32 grid 2x4 0+1 2 1 2 33 37 37 lengths",  # tiles wider than a group
    "backward float32 step 2x4 0+0 1 1 2 17 37 37 packed",
    "forward bfloat16 cluster 4x1 4+0 2 1 3 13 37 37 packed",  # a block without units
    "forward tf32 cluster 4x1 4+0 2 1 3 9 21 21 lengths",
    "forward bfloat16 tagged 4x1 8+0 2 1 3 13 37 37 packed",
    "backward bfloat16 cluster 1x2 2+0 1 1 3 13 37 37 packed",
    "backward tf32 cluster 2x1 2+0 1 2 3 5 35 35 packed",
    "backward bfloat16 tagged 1x1 8+0 2 1 3 13 37 37 packed",
    "forward bfloat16 cluster 4x1 4+0 2 1 4 13 37 37 packed+parts",
    "backward tf32 cluster 2x1 2+0 1 2 4 5 35 35 packed+parts",
    "forward bfloat16 vendor 0x0 0+0 3 2 3 7 37 37 packed",
    "forward float32 vendor 0x0 0+0 2 1 3 5 21 21 lengths",
    "backward bfloat16 vendor 0x0 0+0 3 2 2 7 37 37 packed",
    "backward float32 vendor 0x0 0+0 2 1 3 5 21 21 lengths",
    "forward bfloat16 step 2x1 0+0 1 1 2 3 37 37 norm+packed",
    "forward float32 step 2x1 0+0 1 1 2 3 21 18 norm+lengths",
    "backward bfloat16 step 1x1 0+0 1 1 2 3 37 37 norm",
    "backward float32 step 1x1 0+0 1 1 2 3 21 18 norm+lengths",
]
# Who notices most easily: the first that does is enough.
OBSERVERS = {RACE: ["tsan", "plain"], OVERRUN: ["asan"], BEYOND: ["asan"]}


def run(program, problem, mode, seeds=(0,), patience=60):
    """The exit code and what was said of a problem, or of several with " / " between them."""
    environ = environment(mode) | {"EMU_TIMEOUT_S": str(patience)}
    if mode == "tsan":  # not a second's sleep at the end
        environ["TSAN_OPTIONS"] += ":atexit_sleep_ms=0"
    words = " / ".join(" ".join([one, *map(str, seeds)]) for one in problem.split(" / "))
    done = subprocess.run(
        [program, *words.split()], env=environ, capture_output=True, text=True, timeout=300
    )
    return done.returncode, f"{problem} in {mode}:\n{done.stdout}{done.stderr}"


def compiled(source, mode, folder, arithmetic="all"):
    """An object of FEW's, headers in ``folder`` coming before those in csrc."""
    flags = [*FLAGS, "-iquote", str(folder), *(flag for part in MODES[mode] for flag in part)]
    flags.append(f"-DEMU_COMPILED=emu_{arithmetic}")
    result = folder / f"{source}.{mode}.o"
    command = [*compiler(), *flags, "-O0", "-g1", "-w", "-c", "-x", "c++", HERE / source]
    subprocess.run([*command, "-o", result], check=True)
    return result


def link(mode, folder, objects):
    """The driver with kernels."""
    library = build("liblstm_driver.so", ENGINE, mode, kind="shared")
    program = folder / f"lstm_driver.{mode}"
    flags = [flag for part in MODES[mode] for flag in part]
    command = [*compiler(), *flags, "-pthread", *objects, library, f"-Wl,-rpath,{library.parent}"]
    subprocess.run([*command, "-o", program], check=True)
    return program


@pytest.fixture(scope="module")
def all_kernels():
    return build("lstm_driver", ENGINE, kernels=KERNELS)


@pytest.fixture(scope="module")
def few_objects(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few_kernels")
    modes = ("plain", "tsan", "asan")
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda job: compiled(*job, folder), itertools.product(FEW, modes))
        objects = dict(zip(itertools.product(FEW, modes), made, strict=True))
    return {mode: {source: objects[source, mode] for source in FEW} for mode in modes}


@pytest.fixture(scope="module")
def few_kernels(few_objects, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drivers")
    return {mode: link(mode, folder, objects.values()) for mode, objects in few_objects.items()}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_results(all_kernels, problem):
    code, said = run(all_kernels, problem, "plain", seeds=range(4))
    assert code == 0, said


@pytest.mark.parametrize("mode", ["tsan", "asan"])
@pytest.mark.parametrize("first", range(0, len(CONTROL + SANITIZED), 10))
def test_sanitized(few_kernels, first, mode):
    """Ten in a process: the last that it names is the one that it stops at."""
    problems = (CONTROL + SANITIZED)[first : first + 10]
    code, said = run(few_kernels[mode], " / ".join(problems), mode, seeds=(0, 2))
    assert code == 0, said
    assert said.count("expected 0.0 us a step") == len(problems), "each has run"


@pytest.mark.parametrize("problem", [TAGGED_LARGE, BACKWARD_TAGGED_SHARED])
def test_no_overrun_with_weights_in_shared_memory(few_kernels, problem):
    """Of the family tagged, whose layers are then too large for ThreadSanitizer."""
    code, said = run(few_kernels["asan"], problem, "asan")
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


def mutated(mutant, mode, folder, few_objects):
    """The driver, whose kernels' headers are mutated."""
    (folder / "cuda").mkdir(parents=True, exist_ok=True)
    (folder / "cuda" / mutant.file).write_text(mutant.apply())
    _, arithmetic, family, *_ = mutant.problem.split()
    # What prepares a launch is with the kernels of the other families.
    prepares = mutant.file in ("forward.cuh", "backward.cuh")
    source = FEW[family in ("cluster", "tagged") and not prepares]
    own = compiled(source, mode, folder, arithmetic)  # half the time of all
    program = link(mode, folder, (few_objects[mode] | {source: own}).values())
    own.unlink()  # pytest keeps the folder
    return program


def notice(mutant, folder, few_objects):
    """None if a mutant is noticed as it should be, else what was said of it."""
    everything = f"{mutant.file}, {mutant.name}:\n"
    for mode in OBSERVERS.get(mutant.sign, ["plain", "tsan"]):
        seeds = range(4) if mode == "plain" else (0,)
        try:
            program = mutated(mutant, mode, folder, few_objects)
        except subprocess.CalledProcessError as error:
            return everything + f"it does not compile: {error}"
        code, said = run(program, mutant.problem, mode, seeds, patience=3)
        program.unlink()
        if code and re.search(mutant.sign, said):
            return None
        everything += said
    return everything


def test_mutants_are_noticed(few_objects, tmp_path):
    mutants = MUTANTS if ALL_MUTANTS else USUAL
    folders = [tmp_path / str(i) for i in range(len(mutants))]
    with ThreadPoolExecutor(2) as pool:
        notices = pool.map(notice, mutants, folders, itertools.repeat(few_objects))
        survivors = [said for said in notices if said]
    assert not survivors, "\n\n".join(survivors)


@pytest.mark.skipif(not ALL_MUTANTS, reason="only with LSTM_EXT_ALL_MUTANTS=1")
@pytest.mark.parametrize("mutant", SPARE, ids=lambda mutant: mutant.name)
def test_what_is_spare_is_spare(few_objects, tmp_path, mutant):
    for mode in ("plain", "tsan"):
        program = mutated(mutant, mode, tmp_path, few_objects)
        code, said = run(program, mutant.problem, mode, seeds=range(4))
        assert code == 0, said


def test_the_list_is_complete():
    """Every mutant still applies, and every synchronisation of the kernels has one."""
    for mutant in MUTANTS + SPARE:
        mutant.apply()
    assert not list(uncovered())
