"""lstm_ext.onnx.export: standard nodes only, and ONNX Runtime's numbers on other sizes."""

import sys
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from exported import (
    ANY,
    MARKS,
    TOL,
    H,
    I,
    check,
    drawn,
    dynamic,
    export,
    inputs,
    leaves,
    lstm,
    nodes,
    onnx,
    run,
    states,
)
from tolerances import assert_as_good, tol
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

import lstm_ext

pytestmark = MARKS

CASES = {
    "plain": ({}, False, False),
    "no bias": ({"bias": False}, False, True),
    "batch first": ({"batch_first": True}, True, True),
    "peephole": ({"peephole": True, "bias": False}, False, False),
    "all": (
        dict(num_layers=2, bidirectional=True, peephole=True, batch_first=True, dropout=0.5),
        True,
        True,
    ),
    "bidirectional": ({"bidirectional": True, "num_layers": 3}, False, True),
    "projection": ({"proj_size": 3}, True, False),
    "projections": (
        dict(proj_size=2, num_layers=2, bidirectional=True, peephole=True, batch_first=True),
        True,
        True,
    ),
    "sum": (dict(bidirectional=True, merge_mode="sum", num_layers=2), True, True),
    "mul": (dict(bidirectional=True, merge_mode="mul", num_layers=2), False, True),
    "ave": (dict(bidirectional=True, merge_mode="ave", batch_first=True), False, False),
    "pair": (dict(bidirectional=True, merge_mode=None, proj_size=3), True, True),
}


@pytest.mark.parametrize("case", CASES)
def test_dynamic_sizes_are_the_modules(tmp_path, case):
    options, hx, lengths = CASES[case]
    module = lstm(**options)
    args, kwargs = inputs(module, 5, 3, hx, lengths)
    shapes = dynamic(module, hx, lengths)
    proto, session = export(tmp_path, module, args, kwargs, dynamic_shapes=shapes)
    assert len(nodes(proto)) == module.num_layers
    for T, B in ((5, 3), (11, 2), (1, 7), (40, 1)):
        check(session, module, *inputs(module, T, B, hx, lengths))


def test_without_dynamic_shapes_sizes_are_fixed(tmp_path):
    module = lstm()
    _, session = export(tmp_path, module, torch.randn(5, 3, I))
    assert session.get_inputs()[0].shape == [5, 3, I]
    check(session, module, (torch.randn(5, 3, I),))


@pytest.mark.parametrize("options", [{}, {"batch_first": True, "bidirectional": True}])
def test_unbatched(tmp_path, options):
    module = lstm(num_layers=2, **options)
    hx = tuple(s.squeeze(1) for s in states(module, 1))
    shapes = {"input": {0: ANY}, "hx": (None, None), "lengths": None}
    args, kwargs = (torch.randn(6, I), hx), {"lengths": torch.tensor(4)}
    _, session = export(tmp_path, module, args, kwargs, dynamic_shapes=shapes)
    check(session, module, args, kwargs)
    check(session, module, (torch.randn(9, I), hx), {"lengths": torch.tensor(7)})


def test_no_steps_keep_the_state_and_padding_is_not_seen(tmp_path):
    module = lstm(bidirectional=True, proj_size=3)
    args, kwargs = inputs(module, 5, 3, True, True)
    _, session = export(tmp_path, module, args, kwargs)
    kwargs = {"lengths": torch.tensor([0, 5, 2], dtype=torch.int64)}
    args[0][2:, 2] = float("nan")
    args[0][:, 0] = float("nan")
    check(session, module, args, kwargs)
    _, h_n, c_n = run(session, args, kwargs)
    assert torch.equal(h_n[:, 0], args[1][0][:, 0]) and torch.equal(c_n[:, 0], args[1][1][:, 0])


def test_lengths_of_another_dtype(tmp_path):
    module, dtype = lstm(), torch.uint8
    args, kwargs = (torch.randn(5, 3, I),), {"lengths": torch.tensor([1, 5, 3], dtype=dtype)}
    _, session = export(tmp_path, module, args, kwargs)
    check(session, module, args, kwargs)


@pytest.mark.parametrize("batched, hx", [(True, True), (True, False), (False, True)])
def test_cell(tmp_path, batched, hx):
    module = drawn(lstm_ext.LSTMCell(I, H, bias=batched, peephole=hx))

    def call(batch):
        size = (batch,) if batched else ()
        x, *state = (torch.randn(*size, n) for n in (I, H, H))
        return (x, tuple(state)) if hx else (x,)

    shapes = ({0: ANY}, ({0: ANY}, {0: ANY}))[: 1 + hx] if batched else None
    proto, session = export(tmp_path, module, call(3), dynamic_shapes=shapes)
    assert len(nodes(proto)) == 1
    check(session, module, call(3))
    check(session, module, call(8))


class Tagger(nn.Module):
    """An LSTM among other modules, and one of them twice."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, I)
        self.encoder = lstm_ext.LSTM(I, H, bidirectional=True, batch_first=True, peephole=True)
        self.again = lstm_ext.LSTM(2 * H, 2 * H, batch_first=True)
        self.cell = lstm_ext.LSTMCell(2 * H, 5)
        self.head = nn.Linear(2 * H, 3)

    def forward(self, tokens, lengths):
        y, _ = self.encoder(self.embedding(tokens), lengths=lengths)
        y, hx = self.again(y, lengths=lengths)
        y, (h, _) = self.again(y, hx, lengths=lengths)
        return self.head(y).log_softmax(-1), self.cell(h[0])


def test_inside_a_model(tmp_path):
    model = drawn(Tagger())

    def call(T, B):
        return torch.randint(20, (B, T)), torch.randint(0, T + 1, (B,))

    T, B = Dim("time"), Dim("batch")
    shapes = ({0: B, 1: T}, {0: B})
    names = {"input_names": ["tokens", "lengths"], "output_names": ["scores", "h", "c"]}
    before = list(model.state_dict())
    proto, session = export(tmp_path, model, call(6, 3), dynamic_shapes=shapes, **names)
    assert session.get_inputs()[0].shape == ["batch", "time"]
    assert [o.name for o in session.get_outputs()] == names["output_names"]
    assert len(nodes(proto)) == 4
    # The rearranged weights only, and one of each though there are two calls.
    weights = [t for t in proto.graph.initializer if "onnx_l0" in t.name]
    assert len(weights) == len({t.name for t in weights}) == 4 + 3 + 3
    assert not [t for t in proto.graph.initializer if "weight_hh" in t.name]
    assert list(model.state_dict()) == before
    for size in ((6, 3), (17, 2), (2, 9)):
        check(session, model, call(*size))


def test_cnn_lstm_with_lengths(tmp_path):
    cnn = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten())
    model = drawn(lstm_ext.CNNLSTM(cnn, lstm_ext.LSTM(2 * 2 * 3, H, batch_first=True)))

    def call(T, B):
        return (torch.randn(B, T, 1, 4, 5),), {"lengths": torch.randint(0, T + 1, (B,))}

    shapes = {"input": {0: ANY, 1: ANY}, "lengths": {0: ANY}}
    args, kwargs = call(5, 3)
    _, session = export(tmp_path, model, args, kwargs, dynamic_shapes=shapes)
    check(session, model, *call(9, 2))


class Residual(lstm_ext.LSTM):
    def forward(self, input, hx=None):
        time.perf_counter_ns()  # which torch.compile would not trace
        y, hx = super().forward(input, hx)
        return y + input, hx


@pytest.mark.parametrize("layers", [1, 2])
def test_a_subclass_keeps_what_it_adds(tmp_path, layers):
    module = drawn(Residual(H, H, layers))
    _, session = export(tmp_path, module, (torch.randn(5, 3, H),))
    check(session, module, (torch.randn(5, 3, H),))


def test_a_parametrized_weight(tmp_path):
    module = parametrizations.weight_norm(lstm(proj_size=3), "weight_hh_l0")
    _, session = export(tmp_path, module, (torch.randn(5, 3, I),))
    check(session, module, (torch.randn(5, 3, I),))


def test_half(tmp_path):
    """ONNX Runtime computes fp16 in fp32 on a CPU; it has no bf16 there."""
    module = lstm(bidirectional=True, num_layers=2)
    x = torch.randn(9, 3, I)
    truth = module.double()(x.double())[0].detach()
    module.half()
    _, session = export(tmp_path, module, (x.half(),))
    theirs = run(session, (x.half(),))[0]
    assert_as_good(theirs, module.to_torch()(x.half())[0].detach(), truth)


def test_bfloat16_is_written_with_the_opset_that_has_it(tmp_path):
    path, module, x = tmp_path / "model.onnx", lstm().bfloat16(), torch.randn(5, 3, I).bfloat16()
    lstm_ext.onnx.export(module, (x,), path, verbose=False)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert proto.opset_import[0].version == 22
    assert proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16
    with pytest.raises(ValueError, match="opset_version=22, got 20"):
        lstm_ext.onnx.export(module, (x,), opset_version=20, verbose=False)


def test_double_is_onnxs_reference_evaluators(tmp_path):
    """ONNX Runtime has no float64 there."""
    reference = pytest.importorskip("onnx.reference")
    path, module = tmp_path / "model.onnx", lstm(peephole=True, proj_size=3).double()
    args = tuple(torch.utils._pytree.tree_map(Tensor.double, inputs(module, 5, 3, True, False)[0]))
    lstm_ext.onnx.export(module, args, path, verbose=False)
    names = ["input", "hx_0", "hx_1"]
    feeds = {name: t.numpy() for name, t in zip(names, leaves(args), strict=True)}
    theirs = reference.ReferenceEvaluator(onnx.load(path)).run(None, feeds)
    ours = [t.detach() for t in leaves(module(*args))]
    assert_close([torch.from_numpy(t) for t in theirs], ours, **tol(torch.float64))


def test_the_operator():
    size = ((5, 3, I), (2, 4 * H, I), (2, 4 * H, H), (2, 8 * H), (2, 3, H), (2, 3, H), (2, 3 * H))
    x, w, r, b, h, c, p = (torch.randn(s) for s in size)
    lengths = torch.tensor([5, 0, 2], dtype=torch.int32)
    op = torch.ops.lstm_ext.onnx_lstm.default
    torch.library.opcheck(op, (x, w, r, b, lengths, h, c, p))
    torch.library.opcheck(op, (x, w[:1], r[:1], None, None, None, None, None))


def test_torchs_own_verification(tmp_path):
    """It runs what was traced, by the operator's implementation, and compares."""
    module = lstm(bidirectional=True, peephole=True)
    args, kwargs = inputs(module, 5, 3, True, True)
    program = lstm_ext.onnx.export(module, args, kwargs=kwargs, verify=True, verbose=False)
    ours = leaves(module(*args, **kwargs))
    assert_close(leaves(program.exported_program.module()(*args, **kwargs)), ours, **TOL)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, text",
    [
        ({"layer_norm": True}, "no layer_norm"),
        ({"zoneout": (0.0, 0.1)}, "no zoneout"),
        ({"return_cell_sequence": True}, "no return_cell_sequence"),
    ],
)
def test_what_onnx_cannot_say(options, text):
    model = nn.Sequential(nn.Identity(), lstm(**options))
    with pytest.raises(ValueError, match=rf"1 \(LSTM\).*{text}"):
        lstm_ext.onnx.export(model, (torch.randn(5, 3, I),))
    with pytest.raises(ValueError, match="no zoneout"):
        lstm_ext.onnx.export(lstm_ext.LSTMCell(I, H, zoneout=0.5), (torch.randn(3, I),))


@pytest.mark.parametrize("name", ["dropout", "recurrent_dropout", "weight_dropout"])
def test_a_dropout_that_is_on(tmp_path, name):
    module = lstm(num_layers=2, **{name: 0.5})
    with pytest.raises(ValueError, match=rf"{name}=0.5.*eval"):
        lstm_ext.onnx.export(module.train(), (torch.randn(5, 3, I),))
    _, session = export(tmp_path, module.eval(), (torch.randn(5, 3, I),))
    check(session, module, (torch.randn(5, 3, I),))


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = lstm_ext.LSTM(I, H)

    def forward(self, x):
        return self.lstm(pack_padded_sequence(x, torch.tensor([5, 3])))[1]


class Autocast(Packed):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.lstm(x)[1]


class InAList(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.modules_of_it = [module]

    def forward(self, x):
        return self.modules_of_it[0](x)


def replaced(module):
    """As packages do that wrap a module's forward."""
    forward = module.forward
    module.forward = lambda x: forward(x)
    return nn.Sequential(module)


def test_calls_refused():
    """While tracing, and what comes out is no page of torch's."""
    x = torch.randn(5, 2, I)
    mask = {"reset_mask": torch.zeros(5, 2, dtype=torch.bool)}
    dependent = lstm(proj_size=2)
    with torch.no_grad():
        dependent.weight_hr_l0[1] = dependent.weight_hr_l0[0]
    calls = [
        (lstm(), (x,), mask, ValueError, "no reset_mask"),
        (Packed().eval(), (x,), {}, ValueError, r"lstm \(LSTM\): a PackedSequence .* lengths="),
        (Autocast().eval(), (x,), {}, ValueError, "autocast is on"),
        (dependent, (x, states(dependent, 2)), {}, ValueError, "inverting weight_hr_l0"),
        (lstm(), (x[None],), {}, ValueError, "2D or 3D, got 4D"),
        (lstm(), (x[:, :, :3],), {}, RuntimeError, "Expected 4, got 3"),
        (lstm(), (x,), {"lengths": torch.tensor([1, 2, 3])}, ValueError, "lengths of size"),
        (lstm(), (x,), {"lengths": torch.tensor([1.0, 2.0])}, TypeError, "integer dtype"),
        (lstm(), (x,), {"lengths": [1, 2]}, TypeError, "a list would be fixed"),
        (lstm(), (None,), {}, AttributeError, "'NoneType' object has no attribute 'dim'"),
        (InAList(lstm()).eval(), (x,), {}, ValueError, r"LSTM\(4, 6\) ran, .*ModuleList"),
        (replaced(lstm()), (x,), {}, ValueError, r"0 \(LSTM\): it ran by a forward taken from it"),
        (replaced(lstm(num_layers=2)), (x,), {}, ValueError, "ran by a forward taken from it"),
        (replaced(lstm_ext.LSTMCell(I, H)), (x[0],), {}, ValueError, r"0 \(LSTMCell\): it ran by"),
        (lstm(), (x, states(lstm(), 3)), {}, RuntimeError, r"Expected hidden\[0\] size"),
    ]
    for model, args, kwargs, error, text in calls:
        with pytest.raises(error, match=text) as raised:
            lstm_ext.onnx.export(model, args, kwargs=kwargs, verbose=False)
        assert type(raised.value) is error, text


def test_wrong_arguments():
    with pytest.raises(TypeError, match="got function"):
        lstm_ext.onnx.export(F.relu, (torch.randn(3),))
    with pytest.raises(TypeError, match="dynamo=False"):
        lstm_ext.onnx.export(lstm(), (torch.randn(5, 3, I),), dynamo=False)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_packages_are_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"needs {package}.*pip install onnx onnxscript"):
        lstm_ext.onnx.export(lstm(), (torch.randn(5, 3, I),))


def test_torchs_own_export_names_this_one():
    with pytest.raises(Exception, match=r"use lstm_ext\.onnx\.export"):
        torch.onnx.export(lstm(), (torch.randn(5, 3, I),), dynamo=True, verbose=False)


# --- afterwards -----------------------------------------------------------------------------------


class Failing(nn.Module):
    """Fails after its LSTM ran; meanwhile another thread calls something."""

    def __init__(self, call):
        super().__init__()
        self.lstm, self.call = lstm(), call

    def forward(self, x):
        y = self.lstm(x)[0]
        thread = threading.Thread(target=self.call)
        thread.start()
        thread.join()
        raise KeyError("on purpose", y)


def test_a_call_in_another_thread_is_refused():
    def call():
        try:
            model.lstm(x)
        except RuntimeError as error:
            texts.append(str(error))

    x, texts, model = torch.randn(5, 3, I), [], Failing(call).eval()
    with pytest.raises(Exception, match="on purpose"):
        lstm_ext.onnx.export(model, (x,), verbose=False)
    assert "lstm (LSTM) is being exported to ONNX" in texts[0]


def test_everything_is_as_before_after_a_failure():
    x, other, results = torch.randn(5, 3, I), lstm(), []
    expected = other(x)[0]
    model = Failing(lambda: results.append(other(x)[0])).eval()
    kinds = (lstm_ext.LSTM, lstm_ext.LSTMCell, lstm_ext.CNNLSTM)
    forwards, keys, ours = [k.forward for k in kinds], list(model.state_dict()), model.lstm(x)[0]
    with pytest.raises(Exception, match="on purpose"):
        lstm_ext.onnx.export(model, (x,), verbose=False)
    assert forwards == [k.forward for k in kinds]
    assert list(model.state_dict()) == keys and not list(model.buffers())
    assert torch.equal(model.lstm(x)[0], ours)
    assert results and all(torch.equal(y, expected) for y in results)
