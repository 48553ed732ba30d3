"""The families cluster and tagged on the emulator: every tile, at the edges of what they can have.

A result is as good as the step family's, which test_emulated_engine.py holds against nn.LSTM: its
error against the package's CPU engine in float64 is at most twice that one's, or one rounding.
"""

import copy
import math

import emulated
import pytest
import torch
from emulated import installed, only
from tolerances import TF32_EPS, assert_as_good
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_ext
from bench.plans import order_of_sums
from lstm_ext.cuda.engine import FAMILIES

pytestmark = pytest.mark.cpu_only(reason="the emulator runs on tensors of the CPU")

# dtype and its code, and whether float32 products run in TF32.
ARITHMETIC = {
    "tf32": (torch.float32, 1, True),
    "bfloat16": (torch.bfloat16, 2, False),
    "float16": (torch.float16, 3, False),
}
OUTPUTS = ("y", "h_n", "c_n", "cells")


@pytest.fixture(autouse=True)
def _tf32():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32 = before


class Layer:
    """A layer, its inputs, and gradients of some of its outputs.

    used: the outputs that have a gradient. states: whether h0 and c0 are to get one. ragged:
    lengths, one of them zero, and resets. packed: a PackedSequence. both: two directions.
    """

    def __init__(
        self,
        arithmetic,
        T,
        B,
        H,
        *,
        used=OUTPUTS,
        states=True,
        ragged=False,
        packed=False,
        batch_first=False,
        both=False,
    ):
        self.dtype, _, self.tf32 = ARITHMETIC[arithmetic]
        g = torch.Generator().manual_seed(1)

        def draw(*size):
            return torch.randn(*size, generator=g, dtype=torch.float64).to(self.dtype)

        torch.manual_seed(2)
        count = 2 if both else 1
        self.module = lstm_ext.LSTM(
            3, H, bidirectional=both, batch_first=batch_first, return_cell_sequence=True
        ).to(self.dtype)
        self.used, self.states, self.packed = used, states, packed
        self.x = draw(*((B, T, 3) if batch_first else (T, B, 3)))
        self.hx = draw(count, B, H), draw(count, B, H)
        self.lengths = torch.randint(1, T + 1, (B,), generator=g)
        self.ragged = {}
        if ragged:
            self.lengths[B // 2] = 0
            mask = torch.rand(self.x.shape[:2], generator=g) < 0.3
            self.ragged = {"lengths": self.lengths, "reset_mask": mask}

    def run(self, dtype=None):
        """Outputs and gradients by name. dtype: to run in; None: the layer's own."""
        dtype = dtype or self.dtype
        module = copy.deepcopy(self.module).to(dtype)
        leaves = {"x": self.x, "h0": self.hx[0], "c0": self.hx[1]}
        leaves = {name: t.to(dtype).requires_grad_() for name, t in leaves.items()}
        hx = leaves["h0"], leaves["c0"]
        if not self.states:
            hx = tuple(t.detach() for t in hx)
            del leaves["h0"], leaves["c0"]
        x = leaves["x"]
        if self.packed:
            x = pack_padded_sequence(x, self.lengths, module.batch_first, enforce_sorted=False)
        y, (h_n, c_n), cells = module(x, hx, **self.ragged)
        values = [t.data if isinstance(t, PackedSequence) else t for t in (y, h_n, c_n, cells)]
        results = dict(zip(OUTPUTS, values, strict=True))
        g = torch.Generator().manual_seed(3)
        cotangents = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in values]
        wanted = leaves | dict(module.named_parameters())
        chosen = [i for i, name in enumerate(OUTPUTS) if name in self.used]
        grads = torch.autograd.grad(
            [values[i] for i in chosen],
            list(wanted.values()),
            [cotangents[i].to(self.dtype).to(values[i].dtype) for i in chosen],
        )
        results |= {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}
        return {name: value.detach() for name, value in results.items()}


def check(layer, *, seed=0, family="cluster", **tiles):
    """Runs it on a family with these tiles."""
    with installed(only(family, **tiles), seed=seed, sm_count=66) as engine:
        ours = layer.run()
    assert [FAMILIES[plan.family] for plan in engine.picked] == [family, family]
    for plan, name in zip(engine.picked, ("forward", "backward"), strict=True):
        assert tiles.get(name) in (None, (plan.m_tiles, plan.n_tiles))
    with installed(only("step")):
        peer = layer.run()
    truth = layer.run(torch.float64)
    assert ours.keys() == truth.keys()
    for name in truth:
        assert_as_good(ours[name], peer[name], truth[name], name, TF32_EPS if layer.tf32 else None)
    return engine.picked


def tiles(family, backward):
    for arithmetic, (_, code, tf32) in ARITHMETIC.items():
        for m, n in emulated.all_tiles(family, code, tf32, backward):
            yield pytest.param(arithmetic, m, n, id=f"{arithmetic}-{m}x{n}")


@pytest.mark.parametrize("arithmetic, m, n", list(tiles("cluster", backward=False)))
def test_forward_tiles(arithmetic, m, n):
    """Three slices on four blocks, the last slice not full; two groups and more, the last not."""
    layer = Layer(arithmetic, T=3, B=8 * n + 3, H=8 * m + 3, ragged=True, both=True)
    forward, _ = check(layer, seed=2, forward=(m, n))
    assert (forward.slices, forward.cluster) == (3, 4) and forward.groups >= 2


@pytest.mark.parametrize("arithmetic, m, n", list(tiles("tagged", backward=False)))
def test_tagged_tiles(arithmetic, m, n):
    """The same, and a block for each slice."""
    layer = Layer(arithmetic, T=3, B=8 * n + 3, H=8 * m + 3, ragged=True, both=True)
    forward, _ = check(layer, seed=2, family="tagged", forward=(m, n))
    assert (forward.slices, forward.cluster) == (3, 0) and forward.groups >= 2


@pytest.mark.parametrize("arithmetic, m, n", list(tiles("cluster", backward=True)))
def test_backward_tiles(arithmetic, m, n):
    layer = Layer(arithmetic, T=3, B=8 * n + 3, H=32 * m + 3, ragged=True, both=True)
    _, backward = check(layer, seed=2, backward=(m, n))
    assert (backward.slices, backward.cluster) == (3, 4) and backward.groups >= 2


@pytest.mark.parametrize("arithmetic, m, n", list(tiles("tagged", backward=True)))
def test_tagged_backward_tiles(arithmetic, m, n):
    """The last slice has one unit, and so of two m-tiles one."""
    layer = Layer(arithmetic, T=4, B=8 * n + 3, H=32 * m + 1, ragged=True, both=True)
    _, backward = check(layer, seed=2, family="tagged", backward=(m, n))
    assert (backward.slices, backward.cluster) == (3, 0) and backward.groups >= 2


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "arithmetic, units",
    [("bfloat16", 48), ("bfloat16", 32), ("bfloat16", 16), ("tf32", 32), ("tf32", 16)],
)
def test_the_largest_layers(arithmetic, units, backward):
    """All blocks of a cluster of 16 are full; weights in registers and in shared memory."""
    tile = {"backward": (units // 16, 1)} if backward else {"forward": (units // 4, 1)}
    plan = check(Layer(arithmetic, T=2, B=2, H=16 * units), **tile)[backward]
    assert plan.slices == plan.cluster == 16


@pytest.mark.parametrize("units", [16, 32, 48])
@pytest.mark.parametrize("slices", [1, 4, 8])
def test_layers_one_unit_too_large(slices, units):
    """The last slice has one unit; 3 or 7 blocks have none, or the block before is full."""
    H = slices * units + 1
    picked = check(
        Layer("bfloat16", T=2, B=3, H=H), forward=(units // 4, 1), backward=(units // 16, 1)
    )
    for plan in picked:
        assert plan.slices == slices + 1 and plan.cluster == 2 * slices


@pytest.mark.parametrize("family", ["cluster", "tagged"])
@pytest.mark.parametrize("arithmetic", ["tf32", "bfloat16"])
@pytest.mark.parametrize("H", [1, 2, 4, 7, 12, 22, 40])
def test_sizes_of_a_vector(arithmetic, H, family):
    """H % 8: backward's weights by whole 16 bytes or by elements, in every alignment; what tagged
    blocks put past the last unit."""
    check(Layer(arithmetic, T=3, B=2, H=H), family=family, backward=(1, 1))


@pytest.mark.parametrize(
    "family, n, rows",
    [("cluster", 1, r) for r in range(1, 9)]
    + [("cluster", 2, 9), ("cluster", 2, 13)]
    + [("tagged", 1, r) for r in range(1, 9)],
)
def test_groups_that_are_not_full(family, n, rows):
    """Odd rows: half of the last pair of columns is not there."""

    def one_group(plans, problem):
        plan = next(p for p in plans if FAMILIES[p.family] == family and p.n_tiles == n)
        plan.groups, plan.group_rows = 1, rows
        return plan

    layer = Layer("bfloat16", T=3, B=rows, H=21)
    with installed(one_group):
        ours = layer.run()
    with installed(only("step")):
        peer = layer.run()
    truth = layer.run(torch.float64)
    for name in truth:
        assert_as_good(ours[name], peer[name], truth[name], name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ragged": True},
        {"ragged": True, "both": True, "batch_first": True},
        {"packed": True, "both": True},
        {"packed": True, "used": ("y",)},
        {"batch_first": True},
        {"states": False, "both": True},
        {"states": False, "ragged": True},
        {"used": ("y",)},
        {"used": ("h_n",), "ragged": True},
        {"used": ("c_n",)},
        {"used": ("cells",), "both": True, "ragged": True},
        {"used": ("y", "cells"), "states": False},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()) or "plain",
)
@pytest.mark.parametrize("family", ["cluster", "tagged"])
@pytest.mark.parametrize("arithmetic", ["tf32", "float16"])
def test_what_a_layer_can_have(arithmetic, options, family):
    check(Layer(arithmetic, T=4, B=5, H=37, **options), seed=3, family=family)


def test_more_steps_than_a_word_can_count():
    """In TF32 a word has 13 bits for its step."""
    torch.manual_seed(0)
    module, x = lstm_ext.LSTM(2, 17), torch.randn(8200, 1, 2)
    results = []
    for family in ("cluster", "tagged"):
        with installed(only(family, forward=(4, 1))) as engine, torch.no_grad():
            results.append(module(x)[0])
        assert [FAMILIES[plan.family] for plan in engine.picked] == [family]
    assert torch.equal(*results)


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, 1e30])
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_states_that_are_no_numbers(arithmetic, value):
    """They travel as any others: to every unit of their own sequence and to no other one."""
    dtype, _, _ = ARITHMETIC[arithmetic]
    module, x = lstm_ext.LSTM(2, 37).to(dtype), torch.randn(4, 3, 2).to(dtype)
    x[1, 1, 0] = value
    results = []
    for family in ("step", "tagged"):
        with installed(only(family)) as engine, torch.no_grad():
            results.append(module(x)[0])
        assert emulated.families_of(engine) == {family}
    assert torch.equal(results[0].isnan(), results[1].isnan())
    assert not results[1][:, ::2].isnan().any()
    assert results[1][1:, 1].isnan().all() == math.isnan(value)


@pytest.mark.parametrize("T", [2, 3, 4, 5])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_gradients_that_are_no_numbers(arithmetic, value, T):
    """Infinity stays infinity, whatever its step's words are marked with: all that it is multiplied
    with is positive here."""
    dtype, _, _ = ARITHMETIC[arithmetic]
    module = lstm_ext.LSTM(2, 37).to(dtype)
    with torch.no_grad():
        module.weight_hh_l0.abs_().clamp_(min=0.01)
        for bias in (module.bias_ih_l0, module.bias_hh_l0):
            bias.fill_(0.2)
    x, states = torch.zeros(T, 3, 2).to(dtype), torch.full((1, 3, 37), 0.5).to(dtype)
    dy = torch.zeros(T, 3, 37).to(dtype)
    dy[-1, 1, ::2] = value
    for family in ("step", "tagged"):
        h0 = states.clone().requires_grad_()
        with installed(only(family)) as engine:
            (made,) = torch.autograd.grad(module(x, (h0, states))[0], h0, dy)
        assert emulated.families_of(engine) == {family}
        assert not made[0, ::2].any()
        assert torch.equal(
            made[0, 1].nan_to_num(1, 2, 3), torch.full_like(made[0, 1], value).nan_to_num(1, 2, 3)
        )


# ---- bits


RESIDENT = ("cluster", "tagged")


def each_plan(layer, backward):
    """(engine, results) with every plan of a pass that keeps all weights, the other pass on
    clusters."""
    device = {"clusters": [6, 6, 6, 6, 6], "sm_count": 30}
    with installed(only("cluster"), **device) as engine:
        layer.run()
    _, code, tf32 = next(a for a in ARITHMETIC.values() if a[0] == layer.dtype)
    facts = {"dtype": code, "tf32": tf32, "backward": backward, "T": 2}
    facts |= {"B": layer.hx[0].size(1), "H": layer.hx[0].size(2)}
    count = sum(
        FAMILIES[p.family] in RESIDENT
        for p in engine.core.cuda_plans(emulated.problem(**facts), engine.properties(None))
    )
    for i in range(count):

        def pick(plans, problem, i=i):
            resident = [p for p in plans if FAMILIES[p.family] in RESIDENT]
            return resident[i if problem.backward == backward else 0]

        with installed(pick, seed=i % 4, **device) as engine:
            yield engine, layer.run()


@pytest.mark.parametrize("arithmetic", ["tf32", "bfloat16"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_bits_depend_on_few_things(backward, arithmetic):
    """Forward: on how many warps share a part of k, and whether a warp's few sums are made as two;
    backward: on the units of a block, and on how their parts travel. Else not on the number of
    sequences at once, nor on their grouping, nor on how h travels, nor on the schedule."""
    seen, count, families = {}, 0, set()
    for engine, results in each_plan(Layer(arithmetic, T=3, B=17, H=70), backward):
        plan = engine.picked[backward]
        key = order_of_sums(plan, backward)
        expected = seen.setdefault(key, results)
        assert all(torch.equal(results[name], expected[name]) for name in results), (
            engine.core.cuda_describe_plan(plan, emulated.problem(backward=backward))
        )
        count += 1
        families.add(FAMILIES[plan.family])
    assert count > 2 * len(seen) >= 4
    assert families == {"cluster", "tagged"}


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("family", RESIDENT)
def test_a_sequence_does_not_depend_on_the_others(family, arithmetic):
    """Neither on which there are, nor on their lengths: the values and its own gradients."""
    dtype = ARITHMETIC[arithmetic][0]
    module = lstm_ext.LSTM(3, 37, bidirectional=True).to(dtype)
    x, hx = torch.randn(4, 13, 3).to(dtype), torch.randn(2, 2, 13, 37).to(dtype)
    dy = torch.randn(4, 13, 74).to(dtype)

    def run(which, lengths):
        inputs = [x[:, which], hx[0][:, which], hx[1][:, which]]
        inputs = [t.contiguous().requires_grad_() for t in inputs]
        with installed(only(family, forward=(4, 1), backward=(1, 1)), sm_count=66) as engine:
            y, (h_n, c_n) = module(inputs[0], (inputs[1], inputs[2]), lengths=lengths[which])
            grads = torch.autograd.grad(y, inputs, dy[:, which])
        assert emulated.families_of(engine) == {family}
        return [y, h_n, c_n, *grads]

    lengths = torch.full((13,), 4)
    lengths[3:5] = 2
    whole = run(slice(0, 13), lengths)
    few = run(slice(3, 5), lengths)
    others = lengths.clone()
    others[:3], others[5:] = 1, 0
    for a, b, c in zip(whole, few, run(slice(0, 13), others), strict=True):
        assert torch.equal(a[:, 3:5], b)
        assert torch.equal(a[:, 3:5], c[:, 3:5])


# ---- where there are no clusters


@pytest.mark.parametrize(
    "T, proj, dtype",
    [(3, 0, torch.float64), (3, 0, torch.float32), (3, 5, torch.bfloat16), (1, 0, torch.bfloat16)],
)
def test_layers_without_clusters(T, proj, dtype):
    """Exact products, projections and single steps run on another family."""
    torch.backends.cudnn.allow_tf32 = False
    module = lstm_ext.LSTM(3, 21, proj_size=proj).to(dtype)
    with installed(only("cluster")) as engine:
        y, _ = module(torch.randn(T, 2, 3).to(dtype))
        y.sum().backward()
    assert len(engine.picked) == 2
    assert all(FAMILIES[plan.family] != "cluster" for plan in engine.picked)
