"""ConvLSTM's dropout between the layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from device import here, leaf
from test_conv_lstm import F64, IN, SEQUENCES, SIZES, C, L, N
from test_conv_lstm_compile import _bits, _both
from test_conv_lstm_resets import LENGTHS, MASK, _close, _grads
from torch._dynamo.testing import CompileCounterWithBackend

import lstm_ext


@pytest.fixture(autouse=True)
def _no_earlier_graphs():
    torch._dynamo.reset()


def _layer(module, k):
    """A module of layer k alone."""
    weights = {
        name.replace(f"_l{k}", "_l0"): p
        for name, p in module.named_parameters()
        if f"_l{k}" in name
    }
    options = {"bidirectional": module.bidirectional, "merge_mode": module.merge_mode, **F64}
    inputs = weights["weight_ih_l0"].size(1)
    one = here(type(module)(inputs, C, 3, **options))
    return lambda x, **given: torch.func.functional_call(one, weights, (x,), given)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mode", ["one", "concat", "ave"])
@pytest.mark.parametrize("dims", SEQUENCES)
def test_of_every_layer_but_the_last(dims, mode, batch_first):
    """The same elements for a batch-first layout."""
    options = {} if mode == "one" else {"bidirectional": True, "merge_mode": mode}
    module = SEQUENCES[dims](IN, C, 3, 3, dropout=0.4, batch_first=batch_first, **options, **F64)
    module = here(module)
    x = leaf(torch.randn(L, N, IN, *SIZES[dims], **F64))
    given = {"lengths": LENGTHS, "reset_mask": MASK.T if batch_first else MASK}
    torch.manual_seed(5)
    y, states = module(x.transpose(0, 1) if batch_first else x, **given)
    found = y.transpose(0, 1) if batch_first else y, states
    given["reset_mask"] = MASK
    layers = [_layer(module, k) for k in range(3)]
    torch.manual_seed(5)
    y, h_n, c_n = x, [], []
    for k, layer in enumerate(layers):
        y, (h, c) = layer(y if k == 0 else F.dropout(y, 0.4), **given)
        h_n.append(h)
        c_n.append(c)
    expected = y, (torch.cat(h_n), torch.cat(c_n))
    _close(found, expected)
    inputs = [x, *module.parameters()]
    _close(_grads(found, inputs), _grads(expected, inputs))


def test_only_while_training():
    module = here(SEQUENCES[2](IN, C, 3, 2, dropout=0.5))
    x = here(torch.randn(L, N, IN, *SIZES[2]))
    plain = here(SEQUENCES[2](IN, C, 3, 2))
    plain.load_state_dict(module.state_dict())
    _bits(module.eval()(x), plain(x))
    assert not torch.equal(module.train()(x)[0], plain(x)[0])
    module.dropout = 0.0  # set later, as nn.LSTM's
    _bits(module(x), plain(x))


def test_of_everything():
    """The second layer finds zeros; of the last nothing is dropped."""
    module = here(SEQUENCES[1](IN, C, 3, 2, dropout=1.0, **F64))
    x = here(torch.randn(L, N, IN, 6, **F64))
    y, _ = module(x)
    assert y.all()
    _close(y, _layer(module, 1)(x.new_zeros(L, N, C, 6))[0])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_one_graph_for_any_steps(bidirectional):
    module = here(SEQUENCES[2](IN, C, 3, 2, dropout=0.5, bidirectional=bidirectional))
    counter, graphs = CompileCounterWithBackend("aot_eager"), set()
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    for T, n in ((8, 9), (5, 3), (12, 2)):
        x, results = leaf(torch.randn(T, n, IN, 6, 5)), []
        for run in (compiled, module):
            torch.manual_seed(3)
            results.append(_both(run, x))
        _bits(*results)
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


@pytest.mark.parametrize("dropout", [1.5, -0.1, True, "0.5", None])
def test_what_is_no_probability_is_refused(dropout):
    with pytest.raises(ValueError, match=r"dropout should be a number in range \[0, 1\] .* got"):
        lstm_ext.ConvLSTM1d(IN, C, 3, 2, dropout=dropout)
    module = lstm_ext.ConvLSTM1d(IN, C, 3, 2)
    with pytest.raises(ValueError, match="dropout should be a number"):
        module.dropout = dropout


def test_of_a_single_layer_is_none():
    with pytest.warns(UserWarning, match=r"every layer but the last, .* got dropout=0.5 and num"):
        module = here(lstm_ext.ConvLSTM1d(IN, C, 3, dropout=0.5))
    x = here(torch.randn(L, N, IN, 6))
    _bits(module(x), copy.deepcopy(module).eval()(x))


def test_repr_and_a_pickle_from_before_there_was_dropout():
    module = here(lstm_ext.ConvLSTM1d(IN, C, 3, 2))
    state = module.__getstate__()
    del state["_dropout"], state["_drops"]
    old = type(module).__new__(type(module))
    old.__setstate__(state)
    x = here(torch.randn(L, N, IN, 6))
    _bits(old(x), module(x))
    assert repr(old) == repr(module) and "dropout" not in repr(module)
    module.dropout = 0.25
    assert repr(module) == "ConvLSTM1d(2, 5, kernel_size=(3,), num_layers=2, dropout=0.25)"
