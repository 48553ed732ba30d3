"""What tests of lstm_ext.onnx.export share: modules, inputs, and ONNX Runtime's numbers of a file.

Every parameter is drawn anew, for with those of a fresh module the gates hardly move.
"""

import pytest
import torch
from tolerances import tol
from torch.export import Dim
from torch.testing import assert_close

import lstm_ext

onnx = pytest.importorskip("onnx", reason="exports are read with it")
onnxruntime = pytest.importorskip("onnxruntime", reason="exports are run with it")
pytest.importorskip("onnxscript", reason="torch exports with it")

import lstm_ext.onnx  # noqa: E402

MARKS = [
    pytest.mark.cpu_only(reason="a graph holds no device"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # torch's own, of its own
]

I, H = 4, 6
TOL = tol(torch.float32)
ANY = Dim.DYNAMIC


def drawn(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module.eval()


def lstm(*args, **kwargs):
    return drawn(lstm_ext.LSTM(I, H, *args, **kwargs))


def states(module, batch):
    count = module.num_layers * (1 + module.bidirectional)
    h = torch.randn(count, batch, module.proj_size or H)
    return h, torch.randn(count, batch, H)


def inputs(module, T, B, hx, lengths):
    """args, kwargs of a call."""
    x = torch.randn(B, T, I) if module.batch_first else torch.randn(T, B, I)
    kwargs = {"lengths": torch.randint(1, T + 1, (B,))} if lengths else {}
    return (x, states(module, B)) if hx else (x,), kwargs


def dynamic(module, hx, lengths):
    shapes = {"input": {0: ANY, 1: ANY}}
    if hx:
        shapes["hx"] = ({1: ANY}, {1: ANY})
    if lengths:
        shapes["lengths"] = {0: ANY}
    return shapes


def export(tmp_path, model, args, kwargs=None, **options):
    """The file, as onnx reads it, and a session on it; no node is anything but ONNX's own."""
    path = tmp_path / "model.onnx"
    lstm_ext.onnx.export(model, args, path, kwargs=kwargs, verbose=False, **options)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert {node.domain for node in proto.graph.node} == {""}
    assert not proto.functions
    assert [o.domain for o in proto.opset_import] == [""]
    constants = {tensor.name for tensor in proto.graph.initializer}
    for node in nodes(proto):
        attributes = {a.name: a.i for a in node.attribute}
        assert attributes.pop("layout", 0) == attributes.pop("input_forget", 0) == 0
        assert set(attributes) == {"direction", "hidden_size"}  # no clip, no activations
        assert {node.input[1], node.input[2]} <= constants
    return proto, onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def nodes(proto):
    return [node for node in proto.graph.node if node.op_type == "LSTM"]


def leaves(tree):
    return torch.utils._pytree.tree_leaves(tree)


def run(session, args, kwargs=None):
    values = [t.numpy() for t in leaves((args, kwargs or {}))]
    names = [i.name for i in session.get_inputs()]
    results = session.run(None, dict(zip(names, values, strict=True)))
    return [torch.from_numpy(r) for r in results]


def check(session, model, args, kwargs=None):
    with torch.no_grad():
        expected = leaves(model(*args, **(kwargs or {})))
    assert_close(run(session, args, kwargs), expected, **TOL)
