"""PackedSequence in and out as nn.LSTM, and lengths= as the same thing without packing."""

import itertools

import pytest
import torch
from device import PLACES, here
from tolerances import tol
from torch import nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import lstm_ext
from lstm_ext.steps import Steps, is_packed

TOL = tol(torch.float64)
BITS = {"rtol": 0, "atol": 0}
SORTED, UNSORTED = [6, 4, 4, 1], [4, 1, 6, 4]


def pair(*args, **kwargs):
    """An nn.LSTM in fp64 and the lstm_ext.LSTM that shares its parameters."""
    theirs = here(nn.LSTM(*args, **kwargs, dtype=torch.float64))
    return theirs, lstm_ext.LSTM.from_torch(theirs)


def randn(*shape):
    return here(torch.randn(*shape, dtype=torch.float64))


def states(module, batch):
    count = module.num_layers * (1 + module.bidirectional)
    h0 = randn(count, batch, module.proj_size or module.hidden_size)
    return h0.requires_grad_(), randn(count, batch, module.hidden_size).requires_grad_()


def pack(x, lengths, **kwargs):
    return pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False, **kwargs)


@pytest.mark.parametrize(
    "layers, bidirectional, proj_size, with_hx, lengths",
    list(itertools.product([1, 2], [False, True], [0, 2], [False, True], [SORTED, UNSORTED])),
)
def test_equals_nn_lstm(layers, bidirectional, proj_size, with_hx, lengths):
    theirs, ours = pair(3, 4, layers, bidirectional=bidirectional, proj_size=proj_size)
    x = randn(6, 4, 3).requires_grad_()
    hx = states(theirs, 4) if with_hx else None
    results = []
    for module in (theirs, ours):
        y, hn = module(pack(x, lengths), hx)
        outputs = [y.data, *hn]
        torch.manual_seed(1)
        cotangents = [randn(*t.shape) for t in outputs]
        inputs = [x, *module.parameters(), *(hx or ())]
        results.append((*y, outputs, torch.autograd.grad(outputs, inputs, cotangents)))
    assert_close(results[1], results[0], **TOL)
    assert isinstance(y, PackedSequence)


def test_enforced_order_has_no_indices():
    theirs, ours = pair(3, 4, 2, bidirectional=True)
    packed = pack_sequence([randn(length, 3) for length in SORTED])
    assert packed.sorted_indices is None
    (y, hn), (expected, expected_hn) = ours(packed), theirs(packed)
    assert y.sorted_indices is None and y.unsorted_indices is None
    assert_close((y.data, hn), (expected.data, expected_hn), **TOL)
    assert torch.equal(y.batch_sizes, packed.batch_sizes)


def test_batch_first_does_not_matter():
    theirs, ours = pair(3, 4, 2, batch_first=True)
    packed = pack(randn(4, 6, 3), UNSORTED, batch_first=True)
    (y, hn), (expected, expected_hn) = ours(packed), theirs(packed)
    assert_close((y.data, hn), (expected.data, expected_hn), **TOL)


@pytest.mark.cpu_only(reason="cuDNN draws other dropout masks")
def test_dropout_draws_nn_lstms_mask_on_the_packed_rows():
    theirs, ours = pair(3, 4, 3, dropout=0.4, bidirectional=True)
    packed = pack(randn(6, 4, 3), UNSORTED)
    results = []
    for module in (theirs, ours):
        torch.manual_seed(7)
        y, hn = module(packed)
        results.append((y.data, hn, torch.get_rng_state()))
    assert_close(results[1], results[0], **TOL)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("kwargs", [{}, {"num_layers": 2, "bidirectional": True, "proj_size": 2}])
@pytest.mark.parametrize("place", PLACES)
def test_lengths_equal_packed(kwargs, dtype, batch_first, place):
    ours = lstm_ext.LSTM(3, 4, batch_first=batch_first, return_cell_sequence=True, **kwargs)
    ours = here(ours.double())
    x = (randn(4, 6, 3) if batch_first else randn(6, 4, 3)).requires_grad_()
    hx = states(ours, 4)
    unpack = {"batch_first": batch_first, "total_length": 6}
    y, hn, cells = ours(pack(x, UNSORTED, batch_first=batch_first), hx)
    packed = [pad_packed_sequence(y, **unpack)[0], *hn, pad_packed_sequence(cells, **unpack)[0]]
    y, hn, cells = ours(x, hx, lengths=torch.tensor(UNSORTED, dtype=dtype, device=place))
    padded = [y, *hn, cells]
    assert_close(padded, packed, **TOL)
    cotangents = [randn(*t.shape) for t in padded]
    inputs = [x, *hx, *ours.parameters()]
    grads = [torch.autograd.grad(outputs, inputs, cotangents) for outputs in (packed, padded)]
    assert_close(grads[1], grads[0], **TOL)


@pytest.mark.parametrize("lengths", [[0, 6, 0, 3], [0, 0, 0, 0], [6, 6, 6, 6]])
def test_zero_and_full_lengths(lengths):
    """Each sequence against nn.LSTM on that sequence alone; no steps: the initial state."""
    theirs, ours = pair(3, 4, 2, bidirectional=True, proj_size=2)
    x, hx = randn(6, 4, 3), states(theirs, 4)
    y, (h_n, c_n) = ours(x, hx, lengths=torch.tensor(lengths))
    for b, length in enumerate(lengths):
        assert not y[length:, b].any()
        one = [s[:, b].contiguous() for s in hx]
        got = (y[:length, b], (h_n[:, b], c_n[:, b]))
        expected = theirs(x[:length, b], one) if length else (y[:0, b], tuple(one))
        assert_close(got, expected, **TOL)


def test_nan_in_the_padding_reaches_nothing():
    ours = here(lstm_ext.LSTM(3, 4, 2, bidirectional=True).double())
    clean, lengths = randn(6, 4, 3), torch.tensor([4, 0, 6, 1])
    past = here(torch.arange(6)[:, None] >= lengths)
    results = []
    for fill in (0.0, float("nan")):
        x = torch.where(past[:, :, None], fill, clean).requires_grad_()
        y, hn = ours(x, lengths=lengths)
        grads = torch.autograd.grad(
            y.square().sum() + hn[0].sum() + hn[1].sum(), [x, *ours.parameters()]
        )
        results.append((y, hn, grads))
    assert_close(results[1], results[0], **BITS)
    assert not results[1][2][0][past].any()


def test_double_backward_through_packed_input():
    ours = here(lstm_ext.LSTM(2, 3, 2, bidirectional=True).double())
    x = randn(3, 2, 2).requires_grad_()

    def run(x):
        y, hn = ours(pack(x, [2, 3]))
        return (y.data, *hn)

    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)


# --- errors --------------------------------------------------------------------------------------

H = torch.zeros(2, 4, 4, dtype=torch.float64)  # right for LSTM(3, 4, 2) and a batch of four


@pytest.mark.parametrize("lengths", [SORTED, UNSORTED])
@pytest.mark.parametrize(
    "hx, message",
    [
        ((H[:1], H), r"Expected hidden\[0\] size \(2, 4, 4\), got \[1, 4, 4\]"),
        ((H, H[:, :3]), r"Expected hidden\[1\] size \(2, 4, 4\), got \[2, 3, 4\]"),
        ((H.repeat(1, 2, 1), H.repeat(1, 2, 1)), r"hidden\[0\] size \(2, 4, 4\), got \[2, 8, 4\]"),
        ((H[:, :, :3], H), r"Expected hidden\[0\] size \(2, 4, 4\), got \[2, 4, 3\]"),
        ((H[0], H[0]), r"Expected hidden\[0\] size \(2, 4, 4\), got \[4, 4\]"),
        ((H.float(), H.float()), "found input tensor with torch.float64 and hidden tensor with"),
        ((H, H, H), "lstm expects two hidden states"),
    ],
)
def test_wrong_states_are_refused(hx, message, lengths):
    """In the words nn.LSTM has for padded input; it lets some of these pass."""
    _, ours = pair(3, 4, 2)
    with pytest.raises(RuntimeError, match=message):
        ours(pack(randn(6, 4, 3), lengths), here(hx))


@pytest.mark.cpu_only(reason="cuDNN refuses what nn.LSTM lets pass on the CPU")
def test_states_of_too_many_sequences_pass_nn_lstm_silently():
    theirs, ours = pair(3, 4, 2)
    packed, hx = pack(randn(6, 4, 3), UNSORTED), (H.repeat(1, 2, 1), H.repeat(1, 2, 1))
    theirs(packed, hx)
    with pytest.raises(RuntimeError, match="Expected hidden"):
        ours(packed, hx)


def test_states_that_are_no_pair():
    module = here(lstm_ext.LSTM(3, 4, 2))
    with pytest.raises(TypeError, match=r"pair of Tensors \(h_0, c_0\), got Tensor"):
        module(pack(here(torch.zeros(6, 4, 3)), SORTED), here(H.float()))


def test_wrong_input_gets_the_words_for_padded_input():
    """nn.LSTM reports a failing matmul here."""
    ours = here(lstm_ext.LSTM(3, 4))
    with pytest.raises(RuntimeError, match="must be equal to input_size. Expected 3, got 7"):
        ours(pack(here(torch.zeros(6, 4, 7)), SORTED))
    with pytest.raises(ValueError, match=r"RNN input dtype \(torch.float64\) does not match"):
        ours(pack(here(torch.zeros(6, 4, 3).double()), SORTED))
    with pytest.raises(RuntimeError, match="input must have 2 dimensions, got 3"):
        ours(PackedSequence(here(torch.zeros(5, 2, 3)), torch.tensor([3, 2])))


@pytest.mark.parametrize(
    "rows, batch_sizes", [(5, [3, 1]), (5, [3, 3]), (5, [2, 3]), (5, [0, 5]), (1, [3, -2]), (0, [])]
)
def test_inconsistent_batch_sizes_are_refused(rows, batch_sizes):
    """The core would read past the rows; nn.LSTM overlooks missing rows and fails on the rest."""
    batch_sizes = torch.tensor(batch_sizes, dtype=torch.int64)
    packed = PackedSequence(here(torch.zeros(rows, 3)), batch_sizes)
    with pytest.raises(ValueError, match=f"batch_sizes: expected .* sum to {rows}, got"):
        here(lstm_ext.LSTM(3, 4))(packed)


class Watched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_rows_of_any_batch_sizes():
    """As torch computes them where something records its operations."""
    generator = torch.Generator().manual_seed(0)
    for T, B, zeros in itertools.product([1, 2, 9], [1, 2, 7], [0, 2]):
        sizes = torch.randint(1, B + 1, (T,), generator=generator).sort(descending=True)[0]
        sizes = torch.cat([sizes, sizes.new_zeros(zeros)])
        rows = int(sizes.sum())
        every_other = torch.stack([sizes, sizes + 1], 1)[:, 0]  # not dense
        ours = [Steps.packed(s, rows, "cpu") for s in (sizes, every_other)]
        with Watched():
            theirs = Steps.packed(sizes, rows, "cpu")
        for steps in ours:
            assert steps.layout == theirs.layout
            assert torch.equal(steps.offsets, theirs.offsets)
            assert torch.equal(steps.lengths, theirs.lengths)
        for changed, total in ((sizes, rows + 1), (sizes.flip(0), rows), (-sizes, -rows)):
            right = bool(torch.equal(changed, sizes) and total == rows)
            with Watched():
                assert bool(is_packed(changed, total)) == right
            assert is_packed(changed, total) == right


def test_batch_sizes_of_another_dtype_are_refused():
    packed = PackedSequence(here(torch.zeros(5, 3)), torch.tensor([3, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match="batch_sizes: expected .*torch.int64.*got .*torch.int32"):
        here(lstm_ext.LSTM(3, 4))(packed)


def test_lengths_and_resets_are_for_padded_input():
    ours, packed = here(lstm_ext.LSTM(3, 4)), pack(here(torch.zeros(6, 4, 3)), SORTED)
    with pytest.raises(ValueError, match="lengths: a PackedSequence already holds its lengths"):
        ours(packed, lengths=torch.tensor(SORTED))
    with pytest.raises(ValueError, match="reset_mask is not supported with a PackedSequence"):
        ours(packed, reset_mask=torch.zeros(6, 4, dtype=torch.bool))
