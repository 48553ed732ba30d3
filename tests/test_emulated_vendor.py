"""The vendor family on the emulator: loops stand in for the library's products.

test_emulated_engine.py has what it shares with the other families.
"""

import pytest
import torch
from emulated import installed, only
from test_emulated_clusters import Layer
from test_emulated_engine import ARITHMETIC, Problem, assert_same_bits
from tolerances import TF32_EPS, assert_as_good, tol
from variants import VARIANTS

import lstm_ext
from lstm_ext.cuda.engine import FAMILIES

pytestmark = pytest.mark.cpu_only(reason="the emulator runs on tensors of the CPU")


@pytest.fixture(autouse=True)
def _tf32():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def grouped(groups, rows):
    """A pick: the vendor family, with blocks for so many sequences."""

    def pick(plans, problem):
        plan = only("vendor")(plans, problem)
        plan.groups, plan.group_rows = groups, rows
        return plan

    return pick


def families(engine):
    return [FAMILIES[plan.family] for plan in engine.picked]


@pytest.mark.parametrize("H", [21, 300])
@pytest.mark.parametrize("arithmetic", ["float64", "float32"])
def test_exact_products(arithmetic, H):
    """Two directions, lengths, resets, every gradient; one block of units, and one and a part."""
    dtype, torch.backends.cudnn.allow_tf32 = ARITHMETIC[arithmetic]
    problem = Problem(T=4, B=7, H=H, dtype=dtype)
    with installed(only("step")):
        expected = problem.run()
    with installed(only("vendor"), seed=2) as engine:
        got = problem.run()
    assert families(engine) == ["vendor"] * 2
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **tol(dtype))


@pytest.mark.parametrize("layout", ["padded", "packed", "batch_first"])
@pytest.mark.parametrize("arithmetic", ["tf32", "bfloat16", "float16"])
def test_rounded_products(arithmetic, layout):
    """As good as the step family's, which test_emulated_engine.py holds against nn.LSTM."""
    torch.backends.cudnn.allow_tf32 = True
    layer = Layer(
        arithmetic,
        T=4,
        B=7,
        H=270,
        ragged=layout != "packed",
        packed=layout == "packed",
        batch_first=layout == "batch_first",
        both=True,
    )
    with installed(only("vendor"), seed=2) as engine:
        ours = layer.run()
    assert families(engine) == ["vendor"] * 2
    with installed(only("step")):
        peer = layer.run()
    truth = layer.run(torch.float64)
    for name in truth:
        assert_as_good(ours[name], peer[name], truth[name], name, TF32_EPS if layer.tf32 else None)


@pytest.mark.parametrize("used", [("y",), ("h_n",), ("c_n",), ("cells",)], ids=str)
@pytest.mark.parametrize("states", [False, True])
def test_gradients_of_a_part(used, states):
    """Gradients that are not there are zeros; dh0 takes a step of its own, if it is wanted."""
    layer = Layer("bfloat16", T=3, B=5, H=40, used=used, states=states, ragged=True)
    with installed(only("vendor")):
        ours = layer.run()
    with installed(only("step")):
        peer = layer.run()
    truth = layer.run(torch.float64)
    assert ("dh0" in ours) == states
    for name in truth:
        assert_as_good(ours[name], peer[name], truth[name], name)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, training):
    module = lstm_ext.LSTM(3, 21, bidirectional=True, **VARIANTS[name], dtype=torch.float64)
    module.train(training)
    x, dy = torch.randn(4, 5, 3, dtype=torch.float64), torch.randn(4, 5, 42, dtype=torch.float64)
    lengths = torch.tensor([4, 2, 0, 3, 4])
    results = []
    for family in ("step", "vendor"):
        torch.manual_seed(3)  # of the masks
        with installed(only(family)) as engine:
            leaf = x.clone().requires_grad_()
            y, (h_n, c_n) = module(leaf, lengths=lengths)
            grads = torch.autograd.grad(
                [y, h_n, c_n],
                [leaf, *module.parameters()],
                [dy, torch.ones_like(h_n), torch.ones_like(c_n)],
            )
        assert families(engine) == [family] * 2
        results.append([y.detach(), h_n.detach(), c_n.detach(), *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **tol(torch.float64))


@pytest.mark.parametrize("arithmetic", ["float64", "bfloat16"])
def test_the_bits_do_not_depend_on_the_blocks(arithmetic):
    problem = Problem(T=3, B=11, H=300, dtype=ARITHMETIC[arithmetic][0])
    results = []
    # One has blocks without a sequence.
    for groups, rows in ((11, 1), (6, 2), (5, 3), (1, 11), (4, 11)):
        with installed(grouped(groups, rows), seed=groups % 4) as engine:
            results.append(problem.run())
        assert families(engine) == ["vendor"] * 2
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_is_left_in_memory_is_not_read(dtype, poisoned):
    """Scratch begins as NaN, the products' own ends so too. H: rows of a product have padding."""
    problem = Problem(T=3, B=5, H=37, dtype=dtype)
    with installed(only("vendor")) as engine:
        results = problem.run()
    assert families(engine) == ["vendor"] * 2
    assert all(value.isfinite().all() for value in results)


def test_a_plain_layer_in_one_call():
    """There the recurrence's scratch is a piece of a larger one; the same plans serve both ways."""
    module, x = lstm_ext.LSTM(5, 40), torch.randn(6, 4, 5)
    results = []
    with installed(only("vendor")) as engine:
        assert engine.plain is not None
        for plain in (engine.plain, None):
            engine.plain = plain
            y, _ = module(x)
            results.append([y.detach(), *torch.autograd.grad(y.sum(), list(module.parameters()))])
    assert families(engine) == ["vendor"] * 2
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **tol(torch.float32))


@pytest.mark.parametrize("T, proj", [(1, 0), (3, 5)])
def test_layers_of_other_families(T, proj):
    """Single steps and projections."""
    module = lstm_ext.LSTM(3, 21, proj_size=proj)
    with installed(only("vendor")) as engine:
        module(torch.randn(T, 2, 3))[0].sum().backward()
    assert len(engine.picked) == 2 and "vendor" not in families(engine)
