"""Variants of the modules in their surroundings: autocast, pickles, conversion, compiling, empty
input, bad arguments."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from variants import EVERYTHING, VARIANTS

import lstm_ext

BITS = {"rtol": 0, "atol": 0}


def run(module, *args, seed=None, **kwargs):
    if seed is not None:
        torch.manual_seed(seed)
    y, hn = module(*args, **kwargs)
    return [y, *hn]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    module = lstm_ext.LSTM(3, 8, 2, bidirectional=True, merge_mode="sum", **EVERYTHING)
    x = torch.randn(5, 4, 3, requires_grad=True)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=dtype):
        y, (h_n, c_n) = module(x)
    assert y.dtype == h_n.dtype == c_n.dtype == dtype
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in (x, *module.parameters()))


def test_pickle_deepcopy_repr_and_conversion():
    module = lstm_ext.LSTM(3, 8, bidirectional=True, merge_mode="sum", forget_bias=1, **EVERYTHING)
    x = torch.randn(5, 4, 3)
    expected = run(module, x, seed=1)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_close(run(twin, x, seed=1), expected, **BITS)
        assert twin._all_weights == module._all_weights
    assert repr(module) == (
        "LSTM(3, 8, bidirectional=True, merge_mode='sum', peephole=True, layer_norm=True, "
        "recurrent_dropout=0.4, weight_dropout=0.2, zoneout=(0.3, 0.2), forget_bias=1)"
    )
    assert repr(lstm_ext.LSTMCell(3, 4, zoneout=0.5)) == "LSTMCell(3, 4, zoneout=0.5)"
    adopted = lstm_ext.LSTM.from_torch(nn.LSTM(3, 8))
    adopted.reset_parameters()
    assert not adopted._variants() and adopted.merge_mode == "concat"
    plain = lstm_ext.LSTM(3, 8, forget_bias=1.0)
    theirs = plain.to_torch()
    assert type(theirs) is nn.LSTM and theirs.__dict__.keys() == nn.LSTM(3, 8).__dict__.keys()
    assert type(lstm_ext.LSTMCell(3, 8, forget_bias=1.0).to_torch()) is nn.LSTMCell


@pytest.mark.parametrize("name", [n for n in VARIANTS if n != "forget_bias"])
def test_to_torch_refuses_what_it_lacks(name):
    for kind in (lstm_ext.LSTM, lstm_ext.LSTMCell):
        module = kind(3, 4, **VARIANTS[name])
        with pytest.raises(ValueError, match=r"to_torch: nn\.LSTM(Cell)? has no \w+; got"):
            module.to_torch()
    with pytest.raises(ValueError, match="has no merge_mode; got 'sum'"):
        lstm_ext.LSTM(3, 4, bidirectional=True, merge_mode="sum").to_torch()


def test_weights_are_read_at_every_call():
    module = lstm_ext.LSTM(3, 8, peephole=True, layer_norm=True)
    x = torch.randn(5, 4, 3)
    for name in ("weight_ch_l0", "gamma_ih_l0", "gamma_hh_l0", "gamma_ch_l0", "beta_ch_l0"):
        before = run(module, x)
        with torch.no_grad():
            getattr(module, name).add_(0.5)
        assert not torch.equal(run(module, x)[0], before[0])


def test_meta_tensors():
    module = lstm_ext.LSTM(3, 8, 2, bidirectional=True, **EVERYTHING, device="meta")
    y, (h_n, c_n) = module(torch.zeros(5, 4, 3, device="meta"), lengths=torch.tensor([1, 2, 0, 5]))
    assert y.is_meta and y.shape == (5, 4, 16) and h_n.shape == c_n.shape == (4, 4, 8)


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3), (0, 3)])
@pytest.mark.parametrize("name", VARIANTS)
def test_empty_input(name, shape):
    module = lstm_ext.LSTM(3, 8, **VARIANTS[name])
    x, batch = torch.zeros(shape), shape[1:-1]
    hx = tuple(torch.randn(1, *batch, 8, requires_grad=True) for _ in range(2))
    y, hn = module(x, hx)
    assert y.shape == (*shape[:-1], 8)
    assert_close(hn, hx, **BITS)
    grads = torch.autograd.grad(sum(s.sum() for s in hn), [*hx, *module.parameters()])
    assert all((g == (k < 2)).all() for k, g in enumerate(grads))
    if len(shape) == 3:
        assert lstm_ext.LSTMCell(3, 8, **VARIANTS[name])(torch.zeros(0, 3))[0].shape == (0, 8)


# --- errors -------------------------------------------------------------------------------------

BAD = [
    ({"peephole": 1}, TypeError, "peephole should be of type bool, got: int"),
    ({"layer_norm": "yes"}, TypeError, "layer_norm should be of type bool, got: str"),
    ({"recurrent_dropout": 1.5}, ValueError, "recurrent_dropout.*range .0, 1.*got 1.5"),
    ({"recurrent_dropout": True}, ValueError, "recurrent_dropout.*got True"),
    ({"weight_dropout": -0.1}, ValueError, "weight_dropout.*got -0.1"),
    ({"weight_dropout": "0"}, ValueError, "weight_dropout.*got '0'"),
    ({"zoneout": 2}, ValueError, "zoneout.*keeping its old value, got 2"),
    ({"zoneout": (0.1, float("nan"))}, ValueError, "zoneout.*got nan"),
    ({"zoneout": (0.1, 0.1, 0.1)}, ValueError, r"a pair \(h, c\), got \(0.1, 0.1, 0.1\)"),
    ({"zoneout": None}, ValueError, "zoneout.*got None"),
    ({"forget_bias": "1"}, TypeError, "forget_bias should be a number or None, got: str"),
    ({"forget_bias": True}, TypeError, "forget_bias should be a number or None, got: bool"),
    ({"forget_bias": float("nan")}, ValueError, "forget_bias should be finite, got nan"),
    ({"forget_bias": 1.0, "bias": False}, ValueError, "got 1.0 with bias=False"),
]
BAD_LAYERS = [
    ({"merge_mode": "max", "bidirectional": True}, ValueError,
     "one of 'concat', 'sum', 'mul', 'ave', None, got 'max'"),
    ({"bidirectional": "False"}, TypeError, "bidirectional should be of type bool, got: str"),
    ({"bidirectional": 1}, TypeError, "bidirectional should be of type bool, got: int"),
    ({"merge_mode": "sum"}, ValueError, "merge_mode='sum' needs two directions"),
    ({"merge_mode": None}, ValueError, "merge_mode=None needs two directions"),
    ({"merge_mode": None, "bidirectional": True, "num_layers": 2}, ValueError,
     "expected num_layers=1, got 2"),
]  # fmt: skip


@pytest.mark.parametrize("kwargs, error, text", BAD + BAD_LAYERS)
def test_bad_arguments(kwargs, error, text):
    with pytest.raises(error, match=text):
        lstm_ext.LSTM(3, 4, **kwargs)
    if (kwargs, error, text) in BAD:
        with pytest.raises(error, match=text):
            lstm_ext.LSTMCell(3, 4, **kwargs)


def test_parameters_of_a_wrong_size():
    module = lstm_ext.LSTM(3, 4, peephole=True, layer_norm=True)
    for name in ("weight_ch_l0", "gamma_ih_l0", "gamma_hh_l0", "gamma_ch_l0", "beta_ch_l0"):
        twin = copy.deepcopy(module)
        setattr(twin, name, nn.Parameter(torch.zeros(5)))
        match = rf"Expected {name[:-3]} of size \(\d+,\), got \(5,\)"
        with pytest.raises(RuntimeError, match=match):
            twin(torch.randn(2, 1, 3))
