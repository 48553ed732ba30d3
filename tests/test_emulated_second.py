"""Second derivatives on the CUDA kernels: what tests/test_second.py, which runs on them with
--device=emulated, does not ask."""

import pytest
import torch
from emulated import installed, load
from second_order import Problem, assert_near, by_layer, by_reference, make_steps

import lstm_ext

pytestmark = pytest.mark.cpu_only(reason="the emulator runs on tensors of the CPU")


@pytest.mark.parametrize("proj", [0, 70], ids=["plain", "proj"])
@pytest.mark.parametrize("kind", ["both", "packed"])
def test_several_blocks(kind, proj):
    """Units and sequences of more than one block, rows of no whole chunks."""
    problem = Problem(make_steps(kind, 4, 7), 5, 90, proj, 2)
    expected = problem.second(by_reference)
    with installed(seed=3):
        assert_near(problem.second(by_layer), expected)


def test_without_the_vendor_s_library(ways):
    problem = Problem(make_steps("lengths", 4, 3), 3, 5)
    expected = problem.second(by_reference)
    with installed() as engine:
        engine._use_vendor(False)
        assert_near(problem.second(by_layer), expected)
    assert set(ways) == {"torch"}


def test_no_hidden_units():
    with installed(), pytest.raises(ValueError, match="has hidden units, got 0"):
        lstm_ext.LSTMCell(3, 0)(torch.randn(2, 3))


REFUSED = [(2, {}, "float32 and float64"), (1, {"H": 0}, "got 0")]


@pytest.mark.parametrize("dtype, size, error", REFUSED)
def test_what_the_core_refuses(dtype, size, error):
    core = load()
    steps = core.Steps(
        T=1, B=1, rows=1, stride_t=1, stride_b=1, offsets=0, lengths=0, reset=0, reverse=False
    )
    facts = {"tf32": False, "device": 0, "stream": 0, "steps": steps, "H": 4, "P": 4}
    second = core.CudaSecond(dtype=dtype, **(facts | size), gates=0, c_seq=0, c0=0)
    names = "gates gates_after gates_first h_more w_hh w_hr c0 state c_seq cell_out y y_stride"
    with pytest.raises(ValueError, match=error):
        core.cuda_tangents(second, 0, **dict.fromkeys([*names.split(), "h_n", "c_n"], 0))
