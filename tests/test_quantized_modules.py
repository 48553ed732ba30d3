"""QuantizedLSTM and QuantizedLSTMCell beside the modules whose weights they stand for."""

import copy
import pickle

import pytest
import torch
from eight_bits import ISAS as ISAS
from eight_bits import MARKS, check, flat
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import lstm_ext
from lstm_ext import QuantizedLSTM, QuantizedLSTMCell, quantize

pytestmark = MARKS

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


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True},
        {"proj_size": 5, "bias": False},
        {"proj_size": 17, "num_layers": 2, "bidirectional": True},
    ],
    ids=str,
)
def test_the_short_way(options, bits, monkeypatch, isa):
    """The same bits, and without a question of a layer's."""
    module, x = quantize(nn.LSTM(7, 19, **options), bits), torch.randn(5, 4, 7)
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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "batch_first": True, "return_cell_sequence": True},
        {"num_layers": 2, "bidirectional": True, "merge_mode": "sum"},
        {"bidirectional": True, "proj_size": 5},
    ],
    ids=str,
)
def test_vmap_over_modules(options):
    modules = [quantize(lstm_ext.LSTM(7, 19, **options)) for _ in range(3)]
    _, buffers = torch.func.stack_module_state(modules)
    x, lengths = torch.randn(3, 4, 4, 7), torch.tensor([[4, 0, 2, 3], [1, 1, 3, 4], [4, 4, 4, 4]])

    def run(buffers, x, **kwargs):
        return torch.func.functional_call(modules[0], buffers, (x,), kwargs)

    made = torch.vmap(run, in_dims=(0, None))(buffers, x[0])
    with_lengths = torch.vmap(lambda b, x, n: run(b, x, lengths=n))(buffers, x, lengths)
    for k, module in enumerate(modules):
        assert all(
            torch.equal(a[k], b) for a, b in zip(flat(made), flat(module(x[0])), strict=True)
        )
        one = module(x[k], lengths=lengths[k])
        assert all(torch.equal(a[k], b) for a, b in zip(flat(with_lengths), flat(one), strict=True))


def test_vmap_over_cells():
    cells = [quantize(nn.LSTMCell(7, 19)) for _ in range(3)]
    _, buffers = torch.func.stack_module_state(cells)
    x = torch.randn(4, 7)
    made = torch.vmap(lambda b: torch.func.functional_call(cells[0], b, (x,)))(buffers)
    for k, cell in enumerate(cells):
        assert all(torch.equal(a[k], b) for a, b in zip(flat(made), flat(cell(x)), strict=True))


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


def test_a_cell_in_a_graph():
    cell, x = quantize(nn.LSTMCell(7, 19)), torch.randn(4, 7)
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(x), cell(x)))
    assert all(map(torch.equal, compiled(x, cell(x)), cell(x, cell(x))))


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

    def run(rows, sequences, batch=4, bits=16, dims=()):
        states = [torch.zeros(*dims, sequences, 19)] * 2
        x = torch.randn(*dims, rows, 7)
        return torch.ops.lstm_ext.quantized_layer(
            x, states + w, bits, [False], 5, batch, False, None, None, None, False
        )

    assert run(20, 4)[0].shape == (20, 19)
    with pytest.raises(RuntimeError, match=r"Expected h0 of size \(4, 19\), got \(1, 19\)"):
        run(20, 1)
    with pytest.raises(RuntimeError, match="Expected input of 20 rows"):
        run(5, 4)
    with pytest.raises(RuntimeError, match="Expected input of 495 rows"):
        run(20, 4, batch=99)
    with pytest.raises(RuntimeError, match="Expected input of 20 rows, got 1"):
        run(20, 4, dims=(1,))
    with pytest.raises(ValueError, match="rows of 8 or 16 bits"):
        run(20, 4, bits=7)


def test_a_length_that_only_the_run_knows():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = quantize(nn.LSTM(5, 6))

        def forward(self, x, steps):
            steps = steps.item()
            torch._check(steps >= 0)
            torch._check(steps <= x.size(0))
            return self.lstm(x[:steps])[0]

    module, x = Cut(), torch.randn(7, 2, 5)
    exported = torch.export.export(module, (x, torch.tensor(3))).module()
    for steps in map(torch.tensor, (3, 7, 1)):
        assert torch.equal(exported(x, steps), module(x, steps))


def test_autocast_of_another_device():
    torch.set_autocast_enabled("cuda", True)
    try:
        module, x = quantize(nn.LSTM(7, 19)), torch.randn(5, 4, 7)
        hx = (torch.randn(1, 4, 19).bfloat16(),) * 2
        with pytest.raises(RuntimeError, match="hidden tensor with torch.bfloat16"):
            module(x, hx)
        with pytest.raises(ValueError, match="got torch.float64"):
            module(x.double())
        with pytest.raises(ValueError, match="got torch.float64"):
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
