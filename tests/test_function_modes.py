"""Modes that see torch's functions, and modes that say whether gradients are recorded."""

import pytest
import torch
from device import here
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._device import DeviceContext

import lstm_ext


def _packed(x):
    return nn.utils.rnn.pack_padded_sequence(x, [4, 2, 1])


KINDS = {
    "plain": (lambda: lstm_ext.LSTM(5, 8), (4, 3, 5)),
    "stack": (lambda: lstm_ext.LSTM(5, 8, 2, bidirectional=True), (4, 3, 5)),
    "projection": (lambda: lstm_ext.LSTM(5, 8, proj_size=3), (4, 3, 5)),
    "variant": (lambda: lstm_ext.LSTM(5, 8, peephole=True, zoneout=0.1).eval(), (4, 3, 5)),
    "checkpoint": (lambda: lstm_ext.LSTM(5, 8, checkpoint_every=2), (4, 3, 5)),
    "cell": (lambda: lstm_ext.LSTMCell(5, 8), (3, 5)),
    "layer_norm_cell": (lambda: lstm_ext.LSTMCell(5, 8, layer_norm=True), (3, 5)),
    "conv": (lambda: lstm_ext.ConvLSTM1d(2, 4, 3), (4, 3, 2, 9)),
    "conv_cell": (lambda: lstm_ext.ConvLSTM1dCell(2, 4, 3), (3, 2, 9)),
}
QUANTIZED = {
    "8_bits": (lambda: lstm_ext.quantize(nn.LSTM(5, 8)), (4, 3, 5)),
    "8_bits_cell": (lambda: lstm_ext.quantize(nn.LSTMCell(5, 8)), (3, 5)),
}
ON_CPU = [pytest.param(k, marks=pytest.mark.cpu_only(reason="8 bits")) for k in QUANTIZED]


def _made(kind):
    make, size = {**KINDS, **QUANTIZED}[kind]
    torch.manual_seed(0)
    module = make()
    return (module if kind in QUANTIZED else here(module)), here(torch.randn(size))


class Cast(TorchFunctionMode):
    """Every result in another precision; keeps the names of the functions."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.names = dtype, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__qualname__", str(func)))
        return pytree.tree_map_only(
            torch.Tensor,
            lambda t: t.to(self.dtype) if type(t) is torch.Tensor and t.is_floating_point() else t,
            func(*args, **(kwargs or {})),
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, *ON_CPU])
def test_a_mode_that_changes_results(kind, dtype):
    """As of torch's functions: it gets what the module has computed, none of the memory within."""
    module, x = _made(kind)
    with torch.no_grad():
        expected = module(x)
        states = expected if kind.endswith("cell") else expected[1]
        from_states = module(x, states)
        with Cast(dtype) as mode:
            found = module(x)
            again = module(x, states)
    assert len(mode.names) == 2 and mode.names[0].endswith(".forward"), mode.names
    for a, b in ((found, expected), (again, from_states)):
        for one, other in zip(*map(pytree.tree_leaves, (a, b)), strict=True):
            assert torch.equal(one, other.to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_inside_a_mode(kind):
    module, x = _made(kind)
    parameters = list(module.parameters())
    expected = torch.autograd.grad(pytree.tree_leaves(module(x))[0].sum(), parameters)
    output = pytree.tree_leaves(module(x))[0].sum()
    with Cast(torch.float64):
        output.backward()
    for parameter, other in zip(parameters, expected, strict=True):
        assert torch.equal(parameter.grad, other)


def test_every_mode_of_a_stack_sees_a_call():
    module, x = _made("plain")
    with torch.no_grad(), Cast(torch.float64) as outer, Cast(torch.float32) as inner:
        output, _ = module(x)
    assert output.dtype == torch.float64
    assert "LSTM.forward" in outer.names and inner.names == ["LSTM.forward"]


@pytest.mark.parametrize("kind", KINDS)
def test_where_modes_are_off(kind):
    module, x = _made(kind)
    expected = module(x)
    with torch.device(x.device), Cast(torch.float64) as mode, torch._C.DisableTorchFunction():
        found = module(x)
    assert not mode.names
    assert all(map(torch.equal, pytree.tree_leaves(found), pytree.tree_leaves(expected)))


def test_lengths_and_packed_input_in_a_mode():
    module, x = _made("plain")
    packed, lengths = _packed(x), torch.tensor([4, 2, 1])
    with torch.no_grad():
        expected = module(packed)[0].data, module(x, lengths=lengths)[0]
        with Cast(torch.float64):
            found = module(packed)[0].data, module(x, lengths=lengths)[0]
    assert all(torch.equal(a.float(), b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_default_device_is_asked_once(monkeypatch, kind):
    """It is a mode, on for a whole program: with every step of a call it takes six times as
    long."""
    module, x = _made(kind)
    asked, ask = [], DeviceContext.__torch_function__

    def counted(self, func, *args):
        asked.append(func.__qualname__)
        return ask(self, func, *args)

    monkeypatch.setattr(DeviceContext, "__torch_function__", counted)
    with torch.device(x.device):
        module(x)
    (name,) = asked
    assert name.endswith(".forward")


@pytest.mark.parametrize("kind", [*KINDS, *ON_CPU])
def test_no_gradients_in_inference_mode_whatever_is_enabled(kind):
    module, x = _made(kind)
    with torch.inference_mode():
        expected = module(x)
        with torch.enable_grad():
            found = module(x)
    for one, other in zip(*map(pytree.tree_leaves, (found, expected)), strict=True):
        assert one.is_inference() and not one.requires_grad
        assert torch.equal(one, other)
