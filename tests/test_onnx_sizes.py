"""Which sizes of an export may change: those declared, whatever the example's are."""

import itertools

import pytest
import torch
from exported import MARKS, H, I, check, drawn, export, lstm
from torch import nn
from torch.export import Dim

import lstm_ext

pytestmark = MARKS

T, B = Dim("T"), Dim("B")
MERGES = [(False, "concat"), *((True, mode) for mode in ("concat", "sum", "mul", "ave", None))]


def named(batch_first):
    return {"input": {0: B, 1: T} if batch_first else {0: T, 1: B}}


class Each(nn.Module):
    """LSTMs that all run on one input: with lengths, and those of one direction from states too."""

    def __init__(self, batch_first):
        super().__init__()
        self.lstms = nn.ModuleList(
            lstm(bidirectional=two, merge_mode=mode, proj_size=P, batch_first=batch_first)
            for (two, mode), P in itertools.product(MERGES, (0, 3))
        )

    def forward(self, input, h, c, lengths):
        made = []
        for module in self.lstms:
            made.append(module(input, lengths=lengths))
            if not module.bidirectional:
                made.append(module(input, (h[..., : module.proj_size or H], c)))
        return made


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 3), (5, 1)], ids=str)
def test_an_example_of_size_1_fixes_no_declared_size(tmp_path, sizes, batch_first):
    model = Each(batch_first).eval()

    def call(T, B):
        x = torch.randn(B, T, I) if batch_first else torch.randn(T, B, I)
        return x, *torch.randn(2, 1, B, H), torch.randint(T + 1, (B,))

    shapes = named(batch_first) | {"h": {1: B}, "c": {1: B}, "lengths": {0: B}}
    _, session = export(tmp_path, model, call(*sizes), dynamic_shapes=shapes)
    expected = [["B", "T", I] if batch_first else ["T", "B", I], [1, "B", H], [1, "B", H], ["B"]]
    assert [i.shape for i in session.get_inputs()] == expected
    for others in ((7, 2), (1, 4), (3, 1)):
        check(session, model, call(*others))


@pytest.mark.parametrize("sizes", [(1, 1), (1, 3), (5, 1)], ids=str)
def test_nor_in_a_network_on_frames(tmp_path, sizes):
    rnn = lstm_ext.LSTM(2 * 2 * 3, H, bidirectional=True, proj_size=3)
    cnn = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten())
    model = drawn(lstm_ext.CNNLSTM(cnn, rnn))
    x = torch.randn(*sizes, 1, 4, 5)
    _, session = export(tmp_path, model, (x,), dynamic_shapes=named(False))
    check(session, model, (torch.randn(4, 2, 1, 4, 5),))
    check(session, model, (torch.randn(1, 1, 1, 4, 5),))


@pytest.mark.parametrize("proj_size", [0, 3])
def test_nor_does_one_step_unbatched(tmp_path, proj_size):
    module = lstm(bidirectional=True, proj_size=proj_size)
    shapes = {"input": {0: T}}
    _, session = export(tmp_path, module, (torch.randn(1, I),), dynamic_shapes=shapes)
    check(session, module, (torch.randn(6, I),))


def test_nor_does_one_sequence_of_a_cell(tmp_path):
    module = drawn(lstm_ext.LSTMCell(I, H))

    def call(B):
        return torch.randn(B, I), (torch.randn(B, H), torch.randn(B, H))

    shapes = ({0: B}, ({0: B}, {0: B}))
    _, session = export(tmp_path, module, call(1), dynamic_shapes=shapes)
    check(session, module, call(5))


class Fixes(nn.Module):
    """Takes T as a number, and leaves B alone."""

    def __init__(self):
        super().__init__()
        self.lstm = lstm()

    def forward(self, x):
        return self.lstm(x)[0].view(int(x.size(0)), -1, H)


@pytest.mark.parametrize(
    "shapes",
    [{"x": {0: T, 1: B}}, ({0: T},), [[T, B, None]]],
    ids=["dict", "tuple", "list"],
)
def test_a_declared_size_that_the_model_fixes_is_refused(tmp_path, shapes):
    path = tmp_path / "model.onnx"
    with pytest.raises(ValueError, match=r"declares size 0 of x as T, .* fixes it, got 5"):
        lstm_ext.onnx.export(
            Fixes().eval(), (torch.randn(5, 3, I),), path, dynamic_shapes=shapes, verbose=False
        )
    assert not path.exists()


@pytest.mark.parametrize(
    "shapes",
    [
        None,
        {"x": None},
        {"x": {0: Dim.AUTO, 1: B}},
        ({0: Dim.STATIC, 1: "B"},),
        ((5, B, None),),
        ((Dim.STATIC, Dim.AUTO, None),),
    ],
    ids=["none", "none of x", "auto", "static", "number", "hints"],
)
def test_what_is_not_declared_to_change_may_be_fixed(tmp_path, shapes):
    model = Fixes().eval()
    _, session = export(tmp_path, model, (torch.randn(5, 3, I),), dynamic_shapes=shapes)
    check(session, model, (torch.randn(5, 3, I),))
