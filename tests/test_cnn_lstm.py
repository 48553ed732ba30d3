"""CNNLSTM beside its two parts in a loop over the steps."""

import pytest
import torch
from device import here
from tolerances import tol
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lstm_ext

F64 = {"dtype": torch.float64}
L, N, H = 4, 3, 5
FRAME, FEATURES = (2, 6, 5), 8


def _cnn(norm=False):
    layers = [nn.Conv2d(2, 2, 3, stride=2, **F64), nn.Tanh()]  # (M, 2, 2, 2)
    return nn.Sequential(*layers, *[nn.BatchNorm2d(2, **F64)] * norm)


def _model(norm=False, **options):
    lstm = lstm_ext.LSTM(FEATURES, H, bidirectional=True, **F64, **options)
    return here(lstm_ext.CNNLSTM(_cnn(norm), lstm))


def _states():
    return tuple(here(torch.randn(2, N, H, **F64)) for _ in range(2))


def _close(got, want):
    torch.testing.assert_close(got, want, **tol(want.dtype))


@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_is_the_cnn_then_the_lstm(batch_first, with_hx):
    model = _model(batch_first=batch_first)
    x = here(torch.randn(L, N, *FRAME, **F64)).requires_grad_()
    hx = _states() if with_hx else None
    y, states = model(x.transpose(0, 1) if batch_first else x, hx)
    features = torch.stack([model.cnn(step).flatten(1) for step in x])
    expected, expected_states = model.lstm(
        features.transpose(0, 1) if batch_first else features, hx
    )
    _close(y, expected)
    for got, want in zip(states, expected_states, strict=True):
        _close(got, want)
    inputs = [x, *model.parameters()]
    gradients = torch.autograd.grad(y.pow(2).sum(), inputs)
    for got, want in zip(
        gradients, torch.autograd.grad(expected.pow(2).sum(), inputs), strict=True
    ):
        _close(got, want)


@pytest.mark.parametrize("batch_first", [False, True])
def test_frames_past_a_length_reach_nothing(batch_first):
    """Neither outputs nor gradients, nor the statistics of batch norm."""
    model, lengths = _model(norm=True, batch_first=batch_first), torch.tensor([2, 4, 0])
    clean = here(torch.randn(L, N, *FRAME, **F64))
    dirty = clean.clone()
    for n, length in enumerate(lengths):
        dirty[length:, n] = float("nan")
    hx = _states()
    y, (h, c) = model(dirty.transpose(0, 1) if batch_first else dirty, hx, lengths=lengths)
    y = y.transpose(0, 1) if batch_first else y
    frames = torch.cat([clean[:length, n] for n, length in enumerate(lengths)])
    _close(model.cnn[2].running_mean, 0.1 * model.cnn[:2](frames).mean((0, 2, 3)))
    made = model.cnn(frames).flatten(1)
    features = clean.new_zeros(L, N, FEATURES)
    features[:2, 0], features[:, 1] = made[:2], made[2:]
    expected, (h_n, c_n) = model.lstm(
        features.transpose(0, 1) if batch_first else features, hx, lengths=lengths
    )
    _close(y, expected.transpose(0, 1) if batch_first else expected)
    _close(h, h_n)
    _close(c, c_n)
    y.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_packed_frames_and_resets():
    model, lengths = _model(), torch.tensor([4, 1, 3])
    x = here(torch.randn(L, N, *FRAME, **F64))
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    y, states = model(packed)
    expected, expected_states = model(x, lengths=lengths)
    _close(pad_packed_sequence(y)[0], expected)
    for got, want in zip(states, expected_states, strict=True):
        _close(got, want)
    with pytest.raises(ValueError, match="already holds its lengths"):
        model(packed, lengths=lengths)
    mask = here(torch.rand(L, N) < 0.5)
    features = torch.stack([model.cnn(step).flatten(1) for step in x])
    _close(model(x, reset_mask=mask)[0], model.lstm(features, reset_mask=mask)[0])


def test_takes_torchs_lstm():
    peer = nn.LSTM(FEATURES, H, batch_first=True, **F64)
    theirs = here(lstm_ext.CNNLSTM(_cnn(), peer))
    x = here(torch.randn(N, L, *FRAME, **F64))
    y, _ = theirs(x)
    ours = lstm_ext.convert(theirs)
    assert type(ours.lstm) is lstm_ext.LSTM
    _close(ours(x)[0], y)


def test_errors():
    lstm = lstm_ext.LSTM(FEATURES, H, **F64)
    x = torch.randn(L, N, *FRAME, **F64)
    with pytest.raises(TypeError, match="cnn should be a torch.nn.Module, got function"):
        lstm_ext.CNNLSTM(lambda frames: frames, lstm)
    with pytest.raises(TypeError, match="lstm should be .* got Linear"):
        lstm_ext.CNNLSTM(_cnn(), nn.Linear(1, 1))
    model = here(lstm_ext.CNNLSTM(_cnn(), lstm))
    with pytest.raises(ValueError, match=r"Expected input \(L, N, \*frame\), got size \(4, 3\)"):
        model(here(x[..., 0, 0, 0]))
    narrow = here(lstm_ext.CNNLSTM(nn.Flatten(), lstm))
    with pytest.raises(RuntimeError, match="features a frame. Expected 8, got 60"):
        narrow(here(x))
    mixing = here(lstm_ext.CNNLSTM(nn.Flatten(0), lstm))
    with pytest.raises(ValueError, match=r"Expected the cnn to return a tensor of 12 .* \(720,\)"):
        mixing(here(x))
    with pytest.raises(ValueError, match="Expected lengths between 0 and"):
        model(here(x), lengths=torch.tensor([1, 5, 2]))
    cnn = _cnn()
    cnn.register_forward_pre_hook(lambda *_: pytest.fail("the cnn runs first"))
    theirs = here(lstm_ext.CNNLSTM(cnn, nn.LSTM(FEATURES, H, **F64)))
    with pytest.raises(TypeError, match="nn.LSTM takes no lengths: make it of an lstm_ext.LSTM"):
        theirs(here(x), lengths=torch.tensor([1, 4, 2]))


@pytest.mark.parametrize("size", [(L, 0), (0, N)])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_no_frames(size, with_lengths):
    model = here(lstm_ext.CNNLSTM(nn.Linear(7, 4), lstm_ext.LSTM(4, H)))
    options = {"lengths": here(torch.zeros(size[1], dtype=torch.int64))} if with_lengths else {}
    y, (h_n, _) = model(here(torch.randn(*size, 7)), **options)
    assert y.shape == (*size, H) and h_n.shape == (1, size[1], H)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_any_frames(strict):
    model, x = _model(), here(torch.randn(L, N, *FRAME, **F64))
    sizes = {"input": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(model, (x,), dynamic_shapes=sizes, strict=strict).module()
    for steps, sequences in ((L, N), (6, 2), (3, 7)):
        x = here(torch.randn(steps, sequences, *FRAME, **F64))
        _close(program(x)[0], model(x)[0])


def test_compiled_with_lengths():
    """How many frames there are is a size that only the tensors tell."""
    model, x = _model().train(), here(torch.randn(L, N, *FRAME, **F64))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for lengths in ([2, 4, 0], [1, 1, 3]):
        lengths = here(torch.tensor(lengths))
        y, expected = (run(x, lengths=lengths)[0] for run in (compiled, model))
        _close(y, expected)
        parameters = list(model.parameters())
        pairs = (torch.autograd.grad(t.square().sum(), parameters) for t in (y, expected))
        for got, want in zip(*pairs, strict=True):
            _close(got, want)
