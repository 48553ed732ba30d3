"""Weights that stream from L2 ahead of their use, on a GPU. `pytest --device=cuda`."""

import device
import pytest
import torch
from device import here
from plans import grid_plan

import lstm_ext
from lstm_ext import ops
from lstm_ext.cuda.engine import FAMILIES, CudaEngine

pytestmark = pytest.mark.skipif(device.DEVICE.type != "cuda", reason="needs --device=cuda")

T, SHARED = 5, 1
# A pass, a tile, and the chunks that a warp then holds in registers.
TILES = [
    *((False, tile, held) for tile, held in (((4, 1), 2), ((4, 2), 2), ((4, 8), 0), ((8, 2), 0))),
    *((True, tile, held) for tile, held in (((1, 1), 8), ((1, 4), 8), ((2, 2), 4), ((2, 8), 0))),
]


class StepEngine(CudaEngine):
    """A launch a step, the first tile."""

    def choose(self, problem, where):
        plans = self.core.cuda_plans(problem, self.properties(where))
        return next(plan for plan in plans if FAMILIES[plan.family] == "step")


class StreamEngine(StepEngine):
    """One pass in a launch whose weights stream ahead."""

    backward, tile, in_l2, runs = False, (0, 0), 0, 0

    def choose(self, problem, where):
        if problem.backward != self.backward:
            return super().choose(problem, where)
        self.runs += 1
        plans = self.core.cuda_plans(problem, self.properties(where))
        return grid_plan(plans, self.tile, SHARED, ahead=True, in_l2=self.in_l2)


@pytest.mark.parametrize("in_l2", [0, 1, None], ids=["in_l2-none", "in_l2-one", "in_l2-all"])
@pytest.mark.parametrize("backward, tile, held", TILES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_bits_of_a_launch_a_step(monkeypatch, dtype, backward, tile, held, in_l2):
    """Several steps of two tiles of sequences; warps' chunks as many as are on their way and one
    more, or (8x2) three and four times as many."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    on_their_way = max(8 // tile[0], 1)
    streamed = (3 if tile == (8, 2) else 1) * on_their_way
    chunks = 8 * (held + SHARED + streamed) + 3
    H = chunks * (64 // dtype.itemsize) // (4 if backward else 1) - 1
    torch.manual_seed(0)
    module = here(lstm_ext.LSTM(3, H)).to(dtype)
    x = here(torch.randn(T, 8 * tile[1] + 3, 3)).to(dtype)
    hx = tuple(here(torch.randn(1, x.shape[1], H)).to(dtype).requires_grad_() for _ in range(2))
    core, results = ops._engines["cuda"].core, []
    stream = StreamEngine(core)
    stream.backward, stream.tile = backward, tile
    stream.in_l2 = streamed + 1 if in_l2 is None else in_l2
    for engine in (StepEngine(core), stream):
        monkeypatch.setitem(ops._engines, "cuda", engine)
        y, states = module(x, hx)
        loss = y.sum() + sum(state.square().sum() for state in states)
        results.append([y, *states, *torch.autograd.grad(loss, [*hx, *module.parameters()])])
    assert stream.runs
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)
