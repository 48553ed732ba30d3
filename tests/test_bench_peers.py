"""The peers compute nn.LSTM's function, or say why they do not run."""

import importlib.util
import sys
import types

import pytest
import torch
from tolerances import tol
from torch import nn

import lstm_ext
from bench import peers, timing, work
from bench.run import PEERS
from bench.suites import Problem
from bench.work import outcome

pytestmark = pytest.mark.cpu_only(reason="the peers of the CPU")
CPU = torch.device("cpu")


def run(name, problem, mode, dtype=torch.float32):
    return timing.run_row(
        problem, mode, peers.builders([name]), dtype=dtype, device=CPU, repeats=1, min_sample=0
    )


def test_names_and_order():
    assert tuple(peers.PEERS) == PEERS
    assert list(peers.builders(["haste"])) == ["nn.LSTM", "haste", "lstm_ext"]


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_rows_of_cells(mode, head):
    """nn.LSTMCell's and ours, at each step; the other peers are layers."""
    row = run("cell-loop", Problem(3, 2, 5, 7, cell=True, head=head), mode)
    for name in ("nn.LSTM", "lstm_ext"):
        timing = row.timings[name]
        assert timing.error is None and not timing.differs and len(timing.samples) == 1
    assert "has no cell" in row.timings["cell-loop"].error
    ours = work.build(lstm_ext.LSTM, row.problem)
    kinds = [work.Decoder, lstm_ext.LSTMCell, nn.Linear]
    assert [type(m) for m in ours.modules()] == (
        kinds if head else [work.Stepwise, lstm_ext.LSTMCell]
    )
    with pytest.raises(ValueError, match="no cell belongs to .*GRU"):
        work.build(nn.GRU, row.problem)


def test_weights_of_8_bits(monkeypatch):
    made = []
    outcome_of = timing.outcome
    monkeypatch.setattr(
        timing, "outcome", lambda *args: made.append(type(args[0])) or outcome_of(*args)
    )
    row = run("float", Problem(5, 2, 7, 19, num_layers=2, bidirectional=True), "quantized")
    reference, *modules = made
    assert reference is nn.LSTM  # in float64
    assert modules == [torch.ao.nn.quantized.dynamic.LSTM, lstm_ext.LSTM, lstm_ext.QuantizedLSTM]
    for one in row.timings.values():
        assert one.error is None and len(one.samples) == 1
    theirs, exact, ours = (row.timings[name].off_by for name in ("nn.LSTM", "float", "lstm_ext"))
    assert exact < 1e-5 < ours < theirs < 0.1
    in_floats = run("float", Problem(5, 2, 7, 19), "inference")
    assert "where nothing is quantized" in in_floats.timings["float"].error


@pytest.mark.parametrize("more", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_the_loop_over_cells(more, mode):
    row = run("cell-loop", Problem(3, 2, 5, 7, **more), mode)
    peer = row.timings["cell-loop"]
    assert peer.error is None and not peer.differs and len(peer.samples) == 1


@pytest.mark.parametrize("more", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_the_compiled_loop(more, monkeypatch):
    """Its step not compiled here, which takes seconds."""
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    problem = Problem(3, 2, 5, 7, **more)
    lstm = work.build(nn.LSTM, problem).double()
    loop = peers.CompiledLoop(lstm, problem, "training")
    x, cotangent = torch.randn(3, 2, 5).double(), torch.randn(3, 2, 7 * (2 if more else 1)).double()
    expected = outcome(lstm, x, "training", cotangent)
    found = outcome(loop, x, "training", cotangent)
    assert found.keys() == expected.keys() and len(found) == 2 + len(list(lstm.parameters()))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **tol(torch.float64))


def test_onnxruntime():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    peer = run("onnxruntime", Problem(3, 2, 5, 7, bidirectional=True), "inference").timings
    assert peer["onnxruntime"].error is None and not peer["onnxruntime"].differs


@pytest.mark.parametrize(
    "name, problem, mode, dtype, reason",
    [
        ("cell-loop", Problem(3, 2, 5, 7, lengths=(1, 3)), "inference", "float32", "packed input"),
        ("cell-loop", Problem(3, 2, 5, 7, proj_size=2), "inference", "float32", "no projections"),
        ("onnxruntime", Problem(3, 2, 5, 7), "training", "float32", "inference only"),
        ("onnxruntime", Problem(3, 2, 5, 7), "inference", "bfloat16", "no LSTM of bfloat16"),
    ],
)
def test_what_a_peer_does_not_do_is_said_in_its_row(name, problem, mode, dtype, reason):
    if name == "onnxruntime":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    row = run(name, problem, mode, getattr(torch, dtype))
    assert row.timings[name].error.startswith("Unsupported: ") and reason in row.timings[name].error
    assert row.ours.error is None and row.ratio() is not None


@pytest.mark.parametrize("name", ["flashrnn", "haste"])
def test_a_peer_that_is_not_there_says_so(name):
    package = {"flashrnn": "flashrnn", "haste": "haste_pytorch"}[name]
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is there")
    row = run(name, Problem(3, 2, 5, 7), "inference")
    assert f"Unsupported: {package} is not installed" in row.timings[name].error


@pytest.fixture
def flashrnn(monkeypatch):
    """A stand-in with FlashRNN's arguments and layouts, computing the LSTM in plain torch."""

    def flashrnn(Wx, R, b, config):
        T, B, four, heads, H = Wx.shape
        assert four == 4 and heads == 1 and R.shape == (4, 1, H, H) and b.shape == (4, 1, H)
        assert (config.hidden_dim, config.batch_size, config.backend) == (H, B, "vanilla")
        h = c = Wx.new_zeros(B, H)
        states = []
        for x in Wx[:, :, :, 0]:
            i, f, g, o = (x + torch.einsum("bp,gdp->bgd", h, R[:, 0]) + b[:, 0]).unbind(1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            states.append(torch.stack((h, c)))
        return torch.stack(states, 1).unsqueeze(3), None

    module = types.ModuleType("flashrnn")
    module.flashrnn = flashrnn
    module.FlashRNNConfig = lambda **options: types.SimpleNamespace(**options)
    monkeypatch.setitem(sys.modules, "flashrnn", module)
    monkeypatch.setattr(peers.FlashRNN, "backend", "vanilla")


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_flashrnn_with_the_input_product(flashrnn, mode):
    peer = run("flashrnn", Problem(3, 2, 5, 7), mode).timings["flashrnn"]
    assert peer.error is None and not peer.differs


def test_flashrnn_needs_a_gpu(flashrnn, monkeypatch):
    monkeypatch.setattr(peers.FlashRNN, "backend", "cuda_fused")
    peer = run("flashrnn", Problem(3, 2, 5, 7), "inference").timings["flashrnn"]
    assert peer.error == "Unsupported: a GPU only"


def test_a_drop_in_has_the_weights():
    problem = Problem(3, 2, 5, 7, num_layers=3, first_bidirectional=True)
    reference = work.build(nn.LSTM, problem).double()
    module = timing.drop_in(lstm_ext.LSTM)(reference, problem, "training")
    for name, parameter in reference.named_parameters():
        assert torch.equal(module.get_parameter(name), parameter)
