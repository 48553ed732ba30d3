"""The CUDA engine on the emulator: every kernel of the families step and grid, all dtypes, several
schedules; test_emulated_clusters.py and test_emulated_vendor.py have the other families.

`pytest --device=emulated` runs the whole suite this way; here are the kernels one by one.
"""

import contextlib
import functools

import emulated
import pytest
import torch
from cases import HALF, Case, compare
from emulated import families_of, installed, only
from plans import fetching, grid_plan
from tolerances import tol

import lstm_ext
from lstm_ext.cuda import engine as cuda_engine
from lstm_ext.cuda.precision import products_in
from lstm_ext.layer import lstm_layer
from lstm_ext.ops import Direction, LayerWeights
from lstm_ext.steps import Steps

pytestmark = pytest.mark.cpu_only(reason="the emulator runs on tensors of the CPU")

# dtype, and for float32 whether its products run in TF32.
ARITHMETIC = {
    "float64": (torch.float64, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
}
SCALAR = ("float64", "float32")
FAMILIES = cuda_engine.FAMILIES
# What gives the same bits whatever the plan. Those that keep all weights have no exact products.
PAIR = FAMILIES[:2]
RESIDENT = ("cluster", "tagged")
KINDS = [(f, a) for f in FAMILIES for a in ARITHMETIC if f not in RESIDENT or a not in SCALAR]


@pytest.fixture(autouse=True)
def _tf32():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def tiles(backward):
    """(arithmetic, tile) of every kernel of a pass, one arithmetic for those that share tiles."""
    for arithmetic, code in (("float32", 1), ("bfloat16", 2)):
        for tile in emulated.all_tiles("step", code, False, backward):
            yield pytest.param(arithmetic, tile, id=f"{arithmetic}-{tile[0]}x{tile[1]}")


class Problem:
    """A layer with everything at once: two directions, lengths, resets, gradients of all."""

    def __init__(self, T, B, H, I=3, P=0, dtype=torch.float64):
        g = torch.Generator().manual_seed(1)

        def draw(*size):
            return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)

        self.module = lstm_ext.LSTM(I, H, bidirectional=True, proj_size=P).to(dtype)
        self.x, self.h0, self.c0 = draw(T, B, I), draw(2, B, P or H), draw(2, B, H)
        self.lengths = torch.randint(0, T + 1, (B,), generator=g)
        self.reset_mask = torch.rand(T, B, generator=g) < 0.3
        self.cotangents = draw(T, B, 2 * (P or H)), draw(2, B, P or H), draw(2, B, H)

    def run(self):
        """Outputs and gradients of the inputs and the weights."""
        inputs = [t.clone().requires_grad_() for t in (self.x, self.h0, self.c0)]
        y, states = self.module(
            inputs[0], (inputs[1], inputs[2]), lengths=self.lengths, reset_mask=self.reset_mask
        )
        outputs = [y, *states]
        grads = torch.autograd.grad(
            outputs, inputs + list(self.module.parameters()), self.cotangents
        )
        return [t.detach() for t in outputs] + list(grads)


def assert_same_bits(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("arithmetic, tile", list(tiles(backward=False)))
@pytest.mark.parametrize("family", PAIR)
def test_forward_tiles(family, arithmetic, tile):
    """Every kernel gives the bits of every other: k is summed in one order, whatever the tiles."""
    m, n = tile
    # Two tiles of sequences and a part, two slices of units and a part.
    problem = Problem(T=3, B=16 * n + 3, H=8 * m + 3, dtype=ARITHMETIC[arithmetic][0])
    with installed(only("step")), torch.no_grad():
        expected = problem.module(problem.x)[0]
    for stream in (False, True):
        with installed(only(family, forward=tile, stream=stream), seed=2) as engine:
            with torch.no_grad():
                assert torch.equal(problem.module(problem.x)[0], expected)
            (plan,) = engine.picked
            assert (FAMILIES[plan.family], plan.m_tiles, plan.n_tiles) == (family, *tile)


@pytest.mark.parametrize("arithmetic, tile", list(tiles(backward=True)))
@pytest.mark.parametrize("family", PAIR)
def test_backward_tiles(family, arithmetic, tile):
    m, n = tile
    problem = Problem(T=3, B=16 * n + 3, H=32 * m + 3, dtype=ARITHMETIC[arithmetic][0])
    with installed(only("step")):
        expected = problem.run()
    for stream in (False, True):
        with installed(only(family, backward=tile, stream=stream), seed=2) as engine:
            assert_same_bits(problem.run(), expected)
            plan = engine.picked[-1]
            assert (FAMILIES[plan.family], plan.m_tiles, plan.n_tiles) == (family, *tile)


# A tile, and numbers of chunks in shared memory around those whose loads a warp has on their way at
# once: forward, backward.
KEPT = (
    (False, (2, 1), 2),
    (False, (4, 1), 6),
    *((False, (4, 2), n) for n in (4, 5)),
    (False, (4, 4), 2),
    *((False, tile, 1) for tile in ((4, 8), (8, 1), (8, 2))),
    *((True, (1, 1), n) for n in (6, 16, 19)),
    *((True, (2, 1), n) for n in (8, 9)),
    *((True, tile, n) for tile in ((1, 2), (2, 2)) for n in (1, 6)),
    *((True, tile, 3) for tile in ((1, 4), (2, 4))),
    (True, (2, 8), 1),
)
NOT_HELD = ((4, 8), (8, 1), (8, 2), (2, 8))


@pytest.mark.parametrize(
    "arithmetic, backward, tile, shared",
    [("tf32", *kept) for kept in KEPT]
    + [("bfloat16", False, (4, 2), 1), ("bfloat16", True, (1, 4), 1)]
    + [("float32", False, (2, 4), 1), ("float32", True, (1, 4), 1)],
)
def test_weights_in_registers_in_shared_memory_and_streamed(arithmetic, backward, tile, shared):
    """A warp has chunks of each kind, and warps differ by one."""
    dtype, torch.backends.cudnn.allow_tf32 = ARITHMETIC[arithmetic]
    held = 0 if arithmetic in SCALAR or tile in NOT_HELD else {1: 8, 2: 4, 4: 2}[tile[0]]
    chunk = 32 if dtype in HALF else 16
    # Streamed: a batch and a part of one, or less where a product is long for its blocks; and as
    # many as are on their way ahead at least.
    ahead = max(8 // tile[0], 1)
    streamed = max(5 if backward else 1, 0 if arithmetic in SCALAR else ahead)
    chunks = 8 * (held + shared + streamed) + 3
    H = chunks * chunk // (4 if backward else 1) - 1

    def mixed(plans, problem, ahead=False, in_l2=0):
        if problem.backward != backward:
            return only("step")(plans, problem)
        kept = min(shared, 16 // tile[0]) if ahead else shared  # there is room
        return grid_plan(plans, tile, kept, ahead=ahead, in_l2=in_l2)

    module = lstm_ext.LSTM(3, H).to(dtype).requires_grad_(backward)
    # Two tiles of sequences, some in the last.
    x = torch.randn(3 if backward else 2, 8 * tile[1] + 3, 3).to(dtype)
    picks = [only("step"), mixed]
    if not backward and tile in ((4, 4), (8, 2)):  # two rounds
        picks.append(lambda *of: fetching(mixed(*of), True))
        picks.append(lambda *of: fetching(mixed(*of), False))
    if arithmetic not in SCALAR:
        picks.append(functools.partial(mixed, ahead=True, in_l2=1))
    results = []
    for pick in picks:
        with installed(pick, sm_count=200) as engine:
            y, _ = module(x)
            results.append([y.detach()])
            if backward:
                results[-1] += torch.autograd.grad(y.sum(), list(module.parameters()))
        plan = engine.picked[backward]
        assert FAMILIES[plan.family] == ("step" if pick is picks[0] else "grid")
        if pick is mixed:
            assert (plan.held, plan.shared) == (held, shared)
    assert plan.ahead == (arithmetic not in SCALAR)
    K = engine.core.cuda_padded(4 * H if backward else H, 2 if dtype in HALF else 1)
    assert K == chunks * chunk
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800000], ids=["nan", "-nan", "inf"])
@pytest.mark.parametrize("family", ["step", "grid", "cluster"])
def test_weights_that_are_no_numbers(family, bits):
    """TF32 rounds by an addition to the bits, which would make zero of a GPU's own NaN."""
    torch.backends.cudnn.allow_tf32 = True
    weight = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    module = lstm_ext.LSTM(3, 37)
    with torch.no_grad():
        module.weight_hh_l0[0, 5] = weight  # of gate i of unit 0
    x = torch.randn(2, 3, 3)
    with installed(only(family)):
        y, _ = module(x)
        grads = torch.autograd.grad(y.sum(), [module.weight_ih_l0, module.weight_hh_l0])
    expected, _ = torch.nn.LSTM.forward(module, x)
    assert y.isnan().any() and torch.equal(y.isnan(), expected.isnan())
    assert all(grad.isnan().any() for grad in grads)


@pytest.mark.parametrize("family, arithmetic", KINDS)
def test_every_schedule_gives_the_same_bits(family, arithmetic):
    """No result depends on the order in which blocks and warps run."""
    dtype, tf32 = ARITHMETIC[arithmetic]
    torch.backends.cudnn.allow_tf32 = tf32
    problem = Problem(T=4, B=11, H=45, dtype=dtype)
    results = []
    for seed in range(4):
        with installed(only(family), seed=seed, sm_count=12) as engine:
            results.append(problem.run())
        assert families_of(engine) == {family}
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize(
    "family, dtype",
    [(f, d) for f in (*PAIR, "vendor") for d in (torch.float64, torch.float32, *HALF)]
    + [(f, d) for f in RESIDENT for d in HALF],
)
@pytest.mark.parametrize(
    "T, B, H, proj", [(1, 1, 1, 0), (5, 9, 37, 0), (3, 17, 64, 0), (4, 5, 20, 7)]
)
def test_same_as_torch(family, dtype, T, B, H, proj):
    with installed(only(family)):
        compare(Case(T=T, B=B, I=6, H=H, proj=proj, dtype=dtype, bidirectional=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_tf32_rounds_both_factors(family):
    """The recurrence's factors are rounded to 11 bits, ties away from zero, and nothing else."""

    def rounded(t):
        bits = t.detach().view(torch.int32) + 0x1000
        return (bits & ~0x1FFF).view(torch.float32)

    torch.backends.cudnn.allow_tf32 = True
    module = lstm_ext.LSTM(3, 21, bias=False)
    h0, c0 = torch.randn(1, 5, 21), torch.randn(1, 5, 21)
    x = torch.zeros(2, 5, 3)
    exact = lstm_ext.LSTM(3, 21, bias=False)
    exact.load_state_dict({k: rounded(v) for k, v in module.state_dict().items()})
    with torch.no_grad(), installed(only(family)) as engine:
        ours = module(x, (h0, c0))[0]
    assert FAMILIES[engine.picked[0].family] == family
    with torch.no_grad():
        first, (h1, c1) = exact(x[:1], (rounded(h0), c0))
        second = exact(x[1:], (rounded(h1), c1))[0]
        plain = module(x, (h0, c0))[0]
    torch.testing.assert_close(ours, torch.cat([first, second]), rtol=5e-6, atol=5e-6)
    assert ((ours - plain).abs().amax((1, 2)) > 2e-5).all()


def test_the_setting_of_cudnn_decides_about_tf32():
    module, x = lstm_ext.LSTM(8, 40), torch.randn(6, 3, 8)
    with torch.no_grad(), installed():
        exact = module(x)[0]
        torch.backends.cudnn.allow_tf32 = True
        assert cuda_engine.lstm_uses_tf32()
        assert not torch.equal(module(x)[0], exact)
        torch.backends.cudnn.allow_tf32 = False
        assert torch.equal(module(x)[0], exact)


@pytest.fixture
def matmul_precision():
    matmul = torch.backends.cuda.matmul
    yield matmul
    torch.backends.fp32_precision = "none"
    matmul.fp32_precision = "none"


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("before", ["tf32", "ieee", "none"])
def test_products_leave_the_users_precision(matmul_precision, before, wanted):
    matmul_precision.fp32_precision = before
    products = products_in(torch.float32, wanted)
    with contextlib.suppress(ZeroDivisionError), products:
        assert (matmul_precision.fp32_precision == "tf32") == wanted
        raise ZeroDivisionError
    assert matmul_precision.fp32_precision == before


def test_products_of_two_threads(matmul_precision):
    """The second to enter leaves last: the user's setting comes back then."""
    first, second = (products_in(torch.float32, True) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert matmul_precision.fp32_precision == "tf32"
    second.__exit__()
    assert matmul_precision.fp32_precision == "none"
    with products_in(torch.bfloat16, True):  # has no choice, and touches nothing
        assert matmul_precision.fp32_precision == "none"


def test_an_inherited_precision_stays_inherited(matmul_precision):
    torch.backends.fp32_precision = "tf32"
    assert matmul_precision.fp32_precision == "tf32"
    with products_in(torch.float32, False):
        assert matmul_precision.fp32_precision == "ieee"
    assert matmul_precision.fp32_precision == "tf32"
    torch.backends.fp32_precision = "ieee"
    assert matmul_precision.fp32_precision == "ieee"


@pytest.mark.parametrize("T, B", [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_do(T, B):
    module = lstm_ext.LSTM(3, 5, dtype=torch.float64)
    x = torch.randn(T, B, 3, dtype=torch.float64, requires_grad=True)
    hx = [torch.randn(1, B, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    results = []
    for context in (contextlib.nullcontext(), installed()):
        with context:
            y, (h_n, c_n) = module(x, hx)
            loss = y.sum() + 2 * h_n.sum() + 3 * c_n.sum()
            grads = torch.autograd.grad(
                loss, [x, *hx, *module.parameters()], materialize_grads=True
            )
        results.append([y, h_n, c_n, *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **tol(torch.float64))


def test_old_devices_have_kernels_too():
    """Turing: no bf16 or TF32 on its tensor cores, 64 KB of shared memory, 40 multiprocessors."""
    for dtype in HALF:
        with installed(major=7, minor=5, sm_count=40, shared_bytes=64 << 10) as engine:
            compare(Case(T=4, B=20, I=3, H=50, dtype=dtype))
        assert all(plan.shared_bytes <= 64 << 10 for plan in engine.picked)


def test_a_launch_that_fails_is_an_exception():
    """Here: a cooperative grid that does not fit; the text is CUDA's own."""
    module, x = lstm_ext.LSTM(4, 64), torch.randn(3, 2, 4)
    core = emulated.load()
    with torch.no_grad(), installed(only("grid")):
        core.set_device(1, 227 << 10)
        try:
            with pytest.raises(RuntimeError, match="launching the recurrence: too many blocks"):
                module(x)
        finally:
            core.set_device(132, 227 << 10)
        module(x)  # the error is not left behind


def test_a_plan_that_does_not_fit_is_refused():
    def broken(plans, problem):
        plan = plans[0]
        plan.slices -= 1
        return plan

    with (
        installed(broken),
        pytest.raises(ValueError, match="slices do not cover .*forward float32"),
    ):
        lstm_ext.LSTM(4, 64)(torch.randn(3, 2, 4))


def test_verbose_tells_the_plan(monkeypatch, capfd):
    monkeypatch.setenv("LSTM_EXT_VERBOSE", "1")
    with torch.no_grad(), installed(only("grid")):
        lstm_ext.LSTM(4, 64)(torch.randn(3, 2, 4))
        lstm_ext.LSTM(4, 64)(torch.randn(3, 2, 4))  # once a shape
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert "forward float32 B 2 H 64 P 64, 1 direction: one cooperative launch" in said[0]


def test_lengths_stay_on_the_device(monkeypatch):
    """Neither pass reads a length or a mask back: that would wait for a GPU.

    Values on the CPU are checked there when Steps is made, which is before.
    """
    weights = LayerWeights(torch.randn(20, 3, requires_grad=True), torch.randn(20, 5))
    zero = torch.zeros(6, 5)
    directions = [Direction(zero, zero, weights, reverse) for reverse in (False, True)]
    lengths, mask = torch.randint(0, 5, (6,)), torch.rand(4, 6) < 0.5
    steps = Steps.padded(4, 6, lengths=lengths, reset_mask=mask)
    with installed():
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero"):
            monkeypatch.setattr(torch.Tensor, name, _refuse(name))
        layer = lstm_layer(torch.randn(24, 3), directions, steps, cells=True)
        layer.y.sum().backward()
    assert weights.w_ih.grad is not None


def _refuse(name):
    def read(*args, **kwargs):
        raise AssertionError(f"Tensor.{name} waits for the device")

    return read
