"""What PyTorch has around a module: parametrizations, hooks, optimizers, files, recomputation.

Each beside nn.LSTM or nn.LSTMCell doing the same. More in test_module_parameters.py.
"""

import functools

import pytest
import torch
from device import DEVICE, here, leaf
from tolerances import tol
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import lstm_ext

TOL = tol(torch.float64)
BITS = {"rtol": 0, "atol": 0}
F64 = {"dtype": torch.float64}


def pair(kind="LSTM", **kwargs):
    """nn's module in float64 and ours with copies of its parameters; an LSTM has two layers."""
    args = (3, 4, 2) if kind == "LSTM" else (3, 4)
    modules = [here(getattr(home, kind)(*args, **kwargs, **F64)) for home in (nn, lstm_ext)]
    modules[1].load_state_dict(modules[0].state_dict())
    return modules


def weight(kind):
    return "weight_hh_l1" if kind == "LSTM" else "weight_hh"


def randn(kind="LSTM"):
    return here(torch.randn(*((5, 2, 3) if kind == "LSTM" else (2, 3)), **F64))


def loss_of(module, x):
    """Of all outputs of an LSTM or a cell."""
    tensors = [t for part in module(x) for t in (part if isinstance(part, tuple) else (part,))]
    return sum(t.square().sum() for t in tensors)


def train(module, x, optimizer=None, steps=3):
    """The loss of each step."""
    optimizer = optimizer or torch.optim.SGD(module.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with parametrize.cached():  # nn.LSTM computes a parametrized weight twice a forward
            loss = loss_of(module, x)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert losses[-1] < losses[0]
    return torch.stack(losses)


# --- replaced weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrized_training(name, kind):
    """spectral_norm changes its vectors at every forward in training: they must stay level."""
    x, losses, modules = randn(kind), [], pair(kind)
    for module in modules:
        torch.manual_seed(5)
        getattr(parametrizations, name)(module, weight(kind))
    modules[1].load_state_dict(modules[0].state_dict())
    for module in modules:
        losses.append(train(module, x))
    assert_close(losses[1], losses[0], **TOL)
    assert_close(dict(modules[1].state_dict()), dict(modules[0].state_dict()), **TOL)
    if name == "orthogonal":
        w = getattr(modules[1], weight(kind)).detach()
        assert_close(w.T @ w, torch.eye(4, device=DEVICE, **F64), **TOL)
    for module in modules:
        parametrize.remove_parametrizations(module, weight(kind))
    assert_close(loss_of(modules[1], x), loss_of(modules[0], x), **TOL)


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_a_parametrized_weight_is_computed_once_a_forward(kind):
    class Counting(nn.Module):
        def forward(self, w):
            computed.append(w.shape)
            return 2 * w

    computed, x, module = [], randn(kind), pair(kind)[1]
    names = [name for name, _ in module.named_parameters()]
    for name in names:
        parametrize.register_parametrization(module, name, Counting())
    computed.clear()
    loss_of(module, x).backward()
    assert len(computed) == len(names)
    if kind == "LSTM":
        with pytest.raises(RuntimeError, match="torch.float32 and parameter tensor with torch.fl"):
            module(x.float())


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_pruned_training(kind):
    x, modules = randn(kind), pair(kind)
    losses = []
    for module in modules:
        names = [n for n, _ in module.named_parameters() if n.startswith("weight")]
        chosen = [(module, n) for n in names]
        prune.global_unstructured(chosen, prune.L1Unstructured, amount=0.3)
        prune.ln_structured(module, weight(kind), amount=2, n=2, dim=0)
        losses.append(train(module, x))
        for n in names:
            prune.remove(module, n)
    assert_close(losses[1], losses[0], **TOL)
    assert_close(dict(modules[1].state_dict()), dict(modules[0].state_dict()), **TOL)
    assert sum((p == 0).sum() for p in modules[1].parameters()) >= 8


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_tied_to_another_module(kind):
    """The recurrent weight is that of a Linear, which is trained through both."""
    x, losses, states = randn(kind), [], []
    for module in pair(kind):
        torch.manual_seed(5)
        model = nn.ModuleDict({"rnn": module, "head": here(nn.Linear(4, 16, **F64))})
        setattr(module, weight(kind), model["head"].weight)
        model.forward = lambda x, m=model: (m["head"](m["rnn"](x)[0]),)
        losses.append(train(model, x))
        assert getattr(module, weight(kind)) is model["head"].weight
        states.append(dict(model.state_dict()))
    assert_close(losses[1], losses[0], **TOL)
    assert_close(states[1], states[0], **TOL)


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_functional_call_inside_a_model(kind):
    """Parameters of the whole model by name, those of the head tied to the LSTM's."""
    x, results = randn(kind), []
    new = {n: torch.randn_like(p) for n, p in pair(kind)[0].named_parameters(prefix="0")}
    for module in pair(kind):
        model = nn.Sequential(module)
        leaves = {n: v.clone().requires_grad_() for n, v in new.items()}
        call = functools.partial(torch.func.functional_call, model, leaves)
        loss = loss_of(call, (x,))
        results.append((loss, torch.autograd.grad(loss, list(leaves.values()))))
    assert_close(results[1], results[0], **TOL)


# --- hooks ---------------------------------------------------------------------------------------


def plain(values):
    """Nested tuples with copies of their tensors, at the time of the call."""
    if isinstance(values, tuple):
        return tuple(plain(v) for v in values)
    return values.clone() if isinstance(values, torch.Tensor) else values


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_hooks_see_and_change_what_nn_lstms_do(kind):
    seen = []
    x = leaf(randn(kind))
    for module in pair(kind):
        events = []

        def note(what, *values, events=events):
            events.append((what, *map(plain, values)))

        def doubled_input(m, args, kwargs, note=note):
            note("forward pre", args, tuple(kwargs.items()))
            return (2 * args[0],), kwargs

        def halved_output(m, args, out, note=note):
            note("forward", args, out)
            return out[0] / 2, out[1]

        def backward_pre(m, grads, note=note):
            note("backward pre", grads)
            return tuple(None if g is None else 3 * g for g in grads)

        def backward(m, grads_in, grads_out, note=note):
            note("backward", grads_in, grads_out)
            return tuple(None if g is None else 5 * g for g in grads_in)

        module.register_forward_pre_hook(doubled_input, with_kwargs=True)
        module.register_forward_hook(halved_output)
        module.register_full_backward_pre_hook(backward_pre)
        module.register_full_backward_hook(backward)
        handles = [
            nn.modules.module.register_module_forward_hook(
                lambda m, args, out, note=note: note("any", args, out)
            ),
            nn.modules.module.register_module_full_backward_hook(
                lambda m, gi, go, note=note: note("any backward", gi, go)
            ),
        ]
        parameter = getattr(module, weight(kind))
        parameter.register_hook(lambda g, note=note: note("gradient", g))
        parameter.register_post_accumulate_grad_hook(
            lambda p, note=note: note("accumulated", p.grad)
        )
        try:
            x.grad = None
            loss_of(module, x).backward()
        finally:
            for handle in handles:
                handle.remove()
        note("end", x.grad, *(p.grad for p in module.parameters()))
        seen.append(events)
    names = [[event[0] for event in events] for events in seen]
    assert sorted(names[1]) == sorted(names[0])
    assert set(names[1]) >= {"forward pre", "forward", "backward pre", "backward", "accumulated"}
    # The parameters' hooks run when autograd reaches them, which is no part of a contract.
    for expected in seen[0]:
        (got,) = [event for event in seen[1] if event[0] == expected[0]]
        assert_close(got[1:], expected[1:], **TOL)
    mine = [[n for n in order if "backward" in n or "forward" in n] for order in names]
    assert mine[1] == mine[0]


def test_an_output_that_a_hook_replaces_wholly():
    """The zero-ablation idiom of interpretability tools, with always_call."""
    results = []
    for module in pair():
        ran = []
        module.register_forward_hook(
            lambda m, args, out: out and (torch.zeros_like(out[0]), out[1]), always_call=True
        )
        module.register_forward_hook(lambda *_, ran=ran: ran.append(1), always_call=True)
        results.append(module(randn() * 0 + 1))
        with pytest.raises(ValueError):
            module(torch.zeros(1, 1, 1, 1))
        assert len(ran) == 2 and not results[-1][0].any()
    assert_close(results[1], results[0], **TOL)


# --- optimizers ----------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "adam": functools.partial(torch.optim.Adam, lr=0.01, amsgrad=True),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01),
    "adagrad": functools.partial(torch.optim.Adagrad, lr=0.05),
}


@pytest.mark.parametrize("way", ["foreach", "fused", "one by one"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name, way):
    if (name, way, DEVICE.type) == ("adagrad", "fused", "cuda"):
        pytest.skip("torch has no fused Adagrad on CUDA")
    flags = {"foreach": False} if way == "one by one" else {way: True}
    x, states, losses = randn(), [], []
    for module in pair(bidirectional=True, proj_size=2):
        losses.append(train(module, x, OPTIMIZERS[name](module.parameters(), **flags)))
        norm = nn.utils.clip_grad_norm_(module.parameters(), 0.1, foreach=way != "one by one")
        grads = [p.grad.clone() for p in module.parameters()]
        states.append((dict(module.state_dict()), norm, grads))
    assert_close(losses[1], losses[0], **TOL)
    assert_close(states[1], states[0], **TOL)


def test_an_optimizer_that_calls_the_model_itself():
    x, losses = randn(), []
    for module in pair():
        optimizer = torch.optim.LBFGS(module.parameters(), max_iter=5)

        def closure(module=module, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(module, x)
            loss.backward()
            return loss

        losses.append(torch.stack([optimizer.step(closure).detach() for _ in range(2)]))
    assert losses[0][1] < losses[0][0]
    assert_close(losses[1], losses[0], **TOL)


def test_averaged_weights():
    x, outputs = randn(), []
    for module in pair():
        averaged = torch.optim.swa_utils.AveragedModel(module)
        for _ in range(3):
            train(module, x, steps=2)
            averaged.update_parameters(module)
        outputs.append(averaged(x))
        assert not torch.equal(outputs[-1][0], module(x)[0])
    assert_close(outputs[1], outputs[0], **TOL)


# --- files and empty parameters ------------------------------------------------------------------


def test_safetensors(tmp_path):
    st = pytest.importorskip("safetensors.torch")
    theirs, ours = pair(bidirectional=True, proj_size=2)
    x = randn()
    for source, target in ((ours, theirs), (theirs, ours)):
        with torch.no_grad():
            for p in target.parameters():
                p.zero_()
        st.save_model(source, tmp_path / "model.safetensors")
        assert st.load_model(target, tmp_path / "model.safetensors", device=str(DEVICE)) == (
            set(),
            [],
        )
        assert_close(dict(target.state_dict()), dict(source.state_dict()), **BITS)
        assert_close(ours(x), theirs(x), **TOL)
        st.save_file(source.state_dict(), tmp_path / "dict.safetensors")
        target.load_state_dict(st.load_file(tmp_path / "dict.safetensors", device=str(DEVICE)))
        assert_close(ours(x), theirs(x), **TOL)


def test_safetensors_of_tied_weights(tmp_path):
    st = pytest.importorskip("safetensors.torch")
    modules = [here(lstm_ext.LSTM(4, 4, 2)) for _ in range(2)]
    for module in modules:
        module.weight_hh_l1 = module.weight_hh_l0
    st.save_model(modules[0], tmp_path / "tied.safetensors")
    st.load_model(modules[1], tmp_path / "tied.safetensors", device=str(DEVICE))
    assert modules[1].weight_hh_l1 is modules[1].weight_hh_l0
    x = here(torch.randn(5, 2, 4))
    assert_close(modules[1](x), modules[0](x), **BITS)


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_meta_then_memory(kind):
    """to_empty and reset_parameters, or load_state_dict with assign, of a module without memory."""
    theirs, _ = pair(kind)
    x = randn(kind)
    args = (3, 4, 2) if kind == "LSTM" else (3, 4)
    with torch.device("meta"):
        first, second = (getattr(lstm_ext, kind)(*args, **F64) for _ in range(2))
    assert all(p.is_meta for p in (*first.parameters(), *second.parameters()))
    first.to_empty(device=DEVICE)
    for module in (first, theirs):
        torch.manual_seed(5)
        module.reset_parameters()
    assert_close(dict(first.state_dict()), dict(theirs.state_dict()), **BITS)
    second.load_state_dict(theirs.state_dict(), assign=True)
    for module in (first, second):
        assert_close(loss_of(module, x), loss_of(theirs, x), **TOL)
        assert all(p.requires_grad and p.device == DEVICE for p in module.parameters())


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_skip_init_draws_nothing(kind):
    theirs, _ = pair(kind)
    args = (3, 4, 2) if kind == "LSTM" else (3, 4)
    before = torch.get_rng_state()
    ours = nn.utils.skip_init(getattr(lstm_ext, kind), *args, device=DEVICE, **F64)
    assert torch.equal(torch.get_rng_state(), before)
    ours.load_state_dict(theirs.state_dict())
    x = randn(kind)
    assert_close(loss_of(ours, x), loss_of(theirs, x), **TOL)


# --- activation checkpointing --------------------------------------------------------------------


@pytest.mark.parametrize("amp", [False, True], ids=["float64", "autocast"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, amp):
    """The bits of a run that keeps everything: dropout draws its masks anew, autocast is back."""
    module = lstm_ext.LSTM(3, 4, 3, dropout=0.5, bidirectional=True)
    module = here(module if amp else module.double())
    x, lengths = leaf(randn().to(torch.float32 if amp else torch.float64)), torch.tensor([5, 2])
    hx = [leaf(torch.randn(6, 2, 4).to(x.dtype)) for _ in range(2)]
    calls = []

    def run(x, h, c):
        calls.append(torch.is_grad_enabled())
        y, states = module(x, (h, c), lengths=lengths)
        return y, *states

    results = []
    for how in (run, functools.partial(checkpoint, run, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        calls.clear()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=amp):
            outputs = how(x, *hx)
        loss = sum(t.float().square().sum() for t in outputs)
        leaves = [x, *hx, *module.parameters()]
        for tensor in leaves:
            tensor.grad = None
        loss.backward()  # autograd.grad is not for the reentrant way
        results.append((outputs, [tensor.grad for tensor in leaves], torch.get_rng_state()))
    assert calls == [not use_reentrant, True]  # run once more, in backward
    assert_close(results[1], results[0], **BITS)


def test_a_checkpointed_layer_keeps_less():
    """What is saved for backward is the input of the region only."""
    module, x = here(lstm_ext.LSTM(3, 4, 2)), leaf(torch.randn(5, 2, 3))
    counts = []
    for how in (module, lambda x: checkpoint(module, x, use_reentrant=False)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
        ):
            how(x)
        counts.append(sum(saved))
    assert counts[1] < counts[0] / 4
