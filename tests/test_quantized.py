"""Weights of 8 bits: codes, and products on every instruction set."""

import pytest
import torch
from eight_bits import ISAS as ISAS
from eight_bits import MARKS, check, flat
from torch import nn

import lstm_ext
from lstm_ext import quantize
from lstm_ext.quantization import pack, packed_size, unpack

pytestmark = MARKS


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
