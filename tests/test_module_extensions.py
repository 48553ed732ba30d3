"""What lstm_ext.LSTM takes and returns beyond nn.LSTM: lengths, reset_mask, cells."""

import sys
import typing

import pytest
import torch
from device import DEVICE, PLACES, here
from tolerances import tol
from torch.testing import assert_close

import lstm_ext
from lstm_ext import reference
from lstm_ext.steps import Steps

TOL = tol(torch.float64)
BITS = {"rtol": 0, "atol": 0}
X = torch.zeros(5, 2, 3)


def randn(*shape):
    return here(torch.randn(*shape, dtype=torch.float64))


def states(module, *batch):
    count = module.num_layers * (1 + module.bidirectional)
    h0 = randn(count, *batch, module.proj_size or module.hidden_size)
    return h0, randn(count, *batch, module.hidden_size)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"num_layers": 2, "bidirectional": True, "proj_size": 2}])
@pytest.mark.parametrize("place", PLACES)
def test_lengths_resets_and_cells_against_the_reference(kwargs, batch_first, place):
    ours = lstm_ext.LSTM(3, 4, batch_first=batch_first, return_cell_sequence=True, **kwargs)
    ours = here(ours.double())
    x, lengths = randn(6, 4, 3), torch.tensor([3, 0, 6, 1]).to(place)
    mask = (torch.rand(6, 4) < 0.3).to(place)
    hx = states(ours, 4)
    flip = (lambda t: t.transpose(0, 1)) if batch_first else (lambda t: t)
    for extra in (
        {"lengths": lengths},
        {"reset_mask": mask},
        {"lengths": lengths, "reset_mask": mask},
    ):
        y, hn, cells = reference.lstm(
            x, hx, ours.all_weights, num_layers=ours.num_layers,
            bidirectional=ours.bidirectional, **here(extra),
        )  # fmt: skip
        given = {k: flip(v) if k == "reset_mask" else v for k, v in extra.items()}
        assert_close(ours(flip(x), hx, **given), (flip(y), hn, flip(cells)), **TOL)


def test_unbatched_lengths_and_resets():
    ours = here(lstm_ext.LSTM(3, 4, 2, bidirectional=True, return_cell_sequence=True).double())
    x, hx, mask = randn(6, 3), states(ours), torch.rand(6) < 0.3
    wide = [s[:, None] for s in hx]
    for lengths in (torch.tensor(4), torch.tensor([4])):
        y, hn, cells = ours(x, hx, lengths=lengths, reset_mask=mask)
        many = ours(x[:, None], wide, lengths=torch.tensor([4]), reset_mask=mask[:, None])
        assert_close((y, cells), (many[0][:, 0], many[2][:, 0]), **BITS)
        assert_close(hn, tuple(s[:, 0] for s in many[1]), **BITS)
    ours.batch_first = True  # ignored for unbatched input, as in nn.LSTM
    assert_close(ours(x, hx, lengths=lengths, reset_mask=mask), (y, hn, cells), **BITS)


def test_cells_of_the_last_layer_carry_gradients():
    ours = here(lstm_ext.LSTM(2, 3, 2, return_cell_sequence=True).double())
    x = randn(3, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ours(x)[2], x)


BAD_LENGTHS = [
    (X, torch.tensor([5])),
    (X, torch.tensor([[5, 5]])),
    (X, torch.tensor(5)),
    (X, torch.tensor([6, 5])),
    (X, torch.tensor([-1, 5])),
    (X, torch.tensor([5.0, 5.0])),
    (X, torch.tensor([True, True])),
    (X, torch.tensor([5, 5], dtype=torch.uint16)),
    (X, [5, 5, 5]),
    (X, [5, 6]),
    (X, [5.0, 5.0]),
    (X, [5, True]),
    (X, [2**70, 1]),
    (X, [[5], [5, 4]]),
    (X, ["5", "5"]),
    (X, 5),
    (X, {5, 4}),
    (X[:, 0], torch.tensor([5, 5])),
    (X[:, 0], torch.tensor(6)),
]


@pytest.mark.parametrize("x, lengths", BAD_LENGTHS)
def test_bad_lengths(x, lengths):
    with pytest.raises((ValueError, TypeError), match="lengths"):
        here(lstm_ext.LSTM(3, 4))(here(x), lengths=lengths)


def test_lengths_without_values():
    module = lstm_ext.LSTM(3, 4, device="meta")
    lengths = torch.empty(2, dtype=torch.int64, device="meta")
    y, (h_n, _) = module(X.to("meta"), lengths=lengths)
    assert y.is_meta and y.shape == (5, 2, 4) and h_n.shape == (1, 2, 4)


@pytest.mark.parametrize("listed", [list, tuple])
def test_lengths_in_a_list(listed):
    """As pack_padded_sequence takes them."""
    module, x = here(lstm_ext.LSTM(3, 4)), here(torch.randn(5, 3, 3))
    expected, _ = module(x, lengths=torch.tensor([2, 5, 0]))
    assert torch.equal(module(x, lengths=listed([2, 5, 0]))[0], expected)
    assert torch.equal(module(x[:, 0], lengths=listed([2]))[0], expected[:, 0])
    assert module(x[:, :0], lengths=listed([]))[0].shape == (5, 0, 4)


BAD_MASKS = [
    (X, torch.zeros(2, 5, dtype=torch.bool)),
    (X, torch.zeros(5, dtype=torch.bool)),
    (X, torch.zeros(5, 2, 1, dtype=torch.bool)),
    (X, torch.zeros(5, 2, dtype=torch.uint8)),
    (X, [[False, False]] * 5),
    (X[:, 0], torch.zeros(5, 1, dtype=torch.bool)),
    (X[:, 0], torch.zeros(4, dtype=torch.bool)),
]


@pytest.mark.parametrize("x, mask", BAD_MASKS)
def test_bad_reset_masks(x, mask):
    with pytest.raises((ValueError, TypeError), match="reset_mask"):
        here(lstm_ext.LSTM(3, 4))(here(x), reset_mask=mask)


def test_batch_first_takes_its_reset_mask_batch_first():
    ours = here(lstm_ext.LSTM(3, 4, batch_first=True))
    x = here(X.transpose(0, 1))
    ours(x, reset_mask=torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="reset_mask"):
        ours(x, reset_mask=torch.zeros(5, 2, dtype=torch.bool))


@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_and_resets_that_change_nothing_are_left_out(batch_first):
    """Where the host knows: such a call then takes the time of one without."""
    T, B = 5, 3
    full = torch.full((B,), T, dtype=torch.int32)
    none = torch.zeros((B, T) if batch_first else (T, B), dtype=torch.bool)
    given = {"batch_first": batch_first, "device": DEVICE}
    assert Steps.padded(T, B, lengths=full, reset_mask=none, **given) is Steps.padded(
        T, B, batch_first=batch_first
    )
    some, one = full.clone(), none.clone()
    some[1], one[1, 1] = T - 1, True
    kept = Steps.padded(T, B, lengths=some, reset_mask=one, **given)
    assert kept.lengths.tolist() == [5, 4, 5] and kept.reset_mask.sum() == 1
    assert Steps.padded(T, B, lengths=full, reset_mask=one, **given).lengths is None
    assert Steps.padded(0, B, lengths=full * 0, **given).lengths is None
    mapped = torch.func.vmap(lambda n: Steps.padded(T, B, lengths=n, **given).lengths)(full[None])
    assert mapped.shape == (1, B)


def test_nothing_is_left_out_of_a_cuda_graph(monkeypatch):
    """Its replays would not see another value."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    full, none = torch.full((3,), 5), torch.zeros(5, 3, dtype=torch.bool)
    for given in ({"lengths": full}, {"reset_mask": none}):
        with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
            Steps.padded(5, 3, **given, device="cuda")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing keeps no overloads")
def test_forward_is_typed_as_nn_lstms():
    """What unpacks nn.LSTM's pair passes a type checker here too."""
    ours, theirs = (
        [typing.get_type_hints(f)["return"] for f in typing.get_overloads(cls.forward)]
        for cls in (lstm_ext.LSTM, torch.nn.LSTM)
    )
    assert ours == theirs and len(ours) == 2
