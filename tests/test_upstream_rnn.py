"""What PyTorch's test_nn.py and test_packed_sequence.py check of an LSTM, in our words.

Only what no other file here has: bad arguments and layouts are in test_module_contract.py and
test_lstm_cell.py, packed input in test_packed.py, dropped, tied, frozen, normed and pickled weights
in test_module_parameters.py and test_ecosystem.py, retained graphs in test_autograd.py.
"""

import copy
import pickle

import pytest
import torch
from device import here, leaf, without_cudnn
from tolerances import tol
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_sequence, unpack_sequence
from torch.testing import assert_close

import lstm_ext

T, B, I, H = 5, 4, 3, 6
TOL = tol(torch.float64)
BITS = {"rtol": 0, "atol": 0}
F64 = {"dtype": torch.float64}
SHAPES = {
    "plain": {},
    "two": {"num_layers": 2, "bidirectional": True},
    "projection": {"num_layers": 2, "proj_size": 2, "bias": False},
}
shapes = pytest.mark.parametrize("kwargs", SHAPES.values(), ids=list(SHAPES))


def pair(**kwargs):
    """An nn.LSTM in float64 and the lstm_ext.LSTM that shares its parameters."""
    theirs = here(nn.LSTM(I, H, **kwargs, **F64))
    return theirs, lstm_ext.LSTM.from_torch(theirs)


def gradients(module, x, hx=None):
    y, states = module(x, hx)
    loss = sum((t * (k + 1)).square().sum() for k, t in enumerate((y, *states)))
    return torch.autograd.grad(loss, [x, *module.parameters()])


# --- states ---------------------------------------------------------------------------------------


@shapes
def test_no_state_is_a_state_of_zeros(kwargs):
    _, ours = pair(**kwargs)
    x = leaf(torch.randn(T, B, I, **F64))
    _, states = ours(x)
    zeros = tuple(torch.zeros_like(s) for s in states)
    assert_close(ours(x, zeros), ours(x), **BITS)
    assert_close(gradients(ours, x, zeros), gradients(ours, x), **BITS)


@shapes
def test_a_sequence_in_pieces(kwargs):
    """The state carried on, and through it the gradient; forwards only."""
    _, ours = pair(**{**kwargs, "bidirectional": False})
    x = leaf(torch.randn(T, B, I, **F64))
    expected, states = ours(x)
    pieces, hx = [], None
    for piece in x.split((1, 3, 1)):
        y, hx = ours(piece, hx)
        pieces.append(y)
    assert_close((torch.cat(pieces), hx), (expected, states), **TOL)
    inputs = [x, *ours.parameters()]
    made = torch.autograd.grad(torch.cat(pieces).square().sum(), inputs)
    assert_close(made, torch.autograd.grad(expected.square().sum(), inputs), **TOL)


@shapes
def test_each_sequence_alone(kwargs):
    """Packed, padded and one by one: the same outputs, states and gradients."""
    _, ours = pair(**kwargs)
    sequences = [leaf(torch.randn(n, I, **F64)) for n in (2, 5, 1, 5)]
    wanted = [*sequences, *ours.parameters()]

    def alone():
        results = [ours(sequence) for sequence in sequences]
        return [y for y, _ in results], [
            torch.stack(s, 1) for s in zip(*(r[1] for r in results), strict=True)
        ]

    def packed():
        y, states = ours(pack_sequence(sequences, enforce_sorted=False))
        return unpack_sequence(y), list(states)

    def padded():
        lengths = torch.tensor([len(s) for s in sequences])
        y, states = ours(pad_sequence(sequences), lengths=lengths)
        return [y[:n, k] for k, n in enumerate(lengths)], list(states)

    outcomes = []
    for run in (alone, packed, padded):
        outputs, states = run()
        loss = sum(t.square().sum() for t in (*outputs, *states))
        outcomes.append((outputs, states, torch.autograd.grad(loss, wanted)))
    for outcome in outcomes[1:]:
        assert_close(outcome, outcomes[0], **TOL)


def test_a_converted_packed_sequence():
    """PackedSequence.double() and .to(), with the lengths it had."""
    ours = here(lstm_ext.LSTM(I, H))
    packed = here(pack_sequence([torch.randn(n, I) for n in (2, 5, 1)], enforce_sorted=False))
    expected, _ = ours(packed)
    for made in (packed.double(), packed.to(torch.float64)):
        y, _ = copy.deepcopy(ours).double()(made)
        assert isinstance(y, PackedSequence) and y.data.dtype == torch.float64
        assert_close(y.data.float(), expected.data, **tol(torch.float32))
        assert torch.equal(y.unsorted_indices, packed.unsorted_indices)
    with pytest.raises(ValueError, match="RNN input dtype"):
        ours(packed.double())


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.cpu_only(reason="cuDNN draws other dropout masks")
def test_dropout_changed_after_construction():
    """The attribute is read at every call, as the training flag is."""
    theirs, ours = pair(num_layers=2)
    x = here(torch.randn(T, B, I, **F64))
    kept = ours(x)[0]
    for p, training in ((0.5, True), (0.0, True), (0.9, False), (1.0, True), (0.3, True)):
        results = []
        for module in (theirs, ours):
            module.dropout = p
            module.train(training)
            torch.manual_seed(2)
            results.append(module(x))
        assert_close(results[1], results[0], **TOL)
        dropped = not torch.equal(results[1][0], kept)
        assert dropped == (p > 0 and training)


def test_dropout_goes_on_where_a_pickle_was_made():
    """The state is the generator's: a copy draws what the original would have drawn."""
    ours = here(lstm_ext.LSTM(I, H, 2, dropout=0.5, **F64))
    x = here(torch.randn(T, B, I, **F64))
    torch.manual_seed(9)
    first = ours(x)[0]
    twin = pickle.loads(pickle.dumps(ours))
    state = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all()
    second = ours(x)[0]
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    torch.cuda.set_rng_state_all(cuda)
    assert_close(twin(x)[0], second, **BITS)


# --- where the weights lie ------------------------------------------------------------------------


@shapes
def test_weights_that_are_views(kwargs):
    """Of one buffer at odd offsets, transposed, or every other element: the numbers count."""
    theirs, ours = pair(**kwargs)
    x = leaf(torch.randn(T, B, I, **F64))
    with torch.no_grad():
        expected = theirs(x)
    slopes = gradients(ours, x)
    sizes = [p.numel() for p in ours.parameters()]
    buffer = x.new_empty(sum(sizes) + 1)

    def in_buffer(p, start):
        return buffer[start : start + p.numel()].view_as(p).copy_(p)

    def transposed(p, _):
        return p.t().contiguous().t()

    def strided(p, _):
        return p.repeat_interleave(2, dim=-1)[..., ::2]

    for place in (in_buffer, transposed, strided):
        moved, start = copy.deepcopy(ours), 1
        for name, parameter in list(moved.named_parameters()):
            setattr(moved, name, nn.Parameter(place(parameter.detach(), start)))
            start += parameter.numel()
        assert_close(moved(x), expected, **TOL)
        assert_close(gradients(moved, x), slopes, **TOL)


def test_shared_memory():
    """share_memory() moves the weights; what another process writes is seen at the next call."""
    ours = here(lstm_ext.LSTM(I, H, **F64))
    x = here(torch.randn(T, B, I, **F64))
    expected = ours(x)[0]
    ours.share_memory()
    assert all(p.is_shared() for p in ours.parameters())
    assert_close(ours(x)[0], expected, **BITS)
    ours.weight_hh_l0.detach().numpy(force=True)[:] = 0
    if not ours.weight_hh_l0.is_cuda:  # there numpy has a copy
        assert not torch.equal(ours(x)[0], expected)


@pytest.mark.parametrize("overwrite", [False, True])
def test_conversion_that_overwrites_the_parameters(overwrite):
    """torch.__future__.set_overwrite_module_params_on_conversion."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    try:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        ours = here(lstm_ext.LSTM(I, H, 2))
        x, kept = here(torch.randn(T, B, I)), ours.weight_hh_l1
        expected = ours(x)[0]
        ours.double()
        assert (ours.weight_hh_l1 is kept) != overwrite
        assert_close(ours(x.double())[0].float(), expected, **tol(torch.float32))
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


# --- derivatives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("used", ["y", "states"])
def test_second_derivative_in_float32(used):
    """Of a loss on the input's gradient, beside nn.LSTM without oneDNN, in both dtypes."""
    theirs, _ = pair(num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I, **F64)

    def second(module, dtype):
        module, at = copy.deepcopy(module).to(dtype), leaf(x.to(dtype))
        with torch.backends.mkldnn.flags(enabled=False), without_cudnn():
            y, states = module(at)
            loss = y.square().sum() if used == "y" else sum(s.square().sum() for s in states)
            (first,) = torch.autograd.grad(loss, at, create_graph=True)
            wanted = [at, *module.parameters()]
            return torch.autograd.grad(first.square().sum(), wanted, materialize_grads=True)

    truth = second(theirs, torch.float64)
    ours = lstm_ext.LSTM.from_torch(theirs)
    assert_close(second(ours, torch.float64), truth, **TOL)
    for made, expected in zip(second(ours, torch.float32), truth, strict=True):
        assert_close(made.double(), expected, **tol(torch.float32))


def test_gradients_accumulate():
    """In .grad, over calls of one graph and of several."""
    _, ours = pair(num_layers=2)
    x = leaf(torch.randn(T, B, I, **F64))
    y = ours(x)[0].square().sum()
    once = torch.autograd.grad(y, [x, *ours.parameters()], retain_graph=True)
    for k in range(1, 4):
        (y if k < 3 else ours(x)[0].square().sum()).backward(retain_graph=k == 1)
        for tensor, gradient in zip([x, *ours.parameters()], once, strict=True):
            assert_close(tensor.grad, k * gradient, **TOL)
