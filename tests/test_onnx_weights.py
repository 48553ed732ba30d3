"""lstm_ext.onnx.export of weights that are not simply the module's parameters."""

import pytest
import torch
from tolerances import tol
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

import lstm_ext

pytest.importorskip("onnx", reason="exports are read with it")
onnxruntime = pytest.importorskip("onnxruntime", reason="exports are run with it")
pytest.importorskip("onnxscript", reason="torch exports with it")

import lstm_ext.onnx  # noqa: E402

pytestmark = [
    pytest.mark.cpu_only(reason="a graph holds no device"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # torch's own, of its own
]

X = torch.randn(4, 2, 3)


def exported(model, path):
    """What ONNX Runtime makes of X by the exported model."""
    lstm_ext.onnx.export(model.eval(), (X,), path, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: X.numpy()})[0])


@pytest.mark.parametrize(
    "make",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda module, name: prune.l1_unstructured(module, name, 0.3),
        parametrizations.weight_norm,
    ],
    ids=["weight_norm", "spectral_norm", "prune", "parametrized"],
)
@pytest.mark.parametrize("kind", [lstm_ext.LSTM, lstm_ext.LSTMCell])
def test_weights_made_by_a_hook_after_an_optimizer_step(make, kind, tmp_path):
    """A hook makes the weight when the module runs: what it holds until then is of before the
    step."""
    cell = kind is lstm_ext.LSTMCell
    module = kind(3, 4)
    make(module, "weight_hh" if cell else "weight_hh_l0")
    module.to(torch.float32)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = module

        def forward(self, x):
            if not cell:
                return self.lstm(x)[0]
            hx = None
            for step in x.unbind(0):
                hx = self.lstm(step, hx)
            return hx[0]

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model(X).detach()
    model(X).square().sum().backward()
    optimizer.step()
    found = exported(model, tmp_path / "model.onnx")
    expected = model(X).detach()
    assert (expected - before).abs().max() > 1e-2
    assert_close(found, expected, **tol(torch.float32))
    assert not [name for name in module._buffers if "onnx" in name]


class Calls(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = lstm_ext.LSTM(3, 4)

    def forward(self, x):
        weights = {name: 2 * weight for name, weight in self.lstm.named_parameters()}
        return torch.func.functional_call(self.lstm, weights, (x,))[0]


class Sets(nn.Module):
    """As AWD-LSTM's WeightDrop."""

    def __init__(self, anew):
        super().__init__()
        self.lstm, self.anew = lstm_ext.LSTM(3, 4), anew
        self.raw = nn.Parameter(self.lstm.weight_hh_l0.detach().clone())
        del self.lstm.weight_hh_l0
        self.lstm.weight_hh_l0 = self.raw.detach().clone()

    def forward(self, x):
        if self.anew:
            self.lstm.weight_hh_l0 = self.raw * 2
        return self.lstm(x)[0]


class CallsWithAnothers(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.other = lstm_ext.LSTM(3, 4), lstm_ext.LSTM(3, 4)

    def forward(self, x):
        weights = dict(self.other.named_parameters())
        return torch.func.functional_call(self.lstm, weights, (x,))[0]


class SetsItsOwn(nn.Module):
    """One that is a parameter too."""

    def __init__(self):
        super().__init__()
        self.lstm, self.w = lstm_ext.LSTM(3, 4), nn.Parameter(torch.randn(16, 4))

    def forward(self, x):
        self.lstm.weight_hh_l0 = self.w
        return self.lstm(x)[0]


class Makes(nn.Module):
    """A network that makes weights, in the place of what was a parameter."""

    def __init__(self):
        super().__init__()
        self.lstm, self.network = lstm_ext.LSTM(3, 4), nn.Linear(2, 64)

    def forward(self, x):
        self.lstm._parameters.pop("weight_hh_l0", None)
        self.lstm.weight_hh_l0 = self.network(x.new_ones(2)).view(16, 4)
        return self.lstm(x)[0]


class Changes(nn.Module):
    """One in place, or what a parametrization makes it of."""

    def __init__(self, parametrized):
        super().__init__()
        self.lstm, self.parametrized = lstm_ext.LSTM(3, 4), parametrized
        if parametrized:
            parametrizations.weight_norm(self.lstm, "weight_hh_l0")

    @torch.no_grad()
    def change(self, *args):
        weight = self.lstm.weight_hh_l0
        if self.parametrized:
            weight = self.lstm.parametrizations.weight_hh_l0.original0
        weight.mul_(0.5)

    def forward(self, x):
        self.change()
        return self.lstm(x)[0]


@pytest.mark.parametrize("parametrized", [False, True])
@pytest.mark.parametrize("hook", [False, True])
def test_weights_changed_in_place_while_the_model_runs_are_refused(parametrized, hook, tmp_path):
    model, path = Changes(parametrized).eval(), tmp_path / "model.onnx"
    if hook:  # it changes them before the model runs
        change, model = model.change, nn.Sequential(model.lstm).eval()
        model.register_forward_pre_hook(change)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"weight_hh_l0 changed in place while it ran"):
        lstm_ext.onnx.export(model, (X,), path, verbose=False)
    assert not path.exists()
    assert all(map(torch.equal, before, model.parameters()))


def test_weights_made_in_inference_mode(tmp_path):
    """They count no changes."""
    with torch.inference_mode():
        model = nn.Sequential(lstm_ext.LSTM(3, 4))
    with torch.no_grad():
        assert_close(exported(model, tmp_path / "model.onnx"), model(X)[0], **tol(torch.float32))


@pytest.mark.parametrize(
    "name, weight, error, text",
    [
        ("bias_hh_l0", torch.randn(12), RuntimeError, r"bias_hh of size \(16,\), got \(12,\)"),
        ("weight_hh_l0", torch.randn(16, 5), RuntimeError, r"weight_hh of size \(16, 4\)"),
        ("bias_ih_l0", torch.randn(16).double(), RuntimeError, "parameter tensor with .*float64"),
        ("weight_ih_l0", None, TypeError, "weight_ih_l0: expected a Tensor, got NoneType"),
        ("bidirectional", True, RuntimeError, "bidirectional=True.* cannot be changed afterwards"),
        ("bias", False, RuntimeError, "bias=False.* cannot be changed afterwards"),
    ],
)
def test_weights_that_the_module_refuses(name, weight, error, text, tmp_path):
    model, path = nn.Sequential(lstm_ext.LSTM(3, 4)), tmp_path / "model.onnx"
    made = nn.Parameter(weight) if isinstance(weight, torch.Tensor) else weight
    setattr(model[0], name, made)
    for call in (model, lambda x: lstm_ext.onnx.export(model, (x,), path, verbose=False)):
        with pytest.raises(error, match=text):
            call(X)
    assert not path.exists()


@pytest.mark.parametrize("name", ["bias_ih", "bias_hh"])
def test_a_cell_may_have_one_bias(name, tmp_path):
    model = nn.Sequential(lstm_ext.LSTMCell(3, 4)).eval()
    setattr(model[0], name, None)
    path = tmp_path / "model.onnx"
    lstm_ext.onnx.export(model, (X[0],), path, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    h = torch.from_numpy(session.run(None, {"input": X[0].numpy()})[0])
    assert_close(h, model(X[0])[0], **tol(torch.float32))


@pytest.mark.parametrize(
    "model, name",
    [
        (Calls(), "weight_ih_l0"),
        (CallsWithAnothers(), "weight_ih_l0"),
        (Sets(True), "weight_hh_l0"),
        (SetsItsOwn(), "weight_hh_l0"),
        (Makes(), "weight_hh_l0"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_weights_given_while_the_model_runs_are_refused(model, name, tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(ValueError, match=rf"lstm \(LSTM\): .* got another {name} while it ran"):
        lstm_ext.onnx.export(model.eval(), (X,), path, verbose=False)
    assert not path.exists()
    model(X)  # as it was before


def test_spectral_norm_in_training_is_refused(tmp_path):
    """Every run of it takes a step of an iteration."""
    module = nn.utils.spectral_norm(lstm_ext.LSTM(3, 4), "weight_hh_l0")
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with pytest.raises(ValueError, match=r"spectral_norm in training: call model.eval\(\) before"):
        lstm_ext.onnx.export(module, (X,), tmp_path / "model.onnx", verbose=False)
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())


def test_a_weight_that_is_a_plain_tensor(tmp_path):
    model = Sets(False)
    assert_close(exported(model, tmp_path / "model.onnx"), model(X), **tol(torch.float32))


def test_one_module_under_two_names(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = lstm_ext.LSTM(3, 3, 2)
            self.second = self.first
            self.cnn = lstm_ext.CNNLSTM(nn.Linear(3, 3), self.first)

        def forward(self, x):
            return self.cnn(self.second(self.first(x)[0])[0])[0]

    model = Model()
    assert_close(exported(model, tmp_path / "model.onnx"), model(X), **tol(torch.float32))
