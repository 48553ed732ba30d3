"""Stacks of layers as a wavefront: on the emulated kernels, the layers in turn are the measure."""

import contextlib
from types import SimpleNamespace

import emulated
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

import lstm_ext
from lstm_ext import ops, wavefront
from lstm_ext.cuda.engine import FAMILIES, CudaEngine

pytestmark = pytest.mark.cpu_only(reason="brings the emulated device along")

T, B, I, H = 7, 4, 5, 20
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


class Engine(emulated.EmulatedEngine):
    """Clusters only, and as many parts as it is told, whatever the cost model says."""

    parts = 3

    def choose_wavefront(self, problem, device, layers, steps):
        plans = self.core.cuda_plans(problem, self._properties)
        clusters = [plan for plan in plans if FAMILIES[plan.family] == "cluster"]
        if not clusters:
            return SimpleNamespace(parts=1, plan=self.core.cuda_plan(problem, self._properties))
        return SimpleNamespace(parts=min(self.parts, steps), plan=clusters[-1])


@pytest.fixture
def engine(monkeypatch):
    """Installed, with float32 in TF32, which clusters have."""
    emulated.load().set_seed(0)
    made = Engine(emulated.load(), emulated.only("cluster"))
    monkeypatch.setitem(ops._engines, "cpu", made)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    yield made
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def stacks(monkeypatch):
    """How many calls have run as a wavefront."""
    seen, run = [], wavefront.run

    def spy(module, x, *args):
        seen.append(module)
        return run(module, x, *args)

    monkeypatch.setattr(wavefront, "run", spy)
    return seen


def tensors(outputs):
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [t for t in leaves if torch.is_tensor(t) and t.is_floating_point()]


def both(engine, module, run):
    """(as a wavefront, in turn): what ``run(module)`` returns, from the same seed."""
    found = []
    for on in (True, False):
        engine.wavefront = on
        torch.manual_seed(3)
        found.append(run(module))
    engine.wavefront = True
    return found


def trained(x, hx=None, used=None, wanted=None, **options):
    """A run that returns outputs and gradients."""

    def run(module):
        outputs = tensors(module(x, hx, **options))
        picked = outputs if used is None else [outputs[k] for k in used]
        loss = sum((t.double() * (k + 1)).square().sum() for k, t in enumerate(picked))
        inputs = wanted or [*tensors((x, hx)), *module.parameters()]
        grads = torch.autograd.grad(loss, [t for t in inputs if t.requires_grad], allow_unused=True)
        return [t.detach() for t in outputs], grads

    return run


def module_of(dtype=BF16, layers=3, **kwargs):
    torch.manual_seed(0)
    return lstm_ext.LSTM(I, H, layers, dtype=dtype, **kwargs)


def data(dtype=BF16, batch_first=False):
    x = torch.randn(B, T, I) if batch_first else torch.randn(T, B, I)
    return x.to(dtype).requires_grad_()


def states(dtype=BF16, layers=3):
    return tuple(torch.randn(layers, B, H).to(dtype).requires_grad_() for _ in range(2))


LENGTHS = torch.tensor([3, 0, 7, 5])


# --- the same numbers as the layers in turn -------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_the_bits_of_the_layers_in_turn(engine, stacks, dtype, parts):
    """Half types too: nothing is rounded between two parts."""
    engine.parts = parts
    options = {"lengths": LENGTHS, "reset_mask": torch.rand(T, B) < 0.3}
    for kwargs, more in (({}, {}), ({"bias": False, "return_cell_sequence": True}, options)):
        module = module_of(dtype, **kwargs)
        run = trained(data(dtype), states(dtype), **more)
        assert_close(*both(engine, module, run), rtol=0, atol=0)
    assert len(stacks) == (2 if parts > 1 else 0)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_bits_whatever_the_schedule(engine, seed):
    emulated.load().set_seed(seed)
    run = trained(data(), states(layers=2), lengths=LENGTHS)
    assert_close(*both(engine, module_of(layers=2), run), rtol=0, atol=0)


def test_batch_first(engine, stacks):
    module = module_of(F32, batch_first=True, return_cell_sequence=True)
    x, reset = data(F32, batch_first=True), torch.rand(B, T) < 0.3
    for options in ({}, {"lengths": LENGTHS, "reset_mask": reset}):
        mine, theirs = both(engine, module, trained(x, states(F32), **options))
        assert_close(mine[0], theirs[0], rtol=0, atol=0)
        # The weights' gradients add up the rows in another order.
        assert_close(mine[1], theirs[1], rtol=1e-5, atol=1e-5)
        assert mine[0][0].shape == (B, T, H)
    assert len(stacks) == 2


def test_packed(engine, stacks):
    x = torch.randn(T, B, I).requires_grad_()
    module = module_of(F32)

    def run(module):
        packed = pack_padded_sequence(x, torch.tensor([3, 7, 1, 5]), enforce_sorted=False)
        y, (h, c) = module(packed, states_given)
        loss = sum((t * (k + 1)).square().sum() for k, t in enumerate((y.data, h, c)))
        inputs = [x, *states_given, *module.parameters()]
        return (y.data.detach(), h.detach(), c.detach()), torch.autograd.grad(loss, inputs)

    states_given = states(F32)
    assert_close(*both(engine, module, run), rtol=0, atol=0)
    assert len(stacks) == 1


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_dropout_draws_the_same_numbers(engine, stacks, dtype, batch_first):
    module = module_of(dtype, dropout=0.4, batch_first=batch_first)
    run = trained(data(dtype, batch_first), states(dtype), lengths=LENGTHS)
    mine, theirs = both(engine, module, run)
    # On the CPU F.dropout rounds its factor to the dtype; on CUDA neither does.
    limits = {"rtol": 1e-5, "atol": 1e-5} if dtype == F32 else {"rtol": 2e-2, "atol": 5e-2}
    assert_close(mine, theirs, **limits)
    assert len(stacks) == 1
    module.eval()
    assert_close(*both(engine, module, lambda m: m(data_of(batch_first, dtype))), rtol=0, atol=0)


def data_of(batch_first, dtype):
    torch.manual_seed(1)
    return data(dtype, batch_first).detach()


def test_inference(engine, stacks):
    module, x = module_of(return_cell_sequence=True), data().detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert_close(*both(engine, module, lambda m: m(x)), rtol=0, atol=0)
    assert len(stacks) == 2


@pytest.mark.parametrize("used", [[0], [1], [2], [0, 2]], ids=str)
def test_some_outputs_only(engine, used):
    assert_close(*both(engine, module_of(), trained(data(), states(), used=used)), rtol=0, atol=0)


def test_some_gradients_only(engine):
    """None below the lowest layer that wants any."""
    module, x = module_of(), data()
    x.requires_grad_(False)
    parameters = list(module.parameters())
    for first, last in ((4, 8), (8, 12), (0, 1), (5, 6)):
        for k, p in enumerate(parameters):
            p.requires_grad_(first <= k < last)
        wanted = parameters[first:last]
        assert_close(*both(engine, module, trained(x, wanted=wanted)), rtol=0, atol=0)


def test_views_and_strided_inputs(engine):
    module = module_of()
    x = torch.randn(T, B, 2 * I).to(BF16)[..., ::2].requires_grad_()
    h, c = (torch.randn(B, 3, H).to(BF16).transpose(0, 1).requires_grad_() for _ in range(2))
    assert_close(*both(engine, module, trained(x, (h, c))), rtol=0, atol=0)
    negated = (-torch.randn(T, B, I).to(torch.complex64)).conj().imag  # lazily
    assert negated.is_neg()
    run = lambda m: m(negated)[0]  # noqa: E731
    assert_close(*both(engine, module_of(F32), run), rtol=0, atol=0)


def test_unbatched(engine, stacks):
    x = torch.randn(T, I).to(BF16).requires_grad_()
    assert_close(*both(engine, module_of(), trained(x)), rtol=0, atol=0)
    assert len(stacks) == 1


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_autocast(engine, stacks, dtype):
    module = module_of(F32)
    x, hx = data(F32), states(F32)

    def run(module):
        with torch.autocast("cpu", dtype=dtype):
            return trained(x, hx)(module)

    mine, theirs = both(engine, module, run)
    assert mine[0][0].dtype == dtype and mine[1][0].dtype == F32
    assert_close(mine, theirs, rtol=0, atol=0)
    assert len(stacks) == 1


def test_twice_through_the_same_graph(engine):
    module, x = module_of(F32), data(F32)
    y = module(x)[0]
    first = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    assert_close(torch.autograd.grad(y.square().sum(), x), first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.square().sum(), x)


@pytest.mark.parametrize("change", ["half", "half_hook", "short_hook"])
def test_what_is_saved_for_backward_replaced(engine, stacks, change):
    engine.wavefront = True
    module, x = module_of(), data()
    pack = {"half_hook": torch.Tensor.half, "short_hook": lambda t: t[:1]}.get(change, lambda t: t)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = module(x)[0].mul(2).sum()
    assert len(stacks) == 1
    if change == "half":
        module.half()
    with pytest.raises((RuntimeError, ValueError), match="Expected"):
        loss.backward()


def test_second_derivatives(engine, stacks, monkeypatch):
    """In float64, which has one part, to be told from a wrong formula."""
    monkeypatch.setattr(wavefront, "applies", lambda *_: engine.wavefront)
    module = module_of(torch.float64, dropout=0.3, return_cell_sequence=True)
    x = data(torch.float64)
    zeros = torch.zeros(3, B, H, dtype=torch.float64)
    hx = tuple((x[0, :, :1] + zeros) * k for k in (0.1, 0.2))  # functions of x

    def run(module):
        y, (h, c), cells = module(x, hx, lengths=LENGTHS)
        loss = (y * cells + h.sum() * c.sum()).square().sum()
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        inputs = [x, *module.parameters()]
        return dx.detach(), torch.autograd.grad(
            dx.square().sum(), inputs, allow_unused=True, retain_graph=True
        )

    assert_close(*both(engine, module, run), rtol=1e-9, atol=1e-9)
    assert len(stacks) == 1


def test_batched_gradients(engine):
    module, x = module_of(F32), data(F32)

    def run(module):
        y = module(x)[0]
        cotangents = torch.randn(2, *y.shape)
        return torch.autograd.grad(y, [x, *module.parameters()], cotangents, is_grads_batched=True)

    assert_close(*both(engine, module, run), rtol=1e-5, atol=1e-5)


def test_errors_are_the_layers_own(engine, stacks):
    module = module_of(F32)
    module.weight_hh_l2 = torch.nn.Parameter(torch.randn(4 * H, H + 1))
    with pytest.raises(RuntimeError, match="Expected weight_hh of size"):
        engine.wavefront = True
        module(data(F32))
    assert len(stacks) == 1


# --- where it is not used -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        {"bidirectional": True},
        {"proj_size": 3},
        {"peephole": True},
        {"layer_norm": True},
        {"zoneout": 0.1},
        {"recurrent_dropout": 0.1},
        {"weight_dropout": 0.1},
        {"dropout": 1.0},
        {"layers": 1},
        {"checkpoint_every": 2},
    ],
    ids=str,
)
def test_layers_in_turn(engine, stacks, kwargs):
    engine.wavefront = True
    module_of(**kwargs)(data())
    assert not stacks


def test_calls_in_turn(engine, stacks):
    engine.wavefront = True
    module, x = module_of(F32), data(F32).detach()
    module(x[:0])
    module(x[:, :0])
    module(x[:1])  # one part is none
    torch.func.vmap(module)(x.unsqueeze(0))
    torch.func.jvp(lambda x: module(x)[0], (x,), (x,))
    torch.func.grad(lambda x: module(x)[0].sum())(x)
    torch.compile(module, backend="eager")(x)
    torch.export.export(module, (x,))
    assert not stacks
    module(x)
    assert len(stacks) == 1
    with torch.no_grad():  # nothing to checkpoint
        module_of(F32, checkpoint_every=2)(x)
    assert len(stacks) == 2
    module_of(torch.float64)(x.double())  # no clusters: one part
    engine.wavefront = False
    module(x)
    assert len(stacks) == 2


@pytest.mark.parametrize("name", ["LSTM_EXT_WAVEFRONT", "LSTM_EXT_UNTIMED"])
def test_the_switches(monkeypatch, name):
    attribute = name.removeprefix("LSTM_EXT_").lower()
    for value, on in ((None, False), ("", False), ("off", False), ("on", True)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
        with emulated.installed() as engine:
            assert getattr(engine, attribute) is on
    asked = SimpleNamespace(cuda_properties=lambda *arguments: arguments)
    guard = contextlib.nullcontext
    engine = SimpleNamespace(core=asked, untimed=engine.untimed, guard=guard)
    assert CudaEngine.properties.__wrapped__(engine, torch.device("cuda", 1)) == (1, engine.untimed)
    monkeypatch.setenv(name, "1")
    with (
        pytest.raises(ValueError, match=f"{name} should be on or off, got 1"),
        emulated.installed(),
    ):
        pass
