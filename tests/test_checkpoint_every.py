"""Training in parts of the steps, and feeding a sequence in parts."""

import os
import pickle
import subprocess
import sys

import device
import pytest
import torch
from device import here, leaf
from tolerances import tol
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.testing import assert_close
from variants import EVERYTHING

import lstm_ext
from lstm_ext import ops
from lstm_ext.checkpointing import PartsLayer

T, B, I, H = 11, 3, 4, 5
F64 = {"dtype": torch.float64}
EVERY = [1, 4, 10]
MODULES = {
    "plain": {},
    "layers": {"num_layers": 2, "bidirectional": True, "dropout": 0.3},
    "batch_first": {"batch_first": True, "proj_size": 2, "bidirectional": True},
    "cells": {"return_cell_sequence": True, "bidirectional": True},
    "everything": {**EVERYTHING, "bidirectional": True, "merge_mode": "sum"},
    "everything_batch_first": {**EVERYTHING, "bidirectional": True, "batch_first": True},
}


def flat(outputs):
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [t for t in leaves if torch.is_tensor(t) and t.is_floating_point()]


def results(module, x, *args, create_graph=False, **kwargs):
    """Outputs and gradients of a module that draws from a fixed seed."""
    torch.manual_seed(5)
    outputs = flat(module(x, *args, **kwargs))
    inputs = [*flat((x, args)), *module.parameters()]
    loss = sum((t * (k + 1)).square().sum() for k, t in enumerate(outputs))
    return outputs, torch.autograd.grad(loss, inputs, create_graph=create_graph, allow_unused=True)


def pair(every, **kwargs):
    whole = here(lstm_ext.LSTM(I, H, **kwargs))
    parts = here(lstm_ext.LSTM(I, H, **kwargs, checkpoint_every=every))
    parts.load_state_dict(whole.state_dict())
    return whole, parts


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("name", MODULES)
def test_as_the_whole(name, every):
    whole, parts = pair(every, **MODULES[name], **F64)
    assert_close(results(parts, x := leaf(data(whole))), results(whole, x), **tol(torch.float64))
    D = 1 + whole.bidirectional
    p = whole.proj_size or H
    hx = tuple(leaf(torch.randn(D * whole.num_layers, B, n, **F64)) for n in (p, H))
    lengths = torch.tensor([4, 0, 11])
    resets = torch.rand(data(whole).shape[:2]) < 0.2
    options = {"lengths": lengths, "reset_mask": resets}
    assert_close(
        results(parts, x, hx, **options), results(whole, x, hx, **options), **tol(torch.float64)
    )


def data(module):
    return torch.randn(*((B, T) if module.batch_first else (T, B)), I, **F64)


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("name", ["layers", "cells", "everything"])
def test_packed(name, every):
    whole, parts = pair(every, **MODULES[name], **F64)
    x = leaf(torch.randn(T, B, I, **F64))
    lengths = torch.tensor([3, 11, 7])

    def run(module):
        torch.manual_seed(2)
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        outputs = [t for t in flat(module(packed)) if t.requires_grad]
        loss = sum((t * (k + 1)).square().sum() for k, t in enumerate(outputs))
        return outputs, torch.autograd.grad(loss, [x, *module.parameters()])

    assert_close(run(parts), run(whole), **tol(torch.float64))


@pytest.mark.parametrize("way", ["grad", "jvp", "hessian", "compile"])
def test_packed_is_transformed(way):
    whole, parts = pair(2, bidirectional=True, proj_size=2, **F64)
    sizes = torch.tensor([3, 2, 2, 1, 1])
    x, v = here(torch.randn(2, 9, I, **F64))

    def loss(module):
        def run(x):
            y, (h_n, c_n) = module(PackedSequence(x, sizes))
            return sum(t.square().sum() for t in (y.data, h_n, c_n))

        return run

    def derived(module):
        if way == "compile":
            run = torch.compile(loss(module), fullgraph=True, backend="aot_eager")
            point = x.clone().requires_grad_()
            return torch.autograd.grad(run(point), [point, *module.parameters()])
        if way == "jvp":
            return torch.func.jvp(loss(module), (x,), (v,))
        return getattr(torch.func, way)(loss(module))(x)

    assert_close(derived(parts), derived(whole), **tol(torch.float64))


@pytest.mark.parametrize("batch_first", [False, True])
def test_no_sequences(batch_first):
    module = here(lstm_ext.LSTM(I, H, checkpoint_every=2, batch_first=batch_first))
    x = leaf(torch.randn(0, 5, I) if batch_first else torch.randn(5, 0, I))
    y = module(x)[0]
    y.sum().backward()
    assert y.shape == (*x.shape[:2], H) and x.grad.shape == x.shape


def test_second_derivatives():
    whole, parts = pair(4, bidirectional=True, **F64)
    x = leaf(torch.randn(T, B, I, **F64))

    def second(module):
        _, (dx, *_) = results(module, x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, *module.parameters()])

    assert_close(second(parts), second(whole), **tol(torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_sum_in_float32(dtype):
    """The gradients of weights over 600 parts: added up in 8 or 11 bits they would stand still."""
    whole, parts = pair(1, dtype=dtype)
    x = here(torch.ones(600, B, I, dtype=dtype))
    found, expected = (
        torch.autograd.grad(module(x)[0].sum() / 600, module.parameters())
        for module in (parts, whole)
    )
    eps = torch.finfo(dtype).eps
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, rtol=4 * eps, atol=4 * eps * b.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    whole, parts = pair(4, num_layers=2)
    x = leaf(torch.randn(T, B, I))

    def run(module):
        with torch.autocast(device.DEVICE.type, dtype=dtype):
            y = module(x)[0]
        return y, torch.autograd.grad(y.float().square().sum(), x)

    (y, (dx,)), (expected, (dx_expected,)) = run(parts), run(whole)
    assert y.dtype == dtype
    # c is rounded between the parts.
    eps = torch.finfo(dtype).eps
    assert_close(y, expected, rtol=4 * eps, atol=4 * eps)
    assert_close(dx, dx_expected, rtol=16 * eps, atol=16 * eps * dx_expected.abs().max().item())


def exported(module, x):
    sizes = ({0: torch.export.Dim("T")},)
    return torch.export.export(module, (x,), dynamic_shapes=sizes).module()


def compiled(module, x):
    made = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    made(x)
    return made


@pytest.mark.parametrize("way", ["eager", "compiled", "exported"])
def test_what_is_kept(way):
    """No gates and no cells: the inputs, and 2 * H numbers of a sequence and part."""
    module = here(lstm_ext.LSTM(I, H, checkpoint_every=10, bidirectional=True))
    made = {"compiled": compiled, "exported": exported}.get(way, lambda module, x: module)
    run, sizes = made(module, leaf(torch.randn(50, B, I))), {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = leaf(torch.randn(400, B, I))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run(x)[0]
    read = [x, *module.parameters()]
    states = 2 * 2 * 41 * B * H + 2 * B * H  # before, between and after parts, h and c; zeros
    assert sum(sizes.values()) <= 4 * (sum(t.numel() for t in read) + states)
    found, expected = (torch.autograd.grad(t.sum(), read) for t in (y, module(x)[0]))
    assert_close(list(found), list(expected), rtol=0, atol=0)


def test_a_graph_of_no_steps():
    module = here(lstm_ext.LSTM(I, H, checkpoint_every=4, bidirectional=True))
    x, hx = leaf(torch.randn(0, B, I)), [leaf(torch.randn(2, B, H)) for _ in "hc"]
    y, states = torch.compile(module, fullgraph=True, backend="aot_eager")(x, hx)
    assert y.shape == (0, B, 2 * H)
    assert_close(list(states), hx, rtol=0, atol=0)
    gradients = torch.autograd.grad(states[1].sum(), [*hx, *module.parameters()])
    expected = [torch.full_like(t, float(t is hx[1])) for t in (*hx, *module.parameters())]
    assert_close(list(gradients), expected, rtol=0, atol=0)


def test_only_where_gradients_are_recorded(monkeypatch):
    module = here(lstm_ext.LSTM(I, H, checkpoint_every=4))
    x, calls = here(torch.randn(T, B, I)), []
    run = PartsLayer.run

    def spy(steps, kinds, cells, every, *tensors):
        calls.append(every)
        return run(steps, kinds, cells, every, *tensors)

    monkeypatch.setattr(PartsLayer, "run", spy)
    with torch.no_grad():
        module(x)
    module(x[:4])
    assert not calls
    module(x)
    assert calls == [4]
    module.checkpoint_every = None
    module(x)
    assert calls == [4]


@pytest.mark.parametrize("kwargs", [{}, {"bidirectional": True, "proj_size": 2}], ids=str)
@pytest.mark.parametrize("changed", ["x", "h_0", "c_0", "weight_hh_l0", "bias_ih_l0"])
def test_what_backward_reads_again_changed_in_place(changed, kwargs):
    """Its numbers are no longer those of the forward."""
    module = here(lstm_ext.LSTM(I, H, checkpoint_every=4, **kwargs))
    D, P = 1 + module.bidirectional, module.proj_size or H
    x, h_0, c_0 = (here(torch.randn(*size)) for size in ((T, B, I), (D, B, P), (D, B, H)))
    y, _ = module(x, (h_0, c_0))
    y.sum().backward(retain_graph=True)
    with torch.no_grad():
        {"x": x, "h_0": h_0, "c_0": c_0, **dict(module.named_parameters())}[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("create_graph", [False, True])
def test_what_backward_reads_again_of_another_size(create_graph, monkeypatch):
    """.data makes no new version. The core, which would read past an end, is not called."""
    module = here(lstm_ext.LSTM(I, H, checkpoint_every=4))
    y = module(leaf(torch.randn(T, B, I)))[0]
    module.weight_hh_l0.data = here(torch.randn(4 * H, H - 1))
    monkeypatch.setattr(ops, "layer_forward", None)
    with pytest.raises(RuntimeError, match=r"Expected weight_hh of size \(20, 5\)"):
        torch.autograd.grad(y.sum(), module.bias_ih_l0, create_graph=create_graph)


def test_outputs_may_be_changed_in_place():
    """Backward makes them again."""
    whole, parts = pair(4, **F64)
    x = leaf(torch.randn(T, B, I, **F64))
    found, expected = parts(x)[0].relu_(), whole(x)[0].relu()
    slopes = [torch.autograd.grad(y.square().sum(), x) for y in (found, expected)]
    assert_close(*slopes, **tol(torch.float64))


DERIVED = {
    "plain": {},
    "projection": {"proj_size": 2, "bidirectional": True},
    "cells": {"return_cell_sequence": True, "batch_first": True},
    "peephole": {"peephole": True},
    "layer_norm": {"layer_norm": True},
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", DERIVED)
def test_torch_func(name, padded):
    whole, parts = pair(2, **DERIVED[name], **F64)
    shape = (2, 5) if whole.batch_first else (5, 2)
    x, v = here(torch.randn(2, *shape, I, **F64))
    options = {}
    if padded:
        resets = torch.tensor([[0, 0, 1, 0, 0], [0, 1, 0, 1, 0]]).bool()
        resets = resets if whole.batch_first else resets.T
        options = {"lengths": torch.tensor([3, 5]), "reset_mask": resets}

    def outputs(module):
        return lambda x: flat(module(x, **options))

    def loss(module):
        return lambda x: sum((t * (k + 1)).square().sum() for k, t in enumerate(outputs(module)(x)))

    def of_weights(module):
        parameters = {k: p.detach() for k, p in module.named_parameters()}
        run = lambda p: torch.func.functional_call(module, p, (x,), options)  # noqa: E731
        return torch.func.grad(lambda p: sum(t.square().sum() for t in flat(run(p))))(parameters)

    for derived in (
        lambda m: torch.func.grad(loss(m))(x),
        lambda m: torch.func.vjp(outputs(m), x)[1](outputs(whole)(v)),
        lambda m: torch.func.jvp(outputs(m), (x,), (v,)),
        lambda m: torch.func.jacrev(outputs(m))(x),
        lambda m: torch.func.hessian(loss(m))(x),
        lambda m: torch.func.jacfwd(torch.func.jacfwd(loss(m)))(x),
        lambda m: torch.func.vmap(torch.func.grad(loss(m)))(torch.stack((x, v))),
        of_weights,
    ):
        assert_close(derived(parts), derived(whole), **tol(torch.float64))


@pytest.mark.parametrize("name", DERIVED)
def test_gradgradcheck(name):
    module = here(lstm_ext.LSTM(2, 3, checkpoint_every=2, **DERIVED[name], **F64))
    x = leaf(torch.randn(3, 3, 2, **F64))
    weights = {k: p.detach().requires_grad_() for k, p in module.named_parameters()}

    def run(x, *parameters):
        named = dict(zip(weights, parameters, strict=True))
        return tuple(flat(torch.func.functional_call(module, named, (x,))))

    inputs = (x, *weights.values())
    fast = {"fast_mode": True}
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True, **fast)
    assert torch.autograd.gradgradcheck(run, inputs, check_fwd_over_rev=True, **fast)


@pytest.mark.parametrize("kwargs", [{}, {"peephole": True}, {"num_layers": 2}], ids=str)
def test_batched_gradients(kwargs):
    """A gradient at a time, of saved tensors that may be unpacked once."""
    whole, parts = pair(4, **F64, **kwargs)
    x = leaf(torch.randn(T, B, I, **F64))
    v = here(torch.randn(3, T, B, H, **F64))
    found, expected = (
        torch.autograd.grad(module(x)[0], [x, *module.parameters()], v, is_grads_batched=True)
        for module in (parts, whole)
    )
    assert_close(found, expected, **tol(torch.float64))


def test_arguments():
    with pytest.raises(ValueError, match="checkpoint_every should be at least 1, got 0"):
        lstm_ext.LSTM(I, H, checkpoint_every=0)
    for wrong in (2.0, True, "4"):
        with pytest.raises(TypeError, match="checkpoint_every should be a number of steps"):
            lstm_ext.LSTM(I, H, checkpoint_every=wrong)
    module = lstm_ext.LSTM(I, H, checkpoint_every=4)
    assert "checkpoint_every=4" in repr(module) and "every" not in repr(lstm_ext.LSTM(I, H))
    assert pickle.loads(pickle.dumps(module)).checkpoint_every == 4
    assert lstm_ext.LSTM.from_torch(nn.LSTM(I, H)).checkpoint_every is None
    assert not hasattr(module.to_torch(), "checkpoint_every")


PEAK = """
import sys, torch, lstm_ext
from pathlib import Path
def peak():  # ru_maxrss would be at least that of the process that started this one
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
every = int(sys.argv[1]) or None
torch.set_num_threads(1)
module = lstm_ext.LSTM(8, 128, checkpoint_every=every)
x = torch.randn(32000, 8, 8)
module(x[:40])[0].sum().backward()
start = peak()
module(x)[0].sum().backward()
print(peak() - start)
"""


@pytest.mark.cpu_only(reason="measures the process's memory")
def test_memory():
    """32000 steps of 8 sequences: gates and cells alone take 655 MB, of 100 steps 2 MB."""
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", PEAK, str(every)],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "MALLOC_TRIM_THRESHOLD_": "0"},
            ).stdout
        )
        for every in (0, 100)
    ]
    saved = 32000 * 8 * 5 * 128 * 4 / 1024
    assert peaks[0] - peaks[1] > saved / 2, peaks


# --- streaming ------------------------------------------------------------------------------------


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def stream(module, x, sizes):
    """Outputs and last states, fed in parts of these numbers of steps in turn."""
    hx, parts, start, k = None, [], 0, 0
    while start < len(x):
        y, hx = module(x[start : start + sizes[k % len(sizes)]], hx)
        start, k = start + len(y), k + 1
        parts.append(y)
    return torch.cat(parts), hx


@pytest.mark.cpu_only(reason="CUDA's plan and cuBLAS may choose other sums for other lengths")
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("batch", "hidden", "kwargs"),
    [
        (1, 64, {"num_layers": 2}),
        (3, 37, {"bias": False}),
        (8, 96, {"proj_size": 40}),
        (32, 64, {"peephole": True}),
        (70, 33, {"num_layers": 2}),
        # Weights read as they lie, for some numbers of rows.
        (1, 256, {"inputs": 256}),
        (2, 320, {"inputs": 320}),
        (4, 256, {"inputs": 256}),
        (5, 256, {"inputs": 256}),
    ],
)
def test_a_stream_has_the_bits_of_the_whole(isa, batch, hidden, kwargs, dtype, threads):
    torch.set_num_threads(threads)
    inputs = kwargs.get("inputs", 29)
    kwargs = {name: value for name, value in kwargs.items() if name != "inputs"}
    module = lstm_ext.LSTM(inputs, hidden, dtype=dtype, **kwargs)
    x = torch.randn(48, batch, inputs, dtype=dtype)
    with torch.no_grad():
        whole = module(x)
        for sizes in ((1,), (7, 1, 20), (24,)):
            assert_close(stream(module, x, sizes), whole, rtol=0, atol=0)
    trained = stream(module, x, (16,))
    assert_close(trained, module(x), rtol=0, atol=0)
