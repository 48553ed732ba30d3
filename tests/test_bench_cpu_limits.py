"""The limits of processors: what is measured, and the time that a call cannot do without."""

import pytest
import torch

from bench import cpu_limits, gpu_limits, roofline
from bench.__main__ import main
from bench.suites import Problem, square

pytestmark = pytest.mark.cpu_only(reason="of the processor")

LIMITS = {
    "threads": 2,
    "vector_bits": 512,
    "cache_bytes": {"L1": 1000, "L2": 10_000, "L3": 100_000},
    "gflops": {"float32": {"1": 1.0, "2": 2.0}},
    "gb_per_s": {
        "L1": {"1": 8.0, "2": 16.0},
        "L2": {"1": 4.0, "2": 8.0},
        "L3": {"1": 1.0, "2": 2.0},
        "memory": {"1": 0.5, "2": 1.0},
    },
}


def test_what_is_measured():
    """Every figure is there, and all threads together are not slower than half of one."""
    limits = cpu_limits.measure(2, seconds=0.002, repeats=2)
    assert "error" not in limits, limits
    assert limits["vector_bits"] in (128, 256, 512)
    assert list(limits["gb_per_s"])[-1] == "memory"
    assert set(limits["gb_per_s"]) == {*limits["cache_bytes"], "memory"}
    for values in (*limits["gflops"].values(), *limits["gb_per_s"].values()):
        assert set(values) == {"1", "2"}
        assert all(value > 0.1 for value in values.values())
    printed = "\n".join(cpu_limits.table(limits))
    assert "multiply-adds in float32" in printed and "reads from memory" in printed


def test_a_round_trip():
    """Longer than two reads of the first-level cache, shorter than a time slice."""
    assert 1 < cpu_limits.round_trip() < 1e6


def test_the_same_library_is_not_compiled_twice(monkeypatch):
    cpu_limits.compiled()
    monkeypatch.setattr(cpu_limits.subprocess, "run", None)
    assert cpu_limits.compiled().bits_of_a_vector() in (128, 256, 512)


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cpu_limits, "ROOT", tmp_path)
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    assert "no-such-compiler" in cpu_limits.measure(1)["error"]
    assert main(("limits", "--threads", "1")) == 1
    assert "were not measured: " in capsys.readouterr().out
    monkeypatch.setenv("CXX", "false")
    assert "false failed" in cpu_limits.measure(1)["error"]


def test_buffers_lie_in_their_level():
    sizes = cpu_limits.buffer_sizes({"L1": 32, "L2": 1000, "L3": 4000}, 2)
    assert sizes == {"L1": 16, "L2": 516, "L3": 1500, "memory": cpu_limits.MEMORY}
    # A share of the last level that is no larger than the one below cannot be told from it.
    assert set(cpu_limits.buffer_sizes({"L1": 32, "L2": 1000, "L3": 4000}, 4)) == {
        *("L1", "L2", "memory")
    }


@pytest.mark.parametrize(
    "size, seconds",
    [
        (2_000, 2_000 / 16e9),  # both cores' L1
        (20_000, 2_000 / 16e9 + 18_000 / 8e9),
        (100_000, 2_000 / 16e9 + 18_000 / 8e9 + 80_000 / 2e9),
        (101_000, 2_000 / 16e9 + 18_000 / 8e9 + 80_000 / 2e9 + 1_000 / 1e9),
    ],
)
def test_reading_takes_each_part_from_the_nearest_level(size, seconds):
    assert roofline.read_seconds(LIMITS, size) == pytest.approx(seconds)


# By hand for T 3, B 2, I 5, H 7: a step has 2·(2·4·7·7) = 784 flop of the recurrence, 392 ns at
# 2 GFLOP/s; it reads 4·7·7·4 = 784 bytes in 49 ns, at B 1 still less than its 196 ns.
@pytest.mark.parametrize(
    "problem, mode, seconds",
    [
        (Problem(3, 2, 5, 7), "inference", 6 * 672 / 2e9),  # all of it at the peak
        (Problem(3, 2, 5, 7), "training", 3 * 6 * 672 / 2e9),
        (Problem(3, 2, 5, 7, lengths=(1, 3)), "inference", 4 * 672 / 2e9),
        # 4·50·50·4 = 40,000 bytes: 2,000 of L1, 18,000 of L2, 20,000 of L3 take 12.375 µs a step,
        # its 20,000 flop 10 µs. Besides, 20,000 a row of the input.
        (square(3, 1, 50), "inference", 3 * 12.375e-6 + 3 * 10e-6),
        # Once more backward, and the four products of gradients (two of them of the weights).
        (square(3, 1, 50), "training", 2 * 3 * 12.375e-6 + 4 * 3 * 10e-6),
        # Twice both, and eight more products.
        (square(3, 1, 50), "second", 4 * 3 * 12.375e-6 + 8 * 3 * 10e-6),
        (square(3, 1, 50, bidirectional=True), "inference", 2 * (3 * 12.375e-6 + 3 * 10e-6)),
        (Problem(3, 2, 5, 7, proj_size=2), "inference", 6 * 420 / 2e9),
    ],
    ids=str,
)
def test_what_a_call_cannot_do_without(problem, mode, seconds):
    assert roofline.bound(problem, mode, "float32", LIMITS) == pytest.approx(seconds)


def test_half_types():
    problem = square(3, 1, 50)
    assert roofline.recurrent_bytes(problem, "bfloat16") == 20_000
    # No products of bfloat16: the peak of float32, with half the bytes. 18,000 of L2: 2.375 µs.
    expected = 3 * 10e-6 + 3 * 10e-6
    assert roofline.bound(problem, "inference", "bfloat16", LIMITS) == pytest.approx(expected)
    faster = {**LIMITS, "gflops": {**LIMITS["gflops"], "bfloat16": {"1": 5.0, "2": 20.0}}}
    expected = 3 * 2.375e-6 + 3 * 1e-6
    assert roofline.bound(problem, "inference", "bfloat16", faster) == pytest.approx(expected)


def test_without_a_peak_there_is_no_bound():
    assert roofline.bound(square(3, 1, 50), "inference", "float64", LIMITS) is None
    assert roofline.bound(square(3, 1, 50), "inference", "float32", {"error": "x"}) is None


def test_threads_of_the_command(capsys):
    with pytest.raises(SystemExit) as caught:
        main(("limits", "--threads", "0"))
    assert caught.value.code == 2
    assert "expected 1 or more, got 0" in capsys.readouterr().err


def test_a_gpus_limits_are_measured_with_torch(capsys):
    """On the CPU here: what is called, and that TF32 is left as it was."""
    before = torch.backends.cuda.matmul.allow_tf32
    limits = gpu_limits.measure(torch.bfloat16, torch.device("cpu"), size=64, repeats=1)
    assert torch.backends.cuda.matmul.allow_tf32 == before
    assert limits["gflops"]["bfloat16"]["1"] > 0 and limits["copy_gb_per_s"] > 0
    assert "products of large matrices in bfloat16" in "\n".join(gpu_limits.table(limits))
    # The arithmetic alone: 6·672 flop.
    limits["gflops"]["bfloat16"]["1"] = 2.0
    seconds = roofline.bound(Problem(3, 2, 5, 7), "inference", "bfloat16", limits)
    assert seconds == pytest.approx(6 * 672 / 2e9)
