"""h that travels through L2 in words that carry their step, on a GPU. `pytest --device=cuda`."""

import device
import pytest
import torch
from device import here
from tolerances import TF32_EPS, assert_as_good

import lstm_ext
from lstm_ext import ops
from lstm_ext.cuda_engine import FAMILIES, CudaEngine

pytestmark = pytest.mark.skipif(
    device.DEVICE.type != "cuda" or torch.cuda.get_device_capability() < (9, 0),
    reason="needs --device=cuda, and Hopper or later",
)


class OfFamily(CudaEngine):
    """Forward on a family, with tiles and, if there is such a plan, groups of so many sequences;
    backward as the engine has it."""

    family, tile, rows, picked = "step", None, None, None

    def choose(self, problem, where):
        if problem.backward:
            return super().choose(problem, where)
        plans = [
            plan
            for plan in self.core.cuda_plans(problem, self.properties(where))
            if FAMILIES[plan.family] == self.family
            and self.tile in (None, (plan.m_tiles, plan.n_tiles))
            and self.rows in (None, plan.group_rows)
        ]
        assert plans, f"no plan of {self.family}"
        self.picked = plans[0]
        return self.picked


def run(monkeypatch, module, inputs, family, tile=None, rows=None):
    engine = OfFamily(ops._engines["cuda"].core)
    engine.family, engine.tile, engine.rows = family, tile, rows
    with monkeypatch.context() as patch:
        patch.setitem(ops._engines, "cuda", engine)
        y, states = module(*inputs)
    assert engine.picked is not None
    return [y, *states]


def problem(dtype, T, B, H, **options):
    torch.manual_seed(0)
    module = here(lstm_ext.LSTM(3, H, **options)).to(dtype)
    count = 2 if options.get("bidirectional") else 1
    hx = tuple(here(torch.randn(count, B, H)).to(dtype) for _ in range(2))
    return module, (here(torch.randn(T, B, 3)).to(dtype), hx)


@pytest.fixture(autouse=True)
def _tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize("tile, H", [((4, 1), 250), ((8, 1), 512), ((8, 1), 331)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_bits_of_a_cluster(monkeypatch, dtype, tile, H, rows, bidirectional):
    """Of the same tile; over many steps, so that blocks run ahead of each other."""
    module, inputs = problem(dtype, 500, rows + 1, H, bidirectional=bidirectional)
    with torch.no_grad():
        expected = run(monkeypatch, module, inputs, "cluster", tile)
        for _ in range(3):
            made = run(monkeypatch, module, inputs, "tagged", tile, rows)
            assert all(map(torch.equal, made, expected))


LARGE = [(768, 1), (768, 16), (1000, 4), (1024, 1), (1024, 16)]
LARGER = [(1536, 4), (2048, 8)]  # not in TF32


@pytest.mark.parametrize(
    "dtype, H, B",
    [(torch.float32, *size) for size in LARGE]
    + [(dtype, *size) for dtype in (torch.bfloat16, torch.float16) for size in LARGE + LARGER],
    ids=str,
)
def test_layers_larger_than_a_cluster(monkeypatch, dtype, H, B):
    """As good as a launch a step, and the same bits every time."""
    module, inputs = problem(dtype, 60, B, H)
    with torch.no_grad():
        made = run(monkeypatch, module, inputs, "tagged", (4, 1))
        assert all(map(torch.equal, made, run(monkeypatch, module, inputs, "tagged", (4, 1))))
        peer = run(monkeypatch, module, inputs, "step")
        x, hx = inputs
        y, states = module.double()(x.double(), tuple(t.double() for t in hx))
    for name, *tensors in zip(("y", "h_n", "c_n"), made, peer, [y, *states], strict=True):
        assert_as_good(*tensors, name, TF32_EPS if dtype == torch.float32 else None)


@pytest.mark.parametrize("dtype, steps", [(torch.float32, 20000), (torch.bfloat16, 70000)], ids=str)
def test_more_steps_than_a_word_can_count(monkeypatch, dtype, steps):
    """A word has 13 bits for its step in TF32, 16 else."""
    module, inputs = problem(dtype, steps, 2, 64)
    with torch.no_grad():
        expected = run(monkeypatch, module, inputs, "cluster", (4, 1))
        made = run(monkeypatch, module, inputs, "tagged", (4, 1))
    assert all(map(torch.equal, made, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lengths_resets_and_training(monkeypatch, dtype):
    """Gradients of what it keeps are those of what a cluster keeps."""
    module, (x, hx) = problem(dtype, 40, 11, 300, bidirectional=True)
    lengths = here(torch.randint(0, 41, (11,)))
    reset = here(torch.rand(40, 11) < 0.1)

    def called(*inputs):
        return module(*inputs, lengths=lengths, reset_mask=reset)

    results = []
    for family in ("cluster", "tagged"):
        outputs = run(monkeypatch, called, (x, hx), family, (8, 1))
        loss = sum(output.float().square().sum() for output in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, list(module.parameters()))])
    assert all(map(torch.equal, *results))
