"""Weights of 8 bits: codes, products, and the modules beside the LSTM whose weights they stand for.

That LSTM, dequantize(), computes in float64 here. Against it only inputs and states are rounded, to
16 bits: some 1e-5 at these sizes. Without their lower byte it would be some 1e-3.
"""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_sequence

import lstm_ext
from lstm_ext import QuantizedLSTM, QuantizedLSTMCell, quantize
from lstm_ext.quantization import pack, packed_size, unpack

pytestmark = pytest.mark.cpu_only(reason="weights of 8 bits are for the CPU")


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def flat(result):
    """The tensors of what a module returns."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, nn.utils.rnn.PackedSequence):
        return [result.data]
    return [tensor for part in result for tensor in flat(part)]


def in_float64(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, nn.utils.rnn.PackedSequence):
        return value.double()
    return tuple(map(in_float64, value))


def check(quantized, *args, atol=1e-4, **kwargs):
    """quantized computes what the LSTM of its weights does."""
    made = quantized(*args, **kwargs)
    args = [None if arg is None else in_float64(arg) for arg in args]
    expected = quantized.dequantize().double()(*args, **kwargs)
    for a, b in zip(flat(made), flat(expected), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=atol)


# --- codes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, columns, gates", [(4, 1, 4), (64, 8, 4), (68, 30, 4), (37, 5, 1)])
def test_codes_are_the_nearest(rows, columns, gates):
    weight = torch.randn(rows, columns)
    weight[1] = 0
    codes, scale = pack(weight, gates)
    assert codes.dtype == torch.uint8
    assert codes.shape == packed_size(rows, columns, gates)
    back = unpack(codes, scale, columns)
    torch.testing.assert_close(scale, weight.abs().amax(1) / 127)
    assert ((back - weight).abs() <= scale[:, None] * 0.5001).all()
    assert (back[1] == 0).all()


def test_codes_lie_in_blocks_of_16_rows():
    # Row 17 of gate 2, column 6: the second block's second row.
    weight = torch.zeros(4 * 20, 10)
    weight[2 * 20 + 17, 6] = 1
    codes, _ = pack(weight)
    at = codes.view(2, 3, 4, 16, 4)
    assert at[1, 1, 2, 1, 2] == 255
    at[1, 1, 2, 1, 2] = 128
    there = at.permute(2, 0, 3, 1, 4).reshape(4, 32, 12)
    assert (there[:, :20, :10] == 128).all()
    there[:, :20, :10] = 0
    assert (there == 0).all()


def test_an_infinite_weight_is_refused():
    with pytest.raises(ValueError, match="expected finite weights"):
        pack(torch.tensor([[1.0, float("inf")]] * 4))


def test_too_many_columns_are_refused():
    with pytest.raises(ValueError, match="at most 65536 columns, got 65537"):
        pack(torch.zeros(4, 65537))


# --- products -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 50])
@pytest.mark.parametrize("inputs, hidden", [(1, 1), (7, 19), (64, 33), (30, 70), (3, 150)])
def test_a_layer_on_every_instruction_set(isa, inputs, hidden, batch):
    check(quantize(nn.LSTM(inputs, hidden)), torch.randn(5, batch, inputs))


@pytest.mark.parametrize("batch", [1, 2, 6, 7, 50])
def test_rows_of_8_bits(isa, batch):
    """A scale of some 3: rounded to a hundredth, and summed up."""
    module = quantize(lstm_ext.LSTM(30, 70, proj_size=40), activation_bits=8)
    assert "activation_bits=8" in repr(module)
    x, lengths = torch.randn(5, batch, 30), torch.full((batch,), 5)
    check(module, x, atol=0.02)
    with pytest.raises(AssertionError):
        check(module, x)
    assert torch.equal(module(x)[0], module(x, lengths=lengths)[0])


def test_rows_of_8_bits_are_the_nearest(isa):
    """Where all are whole numbers, nothing is rounded."""
    module = nn.LSTM(64, 20)
    torch.nn.init.zeros_(module.weight_hh_l0)
    module.weight_ih_l0.copy_(torch.randint(-127, 128, (80, 64)) / 2**12)
    module.weight_ih_l0[:, 0] = 127 / 2**12
    x = torch.randint(-127, 128, (1, 9, 64)) / 2.0**6
    x[..., 5] = -127 / 2.0**6
    quantized = quantize(module, activation_bits=8)
    check(quantized, x, atol=1e-6)
    check(quantized, x * 100, atol=1e-6)
    x[..., 7] += 0.25 / 2.0**6
    with pytest.raises(AssertionError):
        check(quantized, x, atol=1e-6)


@pytest.mark.parametrize("value", [1.0, -1.0])
def test_sums_do_not_overflow(isa, value):
    # All products of one sign and as large as they get.
    module = nn.LSTM(5000, 3)
    for parameter in module.parameters():
        parameter.zero_()
    module.weight_ih_l0.fill_(2e-4)
    x = torch.full((1, 3, 5000), value)
    x[:, 1] *= 0.5
    check(quantize(module), x)


def test_the_largest_width(isa):
    module = nn.LSTM(65536, 1)
    module.weight_ih_l0.fill_(1e-5)
    check(quantize(module), torch.ones(1, 1, 65536))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_do_not_change_a_bit(isa, threads, bits):
    module = quantize(nn.LSTM(40, 100, 2, bidirectional=True), activation_bits=bits)
    x = torch.randn(20, 6, 40)
    alone = module(x)
    torch.set_num_threads(threads)
    for a, b in zip(flat(module(x)), flat(alone), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bits", [8, 16])
def test_the_batch_around_a_sequence_does_not_change_a_bit(isa, bits):
    module, x = quantize(nn.LSTM(40, 50), activation_bits=bits), torch.randn(20, 60, 40)
    y, _ = module(x)
    for b in (0, 1, 17, 59):
        assert torch.equal(module(x[:, b : b + 1])[0], y[:, b : b + 1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_sequence(isa, bad):
    module, x = quantize(nn.LSTM(8, 20)), torch.randn(6, 4, 8)
    clean, _ = module(x)
    x[2, 1, 5] = bad
    y, (h_n, c_n) = module(x)
    assert torch.equal(y[:2], clean[:2])
    assert y[2:, 1].isnan().all()
    assert h_n[0, 1].isnan().all() and c_n[0, 1].isnan().all()
    others = [0, 2, 3]
    assert torch.equal(y[:, others], clean[:, others])


def test_rows_have_scales_of_their_own(isa):
    module, x = quantize(nn.LSTM(8, 20)), torch.randn(4, 3, 8)
    x[1] *= 1e4
    x[2] *= 1e-4
    x[3] = 0
    x[:, 2] *= 1e-38
    check(module, x)


def test_small_rows_are_not_zero(isa):
    module = nn.LSTM(8, 20)
    module.weight_ih_l0.mul_(1e20)
    check(quantize(module), torch.randn(4, 3, 8) * 1e-20)


def test_a_large_initial_state_is_not_the_scale_of_the_next(isa):
    states = torch.randn(1, 3, 20) * 300, torch.randn(1, 3, 20)
    module = quantize(nn.LSTM(8, 20))
    x = torch.randn(6, 3, 8)
    _, after = module(x[:1], states)
    y, _ = module(x, states)
    assert torch.equal(module(x[1:], after)[0], y[1:])
    check(module, x[1:], after)


# --- the modules ----------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "batch first": {"batch_first": True},
    "layers": {"num_layers": 3},
    "bidirectional": {"num_layers": 2, "bidirectional": True},
    "projection": {"proj_size": 5},
    "both": {"proj_size": 17, "bidirectional": True, "num_layers": 2, "batch_first": True},
    "merged": {"bidirectional": True, "num_layers": 2, "merge_mode": "ave"},
    "a sum": {"bidirectional": True, "merge_mode": "sum"},
    "no cells": {"return_cell_sequence": True, "proj_size": 5, "bidirectional": True},
    "a pair": {"bidirectional": True, "merge_mode": None, "return_cell_sequence": True},
    "dropouts": {"num_layers": 2, "dropout": 0.5, "recurrent_dropout": 0.5, "weight_dropout": 0.5},
    "forget bias": {"forget_bias": 1.0, "return_cell_sequence": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_of_a_plain_lstm(options):
    module = quantize(lstm_ext.LSTM(7, 19, **options))
    D, P = (2 if module.bidirectional else 1), module.proj_size or 19
    x = torch.randn(5, 4, 7)
    B = 5 if module.batch_first else 4
    steps = x.size(1 if module.batch_first else 0)
    count = D * module.num_layers
    hx = torch.randn(count, B, P), torch.randn(count, B, 19)
    check(module, x)
    check(module, x, hx)
    check(module, x, hx, lengths=torch.tensor([steps, 1, 0, 2, 3][:B]))
    reset_mask = torch.rand(x.shape[:2]) < 0.3
    check(module, x, hx, reset_mask=reset_mask)
    check(module, x[0])
    check(module, pack_sequence([torch.randn(n, 7) for n in (2, 6, 1)], enforce_sorted=False))


def test_the_weights_are_the_float_ones_rounded():
    module = lstm_ext.LSTM(7, 19, 2, bidirectional=True, proj_size=5)
    back = quantize(copy.deepcopy(module)).dequantize()
    for name, weight in module.named_parameters():
        rounded = back.get_parameter(name)
        if name.startswith("weight"):
            assert not torch.equal(rounded, weight)
            torch.testing.assert_close(rounded, weight, rtol=0, atol=19**-0.5 / 250)
    total = back.bias_ih_l1_reverse + back.bias_hh_l1_reverse
    torch.testing.assert_close(total, module.bias_ih_l1_reverse + module.bias_hh_l1_reverse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_in_and_out(isa, dtype):
    module, x = quantize(nn.LSTM(7, 19, proj_size=5)), torch.randn(5, 4, 7)
    hx = torch.randn(1, 4, 5).to(dtype), torch.randn(1, 4, 19).to(dtype)
    made = flat(module(x.to(dtype), hx))
    expected = flat(module(x.to(dtype).float(), tuple(t.float() for t in hx)))
    for a, b in zip(made, expected, strict=True):
        assert a.dtype == dtype
        tolerance = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(a.float(), b, rtol=tolerance, atol=tolerance)


def test_a_move_to_another_dtype_leaves_the_buffers():
    module = quantize(nn.LSTM(7, 19))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert all(t.is_meta for t in copy.deepcopy(module).to("meta", torch.half).buffers())
    without = quantize(nn.LSTM(7, 19))
    without.bias_sum_l0 = None
    assert without.half().scale_ih_l0.dtype == torch.float32
    for moved in (module.half(), module.double(), module.to(torch.bfloat16)):
        for name, tensor in moved.state_dict().items():
            assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])


def test_autocast_decides_the_dtype():
    module, x = quantize(nn.LSTM(7, 19)), torch.randn(5, 4, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, (h_n, c_n) = module(x)
    assert y.dtype == h_n.dtype == c_n.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), module(x)[0], rtol=0.02, atol=0.02)


def test_a_copy_a_pickle_and_a_state_dict():
    module, x = quantize(nn.LSTM(7, 19, 2)), torch.randn(5, 4, 7)
    other = quantize(nn.LSTM(7, 19, 2))
    assert not torch.equal(other(x)[0], module(x)[0])
    other.load_state_dict(module.state_dict())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other):
        assert torch.equal(twin(x)[0], module(x)[0])


def test_the_state_dict_has_a_fourth_of_the_bytes():
    def size(module):
        return sum(t.numel() * t.element_size() for t in module.state_dict().values())

    module = nn.LSTM(256, 256)
    before = size(module)
    assert size(quantize(module)) < 0.26 * before


def test_always_in_evaluation_mode():
    model = quantize(nn.Sequential(nn.LSTM(3, 4, 2, dropout=0.5)).train())
    assert not model.train()[0].training
    assert model.training
    assert not quantize(nn.LSTMCell(3, 4).train()).training


def test_tensors_that_lie_otherwise():
    module = quantize(nn.LSTM(7, 19))
    x, states = torch.randn(5, 4, 14)[..., ::2], [torch.randn(1, 19, 4).mT for _ in range(2)]
    lengths = torch.full((4,), 5)
    for kwargs in ({}, {"lengths": lengths}):
        check(module, x, tuple(states), **kwargs)
    x, states = torch._neg_view(x), [torch._neg_view(t) for t in states]
    expected = module(-x.neg().clone(), tuple(-t.neg().clone() for t in states))
    for kwargs in ({}, {"lengths": lengths}):
        for a, b in zip(flat(module(x, states, **kwargs)), flat(expected), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_the_short_way(options, monkeypatch):
    """The same bits, and without a question of a layer's."""
    module, x = quantize(nn.LSTM(7, 19, **options)), torch.randn(5, 4, 7)
    expected = module(x, lengths=torch.full((4,), 5))
    cell = quantize(nn.LSTMCell(7, 19))

    def refuse(*args, **kwargs):
        raise AssertionError("by the layer")

    monkeypatch.setattr(QuantizedLSTM, "_layers", refuse)
    monkeypatch.setattr(QuantizedLSTMCell, "_by_layer", refuse)
    assert all(map(torch.equal, flat(module(x)), flat(expected)))
    cell(x[0])
    with pytest.raises(AssertionError, match="by the layer"):
        module(x.bfloat16())


def test_vmap():
    module, x = quantize(nn.LSTM(7, 19, 2, bidirectional=True)), torch.randn(3, 5, 4, 7)
    hx = torch.randn(3, 4, 4, 19), torch.randn(3, 4, 4, 19)
    lengths = torch.tensor([[5, 0, 2, 3], [1, 1, 5, 4], [5, 5, 5, 5]])
    mapped = torch.vmap(lambda x, h, c, n: module(x, (h, c), lengths=n))(x, *hx, lengths)
    for k in range(3):
        one = module(x[k], (hx[0][k], hx[1][k]), lengths=lengths[k])
        for a, b in zip(flat(mapped), flat(one), strict=True):
            assert torch.equal(a[k], b)
    y, _ = torch.vmap(module, in_dims=2, out_dims=2)(x.movedim(0, 2))
    assert torch.equal(y[:, :, 1], module(x[1])[0])


def test_no_features():
    """nn.LSTM has none of it."""
    for make in (nn.LSTMCell, lstm_ext.LSTMCell):
        check(quantize(make(0, 20)), torch.randn(3, 0))


def test_no_steps_and_no_sequences():
    module, hx = quantize(nn.LSTM(3, 4)), (torch.randn(1, 2, 4), torch.randn(1, 2, 4))
    y, states = module(torch.randn(0, 2, 3), hx)
    assert y.shape == (0, 2, 4) and all(map(torch.equal, states, hx))
    assert module(torch.randn(5, 0, 3))[0].shape == (5, 0, 4)


@pytest.mark.parametrize("bias", [True, False])
def test_a_cell(isa, bias):
    coarse = quantize(lstm_ext.LSTMCell(7, 19, bias=bias), activation_bits=8)
    check(coarse, torch.randn(5, 7), atol=0.02)
    cell = quantize(lstm_ext.LSTMCell(7, 19, bias=bias))
    assert isinstance(cell, QuantizedLSTMCell)
    x, hx = torch.randn(5, 7), (torch.randn(5, 19), torch.randn(5, 19))
    check(cell, x)
    check(cell, x, hx)
    check(cell, x[0], (hx[0][0], hx[1][0]))


@pytest.mark.parametrize("bits", [8, 16])
def test_in_a_graph(bits):
    module = quantize(nn.LSTM(7, 19, 2, bidirectional=True), activation_bits=bits)
    x = torch.randn(5, 4, 7)
    lengths = torch.tensor([5, 1, 0, 3])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for kwargs in ({}, {"lengths": lengths}):
        for a, b in zip(flat(compiled(x, **kwargs)), flat(module(x, **kwargs)), strict=True):
            assert torch.equal(a, b)
    exported = torch.export.export(module, (x,)).module()
    assert torch.equal(exported(x)[0], module(x)[0])


def test_in_a_graph_with_cells():
    module = quantize(lstm_ext.LSTM(7, 19, proj_size=5, return_cell_sequence=True))
    compiled, x = torch.compile(module, fullgraph=True, backend="aot_eager"), torch.randn(5, 4, 7)
    assert all(map(torch.equal, flat(compiled(x)), flat(module(x))))


def test_a_graph_refuses_what_the_module_does():
    module, x = quantize(nn.LSTM(7, 19)), torch.randn(5, 4, 7)
    hx = torch.randn(1, 4, 19), torch.randn(1, 4, 19)
    exported = torch.export.export(module, (x, hx)).module()
    assert torch.equal(exported(x, hx)[0], module(x, hx)[0])
    with pytest.raises(ValueError, match="Expected h0 to be torch.float32"):
        exported(x, tuple(t.bfloat16() for t in hx))
    for dtype in (torch.float64, torch.int64):
        with pytest.raises(TypeError, match=f"expected an input of .*, got {dtype}"):
            exported(x.to(dtype), tuple(t.to(dtype) for t in hx))
    with torch.enable_grad(), pytest.raises(RuntimeError, match="for inference"):
        exported(x.clone().requires_grad_(), hx)


def test_the_operator_checks_sizes():
    w = list(quantize(nn.LSTM(7, 19))._weights("_l0")[:-1])

    def run(rows, sequences, batch=4):
        states = [torch.zeros(sequences, 19)] * 2
        return torch.ops.lstm_ext.quantized_layer(
            torch.randn(rows, 7), states + w, 16, [False], 5, batch, False, None, None, None, False
        )

    assert run(20, 4)[0].shape == (20, 19)
    with pytest.raises(RuntimeError, match=r"Expected h0 of size \(4, 19\), got \(1, 19\)"):
        run(20, 1)
    with pytest.raises(RuntimeError, match="Expected input of 20 rows"):
        run(5, 4)


def test_autocast_of_another_device():
    torch.set_autocast_enabled("cuda", True)
    try:
        module, x = quantize(nn.LSTM(7, 19)), torch.randn(5, 4, 7)
        hx = (torch.randn(1, 4, 19).bfloat16(),) * 2
        with pytest.raises(ValueError, match="Expected h0 to be torch.float32"):
            module(x, hx)
        with pytest.raises(TypeError, match="got torch.float64"):
            module(x.double())
        with pytest.raises(TypeError, match="got torch.float64"):
            quantize(nn.LSTMCell(7, 19))(x[0].double())
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_a_graph_checks_what_it_is_given():
    module = quantize(nn.LSTM(3, 4))
    exported = torch.export.export(
        module, (torch.randn(5, 2, 3),), {"lengths": torch.tensor([5, 1])}
    ).module()
    with pytest.raises(ValueError, match="length"):
        exported(torch.randn(5, 2, 3), lengths=torch.tensor([6, 1]))


# --- quantize -------------------------------------------------------------------------------------


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


def test_wrong_buffers():
    x = torch.randn(2, 1, 3)
    for name, wrong, words in (
        ("weight_ih_l0", torch.ones(1, 1, 64, dtype=torch.uint8), r"weight_ih: expected size"),
        ("scale_ih_l0", torch.ones(15), r"scale_ih: expected size \(16,\), got \(15,\)"),
        ("scale_hh_l0", None, "scale_hh: expected torch.float32 on the CPU, got None"),
        ("weight_hh_l0", torch.ones(1, 1, 256), "weight_hh: expected torch.uint8 on the CPU"),
        ("bias_sum_l0", torch.ones(16).half(), "bias: expected torch.float32 .* torch.float16"),
    ):
        module = quantize(nn.LSTM(3, 4))
        setattr(module, name, wrong)
        with pytest.raises(RuntimeError, match=words):
            module(x)
    module = quantize(nn.LSTM(3, 4, proj_size=2))
    module.weight_hr_l0 = None
    with pytest.raises(RuntimeError, match="weight_hr: expected torch.uint8 on the CPU, got None"):
        module(x)


@pytest.mark.parametrize("name, value", [("num_layers", 1), ("bidirectional", False)])
@pytest.mark.parametrize("kwargs", [{}, {"lengths": torch.tensor([2])}], ids=str)
def test_changed_attributes(name, value, kwargs):
    module = quantize(nn.LSTM(3, 4, 2, bidirectional=True))
    setattr(module, name, value)
    with pytest.raises(RuntimeError, match="cannot be changed afterwards"):
        module(torch.randn(2, 1, 3), **kwargs)


@pytest.mark.parametrize(
    "name, value", [("bias", False), ("input_size", 4), ("zoneout", 0.5), ("checkpoint_every", 2)]
)
def test_other_changed_attributes(name, value):
    module = quantize(nn.LSTM(3, 4))
    setattr(module, name, value)
    with pytest.raises(RuntimeError, match="cannot be changed afterwards"):
        module(torch.randn(2, 1, module.input_size))
    cell = quantize(nn.LSTMCell(3, 4))
    cell.bias = False
    with pytest.raises(RuntimeError, match="cannot be changed afterwards"):
        cell(torch.randn(2, 3))


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
    with pytest.raises(RuntimeError, match=r"torch.jit.trace: use torch.export"):
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
    with pytest.raises(TypeError, match="no subclass"):
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
