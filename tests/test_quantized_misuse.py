"""What quantize takes and leaves alone, and the errors of modules with weights of 8 bits."""

import copy
import warnings

import pytest
import torch
from eight_bits import MARKS
from torch import nn
from torch.nn.utils import parametrize, prune

import lstm_ext
from lstm_ext import QuantizedLSTM, QuantizedLSTMCell, quantize

pytestmark = MARKS


def test_every_lstm_of_a_model():
    shared = nn.LSTM(3, 4)
    model = nn.ModuleDict(
        {
            "a": nn.Sequential(shared, nn.Linear(4, 4)),
            "b": shared,
            "c": lstm_ext.LSTM(3, 4),
            "d": nn.LSTMCell(3, 4),
            "e": lstm_ext.LSTMCell(3, 4),
        }
    )
    assert quantize(model) is model
    kinds = [type(model[name]) for name in "bcde"]
    assert kinds == [QuantizedLSTM, QuantizedLSTM, QuantizedLSTMCell, QuantizedLSTMCell]
    assert model["a"][0] is model["b"]
    assert isinstance(model["a"][1], nn.Linear)
    before = model["c"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(model)  # again: nothing to do
    assert model["c"] is before


def test_hooks_stay():
    module, seen = nn.LSTM(3, 4), []
    module.register_forward_hook(lambda *args: seen.append(1))
    quantize(module)(torch.randn(2, 1, 3))
    assert seen == [1]


@pytest.mark.parametrize(
    "options", [{"peephole": True}, {"layer_norm": True}, {"zoneout": 0.1}], ids=str
)
def test_variants_are_left_alone(options):
    (name,) = options
    model = nn.Sequential(lstm_ext.LSTM(3, 4, **options), lstm_ext.LSTMCell(3, 4, **options))
    with pytest.warns(UserWarning, match=rf"0 \(LSTM\): .* without {name}; .*; 1 \(LSTMCell\)"):
        quantize(model)
    assert type(model[0]) is lstm_ext.LSTM and type(model[1]) is lstm_ext.LSTMCell
    with pytest.raises(ValueError, match=f"without {name}"):
        QuantizedLSTM.from_float(model[0])


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_replaced_weights_are_left_alone():
    pruned, normed, x = nn.LSTM(3, 4), nn.LSTM(3, 4), torch.randn(2, 1, 3)
    prune.l1_unstructured(pruned, "bias_hh_l0", 0.5)
    nn.utils.weight_norm(normed, "weight_hh_l0")
    meta = nn.LSTM(3, 4, device="meta")
    model = nn.ModuleList([pruned, normed, meta])
    before = [module(x)[0] for module in model[:2]]
    words = r"0 \(LSTM\): .* bias_hh_l0, which was replaced.*1 \(LSTM\).*2 \(LSTM\): .*meta device"
    with pytest.warns(UserWarning, match=words):
        quantize(model)
    assert [type(module) for module in model] == [nn.LSTM] * 3
    assert all(torch.equal(m(x)[0], y) for m, y in zip(model[:2], before, strict=True))


def test_a_parameter_of_the_user_stays():
    module = nn.LSTM(3, 4)
    module.own = nn.Parameter(torch.ones(2))
    assert [name for name, _ in quantize(module).named_parameters()] == ["own"]


def test_what_is_of_training_is_gone():
    module = lstm_ext.LSTM(
        3, 4, 2, dropout=0.5, checkpoint_every=2, forget_bias=1.0, weight_dropout=0.5
    )
    assert repr(quantize(module)) == "QuantizedLSTM(3, 4, num_layers=2)"


def test_subclasses_are_left_alone():
    class Own(lstm_ext.LSTM):
        pass

    module = Own(3, 4)
    with pytest.warns(UserWarning, match="quantize left alone, being subclasses"):
        assert quantize(module) is module
    with pytest.raises(TypeError, match="no subclass"):
        QuantizedLSTM.from_float(module)


# --- errors ---------------------------------------------------------------------------------------


def test_gradients_are_refused():
    module, x = quantize(nn.LSTM(3, 4)), torch.randn(2, 1, 3, requires_grad=True)
    with torch.enable_grad():
        with pytest.raises(RuntimeError, match="for inference, got a tensor that requires grad"):
            module(x)
        with pytest.raises(RuntimeError, match="for inference"):
            module(x.detach(), (torch.zeros(1, 1, 4), torch.zeros(1, 1, 4).requires_grad_()))
        assert not module(x.detach())[0].requires_grad
    with pytest.raises(RuntimeError, match="or has a tangent"):
        torch.func.jvp(lambda t: module(t)[0], (x.detach(),), (x.detach(),))


def test_wrong_inputs():
    module = quantize(nn.LSTM(3, 4))
    with pytest.raises(ValueError, match=r"one of the types torch.float32.*, got torch.float64"):
        module(torch.randn(2, 1, 3).double())
    with pytest.raises(RuntimeError, match="Expected 3, got 5"):
        module(torch.randn(2, 1, 5))
    with pytest.raises(ValueError, match="2D or 3D, got 4D"):
        module(torch.randn(2, 1, 1, 3))
    with pytest.raises(RuntimeError, match="dimensions, got 3"):
        module.check_input(torch.randn(2, 1, 3), torch.tensor([1]))
    with pytest.raises(RuntimeError, match="hidden tensors are not the same dtype"):
        module(torch.randn(2, 1, 3), (torch.zeros(1, 1, 4).double(),) * 2)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size"):
        module(torch.randn(2, 1, 3), (torch.zeros(1, 1, 5), torch.zeros(1, 1, 4)))
    with pytest.raises(RuntimeError, match="run on the CPU, got a tensor on meta"):
        module(torch.randn(2, 1, 3, device="meta"))
    with pytest.raises(RuntimeError, match="Expected 3, got|input_size: got 5"):
        quantize(nn.LSTMCell(3, 4))(torch.randn(2, 5))
    with pytest.raises(ValueError, match="got torch.float64"):
        quantize(nn.LSTMCell(3, 4))(torch.randn(2, 3).double())


@pytest.mark.parametrize("make", [nn.LSTM, nn.LSTMCell])
def test_what_autocast_does_not_cast_is_refused(make):
    module, x, state = quantize(make(3, 4)), torch.randn(2, 3), torch.randn(2, 4)
    if make is nn.LSTM:
        x, state = x.unsqueeze(0), state.unsqueeze(0)
    for dtype in (torch.float64, torch.complex64, torch.int64, torch.bool):
        with torch.autocast("cpu", torch.bfloat16):
            with pytest.raises(ValueError, match=f"one of the types .*, got {dtype}"):
                module(x.to(dtype))
            with pytest.raises(RuntimeError, match=f"hidden tensor with {dtype}"):
                module(x, (state, state.to(dtype)))


def test_wrong_buffers():
    x = torch.randn(2, 1, 3)
    for name, wrong, words in (
        ("weight_ih_l0", torch.ones(1, 1, 64, dtype=torch.uint8), r"weight_ih: expected size"),
        ("scale_ih_l0", torch.ones(15), r"scale_ih: expected size \(16,\), got \(15,\)"),
        ("weight_hh_l0", torch.ones(1, 1, 256), "weight_hh: expected torch.uint8 on the CPU"),
        ("bias_sum_l0", torch.ones(16).half(), "bias: expected torch.float32 .* torch.float16"),
    ):
        module = quantize(nn.LSTM(3, 4))
        setattr(module, name, wrong)
        with pytest.raises(RuntimeError, match=words):
            module(x)


@pytest.mark.parametrize(
    "name", ["weight_ih_l0", "scale_hh_l0", "bias_sum_l0", "weight_hr_l0", "scale_hr_l0"]
)
@pytest.mark.parametrize("kwargs", [{}, {"lengths": torch.tensor([2])}], ids=str)
def test_missing_buffers(name, kwargs):
    module, x = quantize(nn.LSTM(3, 4, proj_size=2)), torch.randn(2, 1, 3)
    buffer = getattr(module, name)
    for value, got in ((None, "None"), (nn.Parameter(buffer, requires_grad=False), "a Parameter")):
        setattr(module, name, value)
        with pytest.raises(RuntimeError, match=rf"{name}: expected the buffer .* got {got}"):
            module(x, **kwargs)
        with pytest.raises(RuntimeError, match=rf"{name}: expected the buffer .* got {got}"):
            module.dequantize()
    module = quantize(nn.LSTM(3, 4, proj_size=2))
    parametrize.register_parametrization(module, name, nn.Identity())
    with pytest.raises(RuntimeError, match=rf"{name}: expected .* got a parametrization"):
        module(x, **kwargs)


def test_a_missing_buffer_of_a_cell():
    cell = quantize(nn.LSTMCell(3, 4))
    cell.bias_sum = None
    with pytest.raises(RuntimeError, match="bias_sum: expected the buffer .* got None"):
        cell(torch.randn(2, 3))
    without = quantize(nn.LSTMCell(3, 4, bias=False))
    assert without(torch.randn(2, 3))[0].shape == (2, 4)


@pytest.mark.parametrize(
    "name, value", [("num_layers", 1), ("bidirectional", False), ("merge_mode", "sum")]
)
@pytest.mark.parametrize("kwargs", [{}, {"lengths": torch.tensor([2])}], ids=str)
def test_changed_attributes(name, value, kwargs):
    module = quantize(nn.LSTM(3, 4, 2, bidirectional=True))
    setattr(module, name, value)
    with pytest.raises(RuntimeError, match="cannot be changed afterwards"):
        module(torch.randn(2, 1, 3), **kwargs)
    with pytest.raises(RuntimeError, match="cannot be changed afterwards"):
        module.dequantize()


@pytest.mark.parametrize(
    "name, value", [("bias", False), ("input_size", 4), ("zoneout", 0.5), ("checkpoint_every", 2)]
)
def test_other_changed_attributes(name, value):
    module = quantize(nn.LSTM(3, 4))
    setattr(module, name, value)
    with pytest.raises(RuntimeError, match="cannot be changed afterwards"):
        module(torch.randn(2, 1, module.input_size))


@pytest.mark.parametrize("name, value", [("bias", False), ("zoneout", 0.5)])
def test_changed_attributes_of_a_cell(name, value):
    cell = quantize(nn.LSTMCell(3, 4))
    setattr(cell, name, value)
    for call in (cell, lambda x: cell.dequantize()):
        with pytest.raises(RuntimeError, match="cannot be changed afterwards"):
            call(torch.randn(2, 3))


def test_weights_that_float32_has_not():
    module = lstm_ext.LSTM(3, 4).double()
    for value, got in ((1e300, "1e[+]300, which is none in float32"), (torch.inf, "infinity")):
        module.weight_hh_l0.data[1, 2] = value
        with pytest.raises(ValueError, match=f"finite weights, got {got}"):
            QuantizedLSTM.from_float(module)


@pytest.mark.parametrize("make", [nn.LSTM, nn.LSTMCell])
def test_a_state_dict_of_other_sizes(make):
    """Also where the codes take as many bytes."""
    for inputs in (4, 6, 7, 8, 9):
        for own in (5, 8, 6):
            module = quantize(make(own, 19))
            state = quantize(make(inputs, 19)).state_dict()
            if inputs == own:
                module.load_state_dict(state)
                continue
            with pytest.raises(RuntimeError, match="weight_ih"):
                module.load_state_dict(state)
    layers = {"num_layers": 2, "bidirectional": True, "proj_size": 5}
    state = quantize(lstm_ext.LSTM(7, 19, **layers)).state_dict()
    quantize(lstm_ext.LSTM(7, 19, **layers)).load_state_dict(state)
    merged = quantize(lstm_ext.LSTM(7, 19, **layers, merge_mode="sum"))
    with pytest.raises(RuntimeError, match="weight_ih_l1"):
        merged.load_state_dict(state)
    merged.load_state_dict(quantize(lstm_ext.LSTM(7, 19, **layers, merge_mode="mul")).state_dict())


def test_dequantized_is_float32_on_the_cpu():
    module = quantize(nn.LSTM(3, 4))
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            back = module.dequantize()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {(p.dtype, p.device.type) for p in back.parameters()} == {(torch.float32, "cpu")}


def test_the_tracer_is_refused():
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace.*Use torch\.export.*dequantize"):
        torch.jit.trace(quantize(nn.LSTM(3, 4)), torch.randn(2, 1, 3))


def test_buffers_may_be_strided():
    module, x = quantize(nn.LSTM(3, 4)), torch.randn(2, 1, 3)
    before = module(x)[0], module(x, lengths=torch.tensor([2]))[0]
    module.scale_ih_l0 = torch.stack([module.scale_ih_l0] * 2, 1)[:, 0]
    module.weight_hh_l0 = module.weight_hh_l0.transpose(1, 2).contiguous().transpose(1, 2)
    after = module(x)[0], module(x, lengths=torch.tensor([2]))[0]
    assert all(map(torch.equal, before, after))


def test_what_it_is_not():
    module = quantize(nn.LSTM(3, 4))
    with pytest.raises(TypeError, match=r"made of a module with weights: .*from_float"):
        QuantizedLSTM(3, 4)
    with pytest.raises(RuntimeError, match="no parameters to draw"):
        module.reset_parameters()
    with pytest.raises(TypeError, match=r"no QuantizedLSTM: use dequantize\(\)"):
        module.to_torch()
    for make in (quantize, QuantizedLSTM.from_torch):
        with pytest.raises(ValueError, match="activation_bits should be 8 or 16, got 4"):
            make(nn.LSTM(3, 4), activation_bits=4)
    with pytest.raises(TypeError, match="quantize: expected a torch.nn.Module, got int"):
        quantize(3)


def test_onnx_is_told_to_dequantize(tmp_path):
    onnx = pytest.importorskip("lstm_ext.onnx")
    model = nn.Sequential(quantize(nn.LSTM(3, 4)))
    with pytest.raises(ValueError, match=r"0 \(QuantizedLSTM\).* dequantize\(\)"):
        onnx.export(model, torch.randn(2, 1, 3), tmp_path / "m.onnx")


@pytest.mark.parametrize("bits", [4, 8.0, True, "8"])
def test_activation_bits_are_8_or_16(bits):
    with pytest.raises(ValueError, match="activation_bits should be 8 or 16, got"):
        quantize(lstm_ext.LSTM(3, 4), bits)
    module = quantize(lstm_ext.LSTM(3, 4))
    with pytest.raises(ValueError, match="activation_bits should be 8 or 16, got"):
        module.activation_bits = bits
    assert module.activation_bits == 16


def test_activation_bits_of_what_is_quantized_already():
    model = nn.ModuleList([lstm_ext.LSTM(64, 64), lstm_ext.LSTMCell(3, 4)])
    x = torch.randn(3, 2, 64)
    other = copy.deepcopy(model)
    assert quantize(quantize(model), 8) is model and quantize(quantize(other, 8)) is other
    assert [m.activation_bits for m in (*model, *other)] == [8] * 4
    with torch.inference_mode():
        assert torch.equal(model[0](x)[0], other[0](x)[0])
