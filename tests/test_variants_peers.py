"""Variants against code that nobody here wrote: ONNX's reference evaluator and ONNX Runtime,
Keras; and against Haste's published formulas, written out."""

import os

os.environ["KERAS_BACKEND"] = "torch"  # before keras is imported anywhere

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tolerances import tol
from torch.testing import assert_close

import lstm_ext

onnx = pytest.importorskip("onnx", reason="peepholes are compared with it")
onnx_reference = pytest.importorskip("onnx.reference")
onnxruntime = pytest.importorskip("onnxruntime", reason="peepholes are compared with it")
keras = pytest.importorskip("keras", reason="merge modes are compared with it")

pytestmark = pytest.mark.cpu_only(reason="the variants' kernels")

T, B, I, H = 7, 5, 4, 6
TOL = tol(torch.float32)
F64 = {"dtype": torch.float64}


# --- peepholes: ONNX LSTM -------------------------------------------------------------------------


def onnx_model(module, lengths):
    """The module as one ONNX LSTM node: gates i, o, f, c; peepholes i, o, f."""

    def stacked(name, order):
        suffixes = ["_l0", "_l0_reverse"][: 1 + module.bidirectional]
        directions = [getattr(module, name + s).detach().chunk(len(order)) for s in suffixes]
        return torch.stack([torch.cat([gates[k] for k in order]) for gates in directions])

    gates = (0, 3, 1, 2)
    biases = [stacked(name, gates) for name in ("bias_ih", "bias_hh")]
    weights = {
        "W": stacked("weight_ih", gates),
        "R": stacked("weight_hh", gates),
        "B": torch.cat(biases, 1),
        "P": stacked("weight_ch", (0, 2, 1)),
    }
    inputs = ["X", "W", "R", "B", "lengths" if lengths else "", "h0", "c0", "P"]
    node = onnx.helper.make_node(
        "LSTM",
        inputs,
        ["Y", "Y_h", "Y_c"],
        hidden_size=module.hidden_size,
        direction="bidirectional" if module.bidirectional else "forward",
    )
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "lstm",
        [value(name, onnx.TensorProto.FLOAT, [None] * 3) for name in ("X", "h0", "c0")]
        + [value("lengths", onnx.TensorProto.INT32, [None])] * lengths,
        [value("Y", onnx.TensorProto.FLOAT, [None] * 4)]
        + [value(name, onnx.TensorProto.FLOAT, [None] * 3) for name in ("Y_h", "Y_c")],
        [onnx.numpy_helper.from_array(w.numpy(), name) for name, w in weights.items()],
    )
    opset = onnx.helper.make_opsetid("", 22)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    onnx.checker.check_model(model)
    return model


def peephole_lstm(bidirectional=False):
    module = lstm_ext.LSTM(I, H, bidirectional=bidirectional, peephole=True)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.7)
    count = 1 + bidirectional
    return module, torch.randn(T, B, I), (torch.randn(count, B, H), torch.randn(count, B, H))


def as_onnx(y, hn):
    """Y (T, D, B, H), Y_h, Y_c."""
    return [y.unflatten(2, (-1, H)).transpose(1, 2).detach(), *(s.detach() for s in hn)]


def test_peepholes_are_onnxs_reference_evaluators():
    module, x, hx = peephole_lstm()
    feeds = {"X": x.numpy(), "h0": hx[0].numpy(), "c0": hx[1].numpy()}
    theirs = onnx_reference.ReferenceEvaluator(onnx_model(module, False)).run(None, feeds)
    assert_close([torch.from_numpy(np.asarray(t)) for t in theirs], as_onnx(*module(x, hx)), **TOL)


@pytest.mark.parametrize("lengths", [None, [7, 2, 5, 1, 3]])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_peepholes_are_onnx_runtimes(bidirectional, lengths):
    module, x, hx = peephole_lstm(bidirectional)
    model = onnx_model(module, lengths is not None).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    feeds = {"X": x.numpy(), "h0": hx[0].numpy(), "c0": hx[1].numpy()}
    if lengths:
        feeds["lengths"] = np.array(lengths, dtype=np.int32)
    theirs = session.run(None, feeds)
    ours = module(x, hx, lengths=None if lengths is None else torch.tensor(lengths))
    assert_close([torch.from_numpy(t) for t in theirs], as_onnx(*ours), **TOL)


# --- merge modes: Keras Bidirectional -------------------------------------------------------------


def carry_over(module, layer, wrapper):
    """Weights of one layer of module to a Keras Bidirectional: (in, 4H), gates i, f, c, o too."""
    for suffix, lstm in (("", wrapper.forward_layer), ("_reverse", wrapper.backward_layer)):
        names = [name + f"_l{layer}{suffix}" for name in ("weight_ih", "weight_hh")]
        kernel, recurrent = (getattr(module, name).detach().T.numpy() for name in names)
        biases = [getattr(module, f"bias_{kind}_l{layer}{suffix}") for kind in ("ih", "hh")]
        lstm.set_weights([kernel, recurrent, sum(biases).detach().numpy()])


# None with two layers is refused: a pair is no input.
MERGES = [(mode, layers) for mode in ("concat", "sum", "mul", "ave") for layers in (1, 2)]


@pytest.mark.parametrize("mode, layers", [*MERGES, (None, 1)])
def test_merge_modes_are_keras(mode, layers):
    module = lstm_ext.LSTM(
        I, H, layers, batch_first=True, bidirectional=True, merge_mode=mode, **F64
    )
    x = torch.randn(B, T, I, **F64)
    theirs = x
    for layer in range(layers):
        lstm = keras.layers.LSTM(H, return_sequences=True, dtype="float64")
        wrapper = keras.layers.Bidirectional(lstm, merge_mode=mode, dtype="float64")
        wrapper.build(tuple(theirs.shape))
        carry_over(module, layer, wrapper)
        theirs = wrapper(theirs)
    ours = module(x)[0]
    theirs = theirs if mode is not None else tuple(theirs)
    assert_close(ours, theirs, **tol(torch.float64))


# --- layer norm and zoneout: Haste ----------------------------------------------------------------


def haste_layer_norm_lstm(x, h, c, weights, gamma, gamma_h, beta_h, zoneout, mask):
    """Haste's LayerNormLSTM in torch: gates i, g, f, o; one bias; zoneout of h alone.

    mask (T, B, H): 1 where h is new; None while not training. gamma: (2, 4H).
    """
    kernel, recurrent_kernel, bias = weights
    hidden = h.size(1)
    outputs = []
    Wx = F.layer_norm(x @ kernel, (4 * hidden,), weight=gamma[0])
    for t in range(x.size(0)):
        Rh = F.layer_norm(h @ recurrent_kernel, (4 * hidden,), weight=gamma[1])
        i, g, f, o = torch.chunk(Wx[t] + Rh + bias, 4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        normed = F.layer_norm(c, (hidden,), weight=gamma_h, bias=beta_h)
        new = torch.sigmoid(o) * torch.tanh(normed)
        if mask is None:
            h = zoneout * h + (1 - zoneout) * new
        else:
            h = (new - h) * mask[t] + h
        outputs.append(h)
    return torch.stack(outputs), h, c


def haste_lstm(x, h, c, weights, zoneout, mask):
    """Haste's LSTM, likewise."""
    kernel, recurrent_kernel, bias = weights
    outputs = []
    for t in range(x.size(0)):
        i, g, f, o = torch.chunk(x[t] @ kernel + h @ recurrent_kernel + bias, 4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        new = torch.sigmoid(o) * torch.tanh(c)
        if mask is None:
            h = zoneout * h + (1 - zoneout) * new
        else:
            h = (new - h) * mask[t] + h
        outputs.append(h)
    return torch.stack(outputs), h, c


def igfo(rows):
    """From i, f, g, o."""
    i, f, g, o = rows.chunk(4)
    return torch.cat([i, g, f, o])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("zoneout", [0.0, 0.3])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_layer_norm_and_zoneout_are_hastes(recorder, layer_norm, zoneout, training):
    module = lstm_ext.LSTM(I, H, layer_norm=layer_norm, zoneout=(zoneout, 0), **F64).train(training)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    x, hx = torch.randn(T, B, I, **F64), (torch.randn(B, H, **F64), torch.randn(B, H, **F64))
    y, (h_n, c_n) = module(x, tuple(s[None] for s in hx))
    keep = recorder.directions[0].w.masks.keep_h if zoneout else torch.zeros(T * B, H)
    mask = 1.0 - keep.double().view(T, B, H) if training else None
    p = dict(module.named_parameters())
    bias = igfo(p["bias_ih_l0"] + p["bias_hh_l0"])
    weights = (igfo(p["weight_ih_l0"]).T, igfo(p["weight_hh_l0"]).T, bias)
    if layer_norm:
        gamma = torch.stack([igfo(p["gamma_ih_l0"]), igfo(p["gamma_hh_l0"])])
        norms = (gamma, p["gamma_ch_l0"], p["beta_ch_l0"])
        expected = haste_layer_norm_lstm(x, *hx, weights, *norms, zoneout, mask)
    else:
        expected = haste_lstm(x, *hx, weights, zoneout, mask)
    assert_close((y, h_n[0], c_n[0]), expected, **tol(torch.float64))
    cotangents = [torch.randn_like(t) for t in expected]
    ours = torch.autograd.grad((y, h_n[0], c_n[0]), list(p.values()), cotangents)
    theirs = torch.autograd.grad(expected, list(p.values()), cotangents)
    assert_close(ours, theirs, **tol(torch.float64))
