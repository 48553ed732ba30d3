"""What travels through L2 in words that carry their step, on a GPU. `pytest --device=cuda`."""

import contextlib

import device
import pytest
import torch
from device import here
from tolerances import TF32_EPS, assert_as_good

import lstm_ext
from lstm_ext import ops
from lstm_ext.cuda.engine import FAMILIES, CudaEngine

pytestmark = pytest.mark.skipif(
    device.DEVICE.type != "cuda" or torch.cuda.get_device_capability() < (9, 0),
    reason="needs --device=cuda, and Hopper or later",
)


class OfFamily(CudaEngine):
    """Passes on families, with tiles and, if there is such a plan, groups of so many sequences: the
    first that fits. families, tiles: of (forward, backward); None: as the engine has it, any."""

    families, tiles, rows = ("step", None), (None, None), None

    def choose(self, problem, where):
        family, tile = self.families[problem.backward], self.tiles[problem.backward]
        if family is None:
            return super().choose(problem, where)
        plans = [
            plan
            for plan in self.core.cuda_plans(problem, self.properties(where))
            if FAMILIES[plan.family] == family
            and tile in (None, (plan.m_tiles, plan.n_tiles))
            and self.rows in (None, plan.group_rows)
        ]
        assert plans, f"no plan of {family}"
        self.picked.add((problem.backward, family))
        return plans[0]


@contextlib.contextmanager
def running(monkeypatch, forward, backward=None, *, tiles=(None, None), rows=None):
    engine = OfFamily(ops._engines["cuda"].core)
    engine.families, engine.tiles, engine.rows = (forward, backward), tiles, rows
    engine.picked = set()
    with monkeypatch.context() as patch:
        patch.setitem(ops._engines, "cuda", engine)
        yield
    assert engine.picked >= {(i > 0, f) for i, f in enumerate((forward, backward)) if f}


def run(monkeypatch, module, inputs, family, tile=None, rows=None):
    with running(monkeypatch, family, tiles=(tile, None), rows=rows):
        y, states = module(*inputs)
    return [y, *states]


def train(
    monkeypatch,
    module,
    inputs,
    forward,
    backward,
    tiles=(None, None),
    rows=None,
    *,
    states=True,
    **options,
):
    """Outputs and gradients of all that has one. states: whether h0 and c0 are to get one."""
    x, hx = inputs
    leaves = [x.detach().requires_grad_(), *(t.detach().requires_grad_(states) for t in hx)]
    with running(monkeypatch, forward, backward, tiles=tiles, rows=rows):
        y, (h_n, c_n) = module(leaves[0], (leaves[1], leaves[2]), **options)
        loss = sum(output.square().sum() for output in (y, h_n, c_n))
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        grads = torch.autograd.grad(loss, [*wanted, *module.parameters()])
    return [y.detach(), h_n.detach(), c_n.detach(), *grads]


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
    """As good as a launch a step, and the same bits every time; training too."""
    module, inputs = problem(dtype, 60, B, H)
    tagged = ("tagged", "tagged", ((4, 1), (1, 1)))
    made = train(monkeypatch, module, inputs, *tagged)
    assert all(map(torch.equal, made, train(monkeypatch, module, inputs, *tagged)))
    peer = train(monkeypatch, module, inputs, "step", "step")
    x, hx = inputs
    doubles = x.double(), tuple(t.double() for t in hx)
    truth = train(monkeypatch, module.double(), doubles, None, None)
    for i, tensors in enumerate(zip(made, peer, truth, strict=True)):
        assert_as_good(*tensors, str(i), TF32_EPS if dtype == torch.float32 else None)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize(
    "dtype, tile, H",
    [(torch.float32, (1, 1), 250)]
    + [
        (dtype, *case)
        for dtype in (torch.bfloat16, torch.float16)
        for case in (((1, 1), 250), ((2, 1), 512), ((2, 1), 331))
    ],
    ids=str,
)
def test_gradients_beside_a_clusters(monkeypatch, dtype, tile, H, rows, bidirectional):
    """Over many steps, so that blocks run ahead of each other: as good, and always the same."""
    module, inputs = problem(dtype, 300, rows + 1, H, bidirectional=bidirectional)
    tiles = (None, tile)
    made = train(monkeypatch, module, inputs, "cluster", "tagged", tiles, rows)
    for _ in range(3):
        again = train(monkeypatch, module, inputs, "cluster", "tagged", tiles, rows)
        assert all(map(torch.equal, made, again))
    peer = train(monkeypatch, module, inputs, "cluster", "cluster", tiles)
    x, hx = inputs
    doubles = x.double(), tuple(t.double() for t in hx)
    truth = train(monkeypatch, module.double(), doubles, None, None)
    for i, tensors in enumerate(zip(made, peer, truth, strict=True)):
        assert_as_good(*tensors, str(i), TF32_EPS if dtype == torch.float32 else None)


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
    options = {"lengths": lengths, "reset_mask": reset}
    results = [
        train(monkeypatch, module, (x, hx), family, "cluster", ((8, 1), None), **options)
        for family in ("cluster", "tagged")
    ]
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("steps", [2, 3, 41, 42, 43, 44])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_backward_of_all_kinds(monkeypatch, dtype, states, ragged, steps):
    """Any last step, with and without a gradient of h0, which is a step more."""
    module, (x, hx) = problem(dtype, steps, 11, 300, bidirectional=True)
    options = {}
    if ragged:
        options["lengths"] = here(torch.randint(0, steps + 1, (11,)))
        options["reset_mask"] = here(torch.rand(steps, 11) < 0.1)
    options["states"] = states
    tiles = (None, (1, 1))
    made = train(monkeypatch, module, (x, hx), "cluster", "tagged", tiles, **options)
    peer = train(monkeypatch, module, (x, hx), "cluster", "step", **options)
    doubles = x.double(), tuple(t.double() for t in hx)
    truth = train(monkeypatch, module.double(), doubles, None, None, **options)
    for i, tensors in enumerate(zip(made, peer, truth, strict=True)):
        assert_as_good(*tensors, str(i), TF32_EPS if dtype == torch.float32 else None)
