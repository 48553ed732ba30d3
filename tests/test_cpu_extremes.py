"""Numbers at the ends of their ranges, in the CPU's kernels."""

import pytest
import torch
from eight_bits import MARKS
from torch import nn

import lstm_ext
from lstm_ext.cpu import products as cpu_products
from lstm_ext.quantization import packed_size

pytestmark = MARKS


def test_subnormal_halves_where_the_processor_flushes_floats(isa):
    """2e-5 is subnormal as a half and not as a float."""
    torch.set_num_threads(1)  # the mode is one thread's
    module = lstm_ext.LSTM(300, 8).half()
    nn.init.constant_(module.weight_ih_l0, 2e-5)
    x = torch.full((1, 1, 300), 60.0, dtype=torch.half)
    expected = module(x)[0]
    assert torch.set_flush_denormal(True)
    try:
        assert torch.equal(module(x)[0], expected)
    finally:
        torch.set_flush_denormal(False)


def test_every_half_is_read_as_it_is(isa):
    """c_0 of every half, in steps that keep it: f = 1, i = o = 0 and no products."""
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.half)
    H = 1 << 10
    module = lstm_ext.LSTM(1, H).half()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.bias_ih_l0.copy_(torch.tensor([-200.0, 200, 0, -200]).repeat_interleave(H))
    c_0 = halves.view(1, -1, H)
    x = torch.zeros(1, c_0.size(1), 1, dtype=torch.half)
    c_n = module(x, (torch.zeros_like(c_0), c_0))[1][1]
    assert torch.equal(c_n.nan_to_num(7), c_0.nan_to_num(7))
    assert torch.equal(c_n.isnan(), c_0.isnan())


@pytest.mark.parametrize("proj_size", [0, 5])
@pytest.mark.parametrize("hidden_size", [16, 17, 33])
def test_an_infinite_state_and_an_odd_number_of_units(isa, hidden_size, proj_size):
    """Of pairs of bfloat16, the number that an odd row lacks is zero whatever comes in."""
    torch.manual_seed(0)
    module = lstm_ext.LSTM(2, hidden_size, proj_size=proj_size).bfloat16()
    module.weight_hh_l0.data.abs_()
    width = proj_size or hidden_size
    h_0 = torch.full((1, 2, width), torch.inf).bfloat16()
    c_0 = torch.zeros(1, 2, hidden_size).bfloat16()
    with torch.no_grad():
        output = module(torch.zeros(4, 2, 2).bfloat16(), (h_0, c_0))[0]
    assert output.isfinite().all()


@pytest.mark.parametrize("weight, number", [(2e34, 2e-30), (2e-30, 2e34)])
@pytest.mark.parametrize("bits", [8, 16])
def test_weights_of_8_bits_and_scales_far_from_each_other(isa, bits, weight, number):
    torch.manual_seed(0)
    module = lstm_ext.LSTM(1, 4)
    module.weight_ih_l0.data.fill_(weight)
    module.bias_ih_l0.data.fill_(-weight * number)
    quantized = lstm_ext.quantize(module, activation_bits=bits)
    with torch.no_grad():
        x = torch.tensor([[[number]]])
        torch.testing.assert_close(quantized(x), quantized.dequantize()(x), rtol=0.02, atol=0.01)


def test_weights_of_8_bits_and_scales_whose_product_overflows(isa):
    torch.manual_seed(0)
    module = lstm_ext.LSTM(2, 4)
    module.weight_ih_l0.data.copy_(torch.tensor([0, 1e8]).expand(16, 2))
    quantized = lstm_ext.quantize(module)
    with torch.no_grad():
        x = torch.tensor([[[1e38, 0.0]]])
        torch.testing.assert_close(quantized(x), quantized.dequantize()(x))


def test_more_columns_than_sums_of_32_bits_hold():
    I, H = (1 << 16) + 4, 4
    state, scale = torch.zeros(1, H), torch.ones(4 * H)
    codes = [torch.zeros(packed_size(4 * H, 4, 4), dtype=torch.uint8) for _ in range(2)]
    codes[0] = codes[0].expand(-1, I // 4, -1)
    flat = [state, state, *codes, scale, scale, None, None, None]
    with pytest.raises(ValueError, match="at most 65536 columns, got 65540"):
        torch.ops.lstm_ext.quantized_layer(
            torch.ones(1, I), flat, 16, [False], 1, 1, False, None, None, None, False
        )


def test_the_workspace_of_many_threads_is_kept(monkeypatch):
    monkeypatch.setattr(cpu_products, "_kept", type("", (), {})())
    size = 100 << 20  # what 80 threads take
    assert cpu_products.workspace(size) is not cpu_products.workspace(size)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 80)
    assert cpu_products.workspace(size) is cpu_products.workspace(size)
