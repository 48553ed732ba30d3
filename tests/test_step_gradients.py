"""The gradients of a cell's weights, of all steps of a graph in few products."""

import threading

import pytest
import torch
from device import leaf
from kept_steps import rows_kept
from torch import nn
from torch._dynamo import compiled_autograd
from torch.utils.checkpoint import checkpoint

import lstm_ext
from lstm_ext import native, plain, step_gradients

pytestmark = pytest.mark.cpu_only(reason="the CPU engine keeps what its steps are to give")
T, B, I, H = 6, 3, 100, 96
F64 = torch.float64


@pytest.fixture
def kept(monkeypatch):
    """A list with an entry for each step that was kept: its rows."""
    return rows_kept(monkeypatch)


def twins(dtype=F64, kind="LSTMCell", **options):
    theirs = getattr(nn, kind)(I, H, dtype=dtype, **options)
    return getattr(lstm_ext, kind)(I, H, dtype=dtype, **options), theirs.requires_grad_()


def loop(cell, x, between=lambda states: states):
    """The sum of squares of what a cell makes of (T, ...)."""
    states, total = None, 0
    for step in x:
        states = cell(step, states)
        total = total + states[0].square().sum()
        states = between(states)
    return total


def gradients(loss, cell, **options):
    return torch.autograd.grad(loss, list(cell.parameters()), **options)


def both(run, cells, **tolerance):
    ours, theirs = cells
    theirs.load_state_dict(ours.state_dict())
    for got, expected in zip(run(ours), run(theirs), strict=True):
        torch.testing.assert_close(got, expected, **tolerance)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(T, B, I), (T, I)])
def test_a_loop(shape, bias, kept):
    x = torch.randn(shape, dtype=F64)
    both(lambda cell: gradients(loop(cell, x), cell), twins(bias=bias))
    assert len(kept) == T - 1, "the first step does not know that there are more"


@pytest.mark.parametrize("most_rows", [1, 7, 1024])
def test_products_meanwhile(most_rows, kept, monkeypatch):
    monkeypatch.setattr(step_gradients, "MOST_ROWS", most_rows)
    x = torch.randn(T, B, I, dtype=F64)
    both(lambda cell: gradients(loop(cell, x), cell), twins())
    assert len(kept) == T - 1


def squares(states):
    return tuple(s * 0.9 for s in states)


def chosen(states):
    return tuple(torch.where(torch.ones(B, 1).bool(), s, 0 * s) for s in states)


class Inner(torch.autograd.Function):
    """A backward within backward."""

    run = None

    @staticmethod
    def forward(ctx, h):
        return h.clone()

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            Inner.run()
        return grad


@pytest.mark.parametrize("between", [squares, chosen])
def test_operations_between_steps(between, kept):
    x = torch.randn(T, B, I, dtype=F64)
    both(lambda cell: gradients(loop(cell, x, between), cell), twins())
    assert len(kept) == T - 1


def branches(cell, x):
    a = cell(x[0])
    b, c = cell(x[1], a), cell(x[2], a)
    d, e = cell(x[3], b), cell(x[4], c)
    return gradients(cell(x[5], (d[0] + e[0], d[1] - e[1]))[0].square().sum(), cell)


def twice(cell, x):
    loss = loop(cell, x)
    return gradients(loss, cell, retain_graph=True) + gradients(loss, cell)


def second(cell, x):
    first = gradients(loop(cell, x), cell, create_graph=True)
    return gradients(sum(g.square().sum() for g in first), cell)


def one_of_them(cell, x):
    loss, every = loop(cell, x), list(cell.parameters())
    return [torch.autograd.grad(loss, [w], retain_graph=True)[0] for w in every]


def frozen(cell, x):
    cell.weight_ih.requires_grad_(False)
    cell.bias_hh.requires_grad_(False)
    loop(cell, x).backward()
    assert cell.weight_ih.grad is None and cell.bias_hh.grad is None
    return [cell.weight_hh.grad, cell.bias_ih.grad]


def frozen_for_a_step(cell, x):
    states, total = None, 0
    for t, step in enumerate(x):
        cell.weight_ih.requires_grad_(t != 3)
        states = cell(step, states)
        total = total + states[0].square().sum()
    cell.weight_ih.requires_grad_()
    return gradients(total, cell)


def hooks(cell, x):
    seen = []

    def hook(grad):
        seen.append(grad)
        return 2 * grad

    handles = [w.register_hook(hook) for w in cell.parameters()]
    loop(cell, x).backward()
    for handle in handles:
        handle.remove()
    assert len(seen) == 4, "once for each parameter"
    return [w.grad for w in cell.parameters()]


def within_another(cell, x):
    """Inner.run takes a graph of its own at each step of backward."""
    inner = []
    Inner.run = staticmethod(lambda: inner.append(gradients(loop(cell, x[:3]), cell)))
    outer = gradients(loop(cell, x, lambda s: (Inner.apply(s[0]), s[1])), cell)
    assert inner
    return [*outer, *inner[0], *inner[-1]]


def after_an_error(cell, x):
    def fail():
        raise ValueError

    Inner.run = staticmethod(fail)
    with pytest.raises(ValueError):
        loop(cell, x, lambda s: (Inner.apply(s[0]), s[1])).backward()
    return gradients(loop(cell, x), cell)


def steps_of_checkpoints(cell, x):
    return gradients(
        loop(lambda *call: checkpoint(cell, *call, use_reentrant=False), x),
        cell,
    )


def loops_of_checkpoints(cell, x):
    return gradients(checkpoint(lambda t: loop(cell, t), x, use_reentrant=False), cell)


def other_dtype(cell, x):
    """The parameters have other data afterwards, of another dtype."""
    before = gradients(loop(cell, x), cell)
    cell.float()
    after = gradients(loop(cell, x.float()), cell)
    cell.double()
    return [*before, *(g.double() for g in after)]


def anomalies(cell, x):
    with torch.autograd.detect_anomaly(check_nan=True):
        return gradients(loop(cell, x), cell)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize(
    "run, steps",
    [
        (branches, 5),
        (twice, 10),
        (second, 5),
        (one_of_them, 20),
        (frozen, 5),
        (frozen_for_a_step, 4),
        (hooks, 5),
        (within_another, None),
        (after_an_error, None),
        (steps_of_checkpoints, 5),
        (loops_of_checkpoints, 5),
        (other_dtype, 10),
        (anomalies, 0),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_graphs(run, steps, kept):
    """steps: how many are kept; a second derivative, and where each gradient is looked at, keeps
    none; nor does the first step of some weights."""
    x = torch.randn(T, B, I, dtype=F64)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if run is other_dtype else {}
    both(lambda cell: run(cell, x), twins(), **tolerance)
    assert kept if steps is None else len(kept) == steps


def test_threads(kept):
    cell, _ = twins()
    x = torch.randn(4, T, B, I, dtype=F64)
    found = [None] * 4

    def run(k):
        found[k] = gradients(loop(cell, x[k]), cell)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(4):
        torch.testing.assert_close(found[k], gradients(loop(cell, x[k]), cell), rtol=0, atol=0)


def test_gradient_of_x_alone(kept):
    x = leaf(torch.randn(T, B, I, dtype=F64))
    both(lambda cell: torch.autograd.grad(loop(cell, x), [x]), twins())


def test_few_weights_are_not_worth_it(kept):
    cell = lstm_ext.LSTMCell(8, 8)
    loop(cell, torch.randn(T, B, 8)).backward()
    assert not kept


def test_two_gradients_of_biases(kept):
    cell, _ = twins()
    loop(cell, torch.randn(T, B, I, dtype=F64)).backward()
    before = cell.bias_ih.grad.clone()
    cell.bias_hh.grad.zero_()
    assert kept and torch.equal(cell.bias_ih.grad, before)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("shape", [(T, B, I), (T, I)])
def test_steps_of_a_module(shape, layers, kept):
    x = torch.randn(shape, dtype=F64)

    def run(module):
        states, total = None, 0
        for step in x:
            y, states = module(step[None], states)
            total = total + y.square().sum()
        return gradients(total, module)

    both(run, twins(kind="LSTM", num_layers=layers))
    assert len(kept) == layers * (T - 1)


def test_that_gradient_can_only_be_added():
    step = step_gradients.Kept(torch.randn(B, 4 * H), torch.randn(B, I), torch.randn(B, H))
    kept = step_gradients.KeptSteps(step_gradients.cell_products, step, B, [True] * 4 + [False])
    assert repr(kept) == "KeptSteps(rows=3)"
    with pytest.raises(NotImplementedError, match="for autograd to add up, got aten.mul"):
        kept * 2


LOOKS = {
    "norm": lambda g: g.norm(),
    "nan": lambda g: g.isnan().any() or (g != g).any(),
    "largest": lambda g: g.abs().max().item(),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_hooks_on_nodes(look, kept):
    """As of one who walks a graph for its first NaN."""
    x, seen = torch.randn(T, B, I, dtype=F64), []

    def run(cell):
        loss = loop(cell, x)
        nodes, every = [loss.grad_fn], set()
        for node in nodes:
            if node not in every:
                every.add(node)
                node.register_hook(
                    lambda *both: seen.extend(look(g) for t in both for g in t if g is not None)
                )
                nodes += [before for before, _ in node.next_functions if before is not None]
        return gradients(loss, cell)

    both(run, twins())
    assert kept and seen


@pytest.mark.parametrize("of", ["weights", "x", "autocast"])
def test_gradients_in_batches(of, kept):
    ours, theirs = twins(torch.float32 if of == "autocast" else F64)
    theirs.load_state_dict(ours.state_dict())
    x = leaf(torch.randn(T, B, I, dtype=ours.weight_hh.dtype))

    def run(cell, batched):
        states, losses = None, []
        with torch.autocast("cpu", torch.bfloat16, enabled=of == "autocast"):
            for step in x:
                states = cell(step, states)
                losses.append(states[0].float().sum() if of == "autocast" else states[0].sum())
        wanted = [x] if of == "x" else list(cell.parameters())
        losses, flags = torch.stack(losses), torch.eye(T, dtype=x.dtype)
        if batched:
            return torch.autograd.grad(losses, wanted, flags, is_grads_batched=True)
        each = [torch.autograd.grad(losses, wanted, f, retain_graph=True) for f in flags]
        return [torch.stack(g) for g in zip(*each, strict=True)]

    options = {"rtol": 2e-2, "atol": 2e-2} if of == "autocast" else {}
    torch.testing.assert_close(list(run(ours, True)), run(ours, False), **options)
    if of != "autocast":
        torch.testing.assert_close(list(run(ours, True)), run(theirs, False))


@pytest.mark.parametrize("change", ["number", "memory"])
def test_what_is_read_later_changed_meanwhile(change, kept):
    """By a hook, between a step's backward and the products of all steps."""
    cell, _ = twins()
    later = torch.randn(B, I, dtype=F64)

    def change_later(grad):
        if change == "number":
            later.zero_()
        else:
            later.untyped_storage().resize_(0)

    states = None
    for k, step in enumerate([*torch.randn(2, B, I, dtype=F64), later]):
        states = cell(step, states)
        if k == 1:
            states[0].register_hook(change_later)
    with pytest.raises(RuntimeError, match="an input or a state of an lstm_ext cell"):
        states[0].sum().backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_autograd(backend, kept):
    x = torch.randn(T, B, I, dtype=F64)

    def run(cell):
        cell.zero_grad()
        loss = loop(cell, x)
        with compiled_autograd._enable(torch.compile(backend=backend)):
            loss.backward()
        return [w.grad for w in cell.parameters()]

    both(run, twins())


def test_weights_cut_off_meanwhile():
    """They are the same tensors, and others to autograd."""
    ours, theirs = twins()
    x = torch.randn(T, B, I, dtype=F64)

    def run(cell):
        weights = {name: w * 1 for name, w in cell.named_parameters()}
        states, total = None, 0
        for t, step in enumerate(x):
            if t == 3:
                for w in weights.values():
                    w.detach_().requires_grad_()
            states = torch.func.functional_call(cell, weights, (step, states))
            total = total + states[0].square().sum()
        return torch.autograd.grad(total, [*cell.parameters(), *weights.values()])

    both(run, (ours, theirs))


def test_another_function_s_attributes():
    class Other(torch.autograd.Function):
        @staticmethod
        def forward(ctx, c):
            ctx.cell_weights = (1, 2)
            return c * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    x = torch.randn(T, B, I, dtype=F64)
    both(lambda cell: gradients(loop(cell, x, lambda s: (s[0], Other.apply(s[1]))), cell), twins())


def test_states_of_a_wide_graph(monkeypatch):
    looked = []
    monkeypatch.setattr(
        step_gradients,
        "getattr",
        lambda *args: looked.append(args) or getattr(*args),
        raising=False,
    )
    cell, _ = twins()
    rows = [torch.randn(H, dtype=F64, requires_grad=True) * 1 for _ in range(200)]
    c = torch.stack([torch.stack(rows)[k] for k in range(200)])
    cell(torch.randn(200, I, dtype=F64), (torch.zeros(200, H, dtype=F64), c))
    assert 0 < len(looked) < 20


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside, kept, monkeypatch):
    """One cast of each weight a graph, and sums over the steps in float32."""
    if not native._C.cpu_bf16_products():
        pytest.skip("these kernels do not multiply bf16")
    casts = []

    def spy(weight, dtype, cast=plain.cast_weight):
        casts.append(cast(weight, dtype))
        return casts[-1]

    monkeypatch.setattr(plain, "cast_weight", spy)
    steps = 200
    ours, theirs = twins(torch.float32)
    theirs.load_state_dict(ours.state_dict())
    true = nn.LSTMCell(I, H, dtype=F64)
    true.load_state_dict(ours.state_dict())
    x = torch.randn(steps, B, I)

    def run(cell):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loop(cell, x)
            if inside:
                return gradients(loss, cell)
        return gradients(loss, cell)

    got, peer, expected = run(ours), run(theirs), gradients(loop(true, x.double()), true)
    assert len({id(cast) for cast in casts}) == 4 and len(kept) == steps
    for own, other, grad in zip(got, peer, expected, strict=True):
        assert own.dtype == torch.float32
        error, peers = ((g.double() - grad).norm() / grad.norm() for g in (own, other))
        # eps is 2**-7. nn.LSTMCell's sums over the steps are bfloat16.
        assert error < 2**-7 and error < 0.7 * peers


def test_autocast_of_changed_weights():
    ours, _ = twins(torch.float32)
    x = torch.randn(B, I)
    with torch.autocast("cpu", torch.bfloat16):
        states = ours(x)
        with torch.no_grad():
            ours.weight_hh.mul_(2)
            got, expected = ours(x, states), ours.bfloat16()(x.bfloat16(), states)
    assert torch.equal(got[0], expected[0])
