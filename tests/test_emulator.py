"""The emulator's own tests: every primitive, every misuse, under the sanitizers, from Python."""

import os
import platform
import re
import shutil
import subprocess
import sys

import pytest
from emulator.build import CACHE, HERE, ROOT, build, compiler, environment

from lstm_ext import _build

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux" or not shutil.which(compiler()[0]),
    reason="the emulator needs Linux on x86-64 and a C++ compiler",
)

PRIMITIVES = HERE / "test_primitives.cu"
LAUNCHES = HERE / "test_launches.cu"


@pytest.fixture(scope="module", params=["plain", "tsan", "asan"])
def mode(request):
    return request.param


@pytest.fixture(scope="module")
def primitives(mode):
    return build("test_primitives", [PRIMITIVES], mode)


def run(program, *arguments, mode, seed=0, patience=60):
    environ = environment(mode) | {"SEED": str(seed), "EMU_TIMEOUT_S": str(patience)}
    return subprocess.run(
        [program, *arguments], env=environ, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("seed", range(4))
def test_primitives(primitives, mode, seed):
    done = run(primitives, mode=mode, seed=seed)
    assert done.returncode == 0, done.stdout + done.stderr


def test_launches(mode):
    done = run(build("test_launches", [LAUNCHES], mode), mode=mode)
    assert done.returncode == 0, done.stdout + done.stderr


# What the emulator says of each. Where a race is named last, TSan must see it.
MISUSE = {
    "uninitialised": "used before it is initialised",
    "too-many-arrivals": "more arrivals than the phase expects",
    "overrun": "access past the end of block 0's dynamic shared memory",
    "bad-rank": "map to rank 1 of a cluster of 1",
    "arrive-only": "thread ends between cluster_arrive and cluster_wait",
    "divergent": "31 spin .* 1 at __syncthreads",
    "deadlock": "deadlock in block 0: of 1 live threads 1 spin",
    "misaligned-matrix": "ldmatrix: row address .* is not 16-byte aligned",
    "misaligned-store": "st.async: .* is not aligned to 16 bytes",
    "stack-overflow": "stack overflow",
    "null-pointer": "block 0 thread 0: access to .*, which is no shared memory",
    "no-wait": "more arrivals than the phase expects",
    "no-free": "deadlock|tx-count|data race",
    # The block that is written to early has not begun, or has, and has not got so far.
    "no-init-sync": "does not run|used before it is initialised",
    "no-end-sync": "data race|does not run",
    "no-expect": "deadlock|data race",
    "send-at-end": "remote stores .* still on their way",
    "copies-too-early": "FAIL|data race",
    "copies-unseen": "FAIL|data race",
    "grid-forever": "deadlock",
    "grid-no-wait": "FAIL|data race",
    "grid-early": "FAIL|data race",
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse(primitives, mode, case):
    if case == "send-at-end" and mode == "tsan":
        pytest.skip("stores arrive at once under TSan")
    if case == "copies-unseen" and mode != "tsan":
        pytest.skip("only TSan knows what a copy sees")
    done = run(primitives, case, mode=mode, patience=2)
    assert done.returncode != 0
    expected = MISUSE[case]
    if mode == "tsan" and "|data race" in expected:
        expected = "data race"
    assert re.search(expected, done.stdout + done.stderr), done.stdout + done.stderr


@pytest.mark.parametrize("mode", ["plain", "asan"])
def test_from_python(mode):
    """As a library in a process of its own, whose exit must be clean."""
    library = build("libtest_launches.so", [LAUNCHES], mode, kind="shared")
    script = f"import ctypes, sys; sys.exit(ctypes.CDLL({str(library)!r}).main())"
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", script],
        env=environment(mode, preload=True),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_is_built_twice(tmp_path):
    source = tmp_path / "program.cu"
    source.write_text("int main() { return 7; }")
    program = build("test_rebuild", [source])
    before = program.stat().st_mtime_ns
    assert build("test_rebuild", [source]).stat().st_mtime_ns == before
    source.write_text("int main() { return 8; }")
    assert subprocess.run([build("test_rebuild", [source])]).returncode == 8
    source.write_text("int main() { return }")
    with pytest.raises(RuntimeError, match="error"):
        build("test_rebuild", [source])


def test_primitives_compile_for_a_device():
    toolkit = _build.find_toolkit(os.environ)
    if toolkit is None:
        pytest.skip("needs nvcc")
    CACHE.mkdir(parents=True, exist_ok=True)
    command = [toolkit / "bin" / "nvcc", "-std=c++17", "-arch=sm_90a", f"-I{ROOT / 'csrc'}"]
    command += ["-c", PRIMITIVES, "-o", CACHE / "test_primitives.device.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
