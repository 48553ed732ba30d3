"""The operators of a layer in parts (torch.library), and make_fx."""

import pytest
import torch
from device import here, leaf
from test_export import BITS, CALLS, REFUSED, B, H, I, P, T, operands
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only

import lstm_ext

EVERY = 2
KEPT = 4  # before, between and after the parts
FORWARD = torch.ops.lstm_ext.lstm_layer_parts.default
BACKWARD = torch.ops.lstm_ext.lstm_layer_parts_backward.default


def backward_operands(arguments, every=EVERY):
    """Those of the backward operator, with gradients of what is seen."""
    *layer, cells = arguments
    results = FORWARD(*arguments, every)
    D = len(layer[4])
    shown = 1 + cells + 2 * D
    grads = [torch.randn_like(t) for t in results[:shown]]
    if not cells:
        grads.insert(1, None)
    wanted = [True, *(t is not None for t in layer[1])]
    return [*layer, every, [*grads, *[None] * 2 * D], results[shown:], wanted]


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    arguments = operands(**CALLS[name])
    trained = tree_map_only(torch.Tensor, lambda t: t.clone(), arguments)
    for tensor in (trained[0], *trained[1]):
        if tensor is not None:
            tensor.requires_grad_()
    for every in (EVERY, 100):
        opcheck(FORWARD, (*trained, every))
        opcheck(FORWARD, (*arguments, every))
    call = backward_operands(arguments)
    opcheck(BACKWARD, tuple(call))
    only_h0 = [False, True, *[False] * (len(arguments[1]) - 1)]
    (dh0,) = BACKWARD(*call[:-1], only_h0)
    assert torch.equal(dh0, BACKWARD(*call)[1])


@pytest.mark.parametrize("name", CALLS)
def test_as_the_whole(name):
    """Results and gradients of the operators of the whole layer."""
    *layer, cells = operands(**CALLS[name])
    whole = torch.ops.lstm_ext.lstm_layer.default
    tensors = [layer[0], *layer[1]]
    tensors = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    x, *flat = tensors
    wanted = [t for t in tensors if t is not None]
    found, expected = (
        FORWARD(x, flat, *layer[2:], cells, EVERY),
        whole(x, flat, *layer[2:], cells, False),
    )
    found = found[: len(expected)]
    assert_close(found, expected)
    slopes = [
        torch.autograd.grad([(t * t).sum() for t in made], wanted) for made in (found, expected)
    ]
    assert_close(*slopes)


@pytest.mark.cpu_only(reason="on CUDA a wrong length fails an assertion of the device")
@pytest.mark.parametrize("name", REFUSED)
def test_operators_refuse_what_is_wrong(name):
    changes, words = REFUSED[name]
    arguments = operands()
    call = backward_operands(arguments)
    layer = list(arguments[:-1])
    for at, change in changes.items():
        layer[at] = change(layer[at]) if callable(change) else change
    with pytest.raises(RuntimeError, match=words):
        FORWARD(*layer, False, EVERY)
    with pytest.raises(RuntimeError, match=words):
        BACKWARD(*layer, *call[len(layer) :])


def test_operators_refuse_other_parts():
    arguments = operands(proj=True)
    *layer, every, grads, kept, wanted = backward_operands(arguments)
    with pytest.raises(RuntimeError, match="Expected parts of at least 1 step, got 0"):
        FORWARD(*arguments, 0)
    with pytest.raises(RuntimeError, match="Expected parts of at least 1 step, got -1"):
        BACKWARD(*layer, -1, grads, kept, wanted)
    size = rf"of size \({B}, {KEPT}, {P}\)"
    for wrong in ([kept[0][:, 1:], kept[1]], [kept[1], kept[1]], [kept[0].double(), kept[1]]):
        with pytest.raises(RuntimeError, match=f"Expected a result saved .* {size}"):
            BACKWARD(*layer, every, grads, wrong, wanted)
    with pytest.raises(RuntimeError, match=f"Expected a gradient {size}"):
        BACKWARD(*layer, every, [*grads[:-2], kept[0][1:], None], kept, wanted)
    with pytest.raises(RuntimeError, match="Expected a gradient of size"):
        BACKWARD(*layer, every, [grads[0][1:], *grads[1:]], kept, wanted)
    for call in ((grads[:-1], kept, wanted), (grads, kept[:1], wanted), (grads, kept, wanted[1:])):
        with pytest.raises(RuntimeError, match="Expected 6 gradients, 2 states and 8 flags, got"):
            BACKWARD(*layer, every, *call)


# --- make_fx --------------------------------------------------------------------------------------


def parts():
    return here(lstm_ext.LSTM(I, H, checkpoint_every=EVERY, bidirectional=True)).double()


def test_make_fx_records_both_passes_for_any_steps():
    module = parts()
    parameters = dict(module.named_parameters())

    def step(parameters, x):
        y = torch.func.functional_call(module, parameters, (x,))[0]
        return torch.autograd.grad(y.square().sum(), list(parameters.values()))

    x = here(torch.randn(T, B, I, dtype=torch.float64))
    graph = make_fx(step, tracing_mode="symbolic")(parameters, x)
    recorded = [n.target for n in graph.graph.nodes if "lstm_ext" in str(n.target)]
    assert recorded == [FORWARD, BACKWARD]
    for steps in (2, T, 17):
        x = here(torch.randn(steps, B + 1, I, dtype=torch.float64))
        assert_close(graph(parameters, x), step(parameters, x), **BITS)


def test_a_recorded_gradient_is_differentiable():
    """When it runs; a graph that asks for more while it is recorded is refused."""
    module = parts().requires_grad_(False)
    x = leaf(torch.randn(T, B, I, dtype=torch.float64))

    def slope(x):
        return torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)[0]

    graph = make_fx(slope)(x)
    found, expected = (torch.autograd.grad(s(x).square().sum(), x) for s in (graph, slope))
    assert_close(found, expected)
    with pytest.raises(RuntimeError, match="first derivative only, got a second derivative"):
        make_fx(lambda x: torch.autograd.grad(slope(x).sum(), x))(x)
    with pytest.raises(RuntimeError, match="first derivative only, got Grad"):
        torch.func.grad(lambda x: graph(x).sum())(x.detach())
