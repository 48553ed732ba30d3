"""lstm_ext.LSTM against torch.nn.LSTM, pairwise over the axes."""

import device
import pytest
import torch
from allpairspy import AllPairs
from cases import Case, compare
from device import without_cudnn
from tolerances import tol

import lstm_ext
from lstm_ext import ops

pytestmark = pytest.mark.tf32

AXES = {
    "T": [1, 2, 7],
    "B": [1, 2, 5, 51],
    "I": [1, 3, 17],
    "H": [1, 5, 16, 33, 64, 130],
    "layers": [1, 2, 3],
    "proj": [0, 1, 4, 32],
    "dtype": [torch.float64, torch.float32],
    "bias": [True, False],
    "bidirectional": [False, True],
    "batch_first": [False, True],
    "hx": [True, False],
    "memory": ["contiguous", "strided", "expanded"],
    "training": [True, False],
    "isa": device.ISAS,
    "threads": device.THREADS,
}


def _possible(values):
    row = dict(zip(AXES, values, strict=False))
    return row.get("proj", 0) < row.get("H", 1000)


PAIRS = [
    pytest.param(dict(zip(AXES, row, strict=True)), id="-".join(str(v) for v in row))
    for row in AllPairs(list(AXES.values()), filter_func=_possible)
]


@pytest.mark.parametrize("row", PAIRS)
def test_same_as_torch(row):
    before = ops.cpu_isa()
    row = dict(row)
    try:
        isa = row.pop("isa")
        if device.NAME == "cpu":
            ops.select_cpu_isa(isa)
        torch.set_num_threads(row.pop("threads"))
        compare(Case(**row))
    finally:
        ops.select_cpu_isa(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "bidirectional, proj, layers", [(False, 0, 1), (True, 0, 2), (False, 6, 1)]
)
def test_half_types(isa, dtype, bidirectional, proj, layers):
    compare(
        Case(
            T=11, B=9, I=12, H=37, dtype=dtype, bidirectional=bidirectional, proj=proj,
            layers=layers,
        )
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed(isa, dtype, bidirectional):
    compare(
        Case(
            T=9, B=6, H=21, layers=2, bidirectional=bidirectional, dtype=dtype,
            lengths=[4, 9, 1, 7, 9, 2],
        )
    )  # fmt: skip


@pytest.mark.parametrize("used", [("y",), ("h_n",), ("c_n",), ("h_n", "c_n")])
def test_loss_on_some_outputs(used):
    compare(Case(layers=2, bidirectional=True, used=used))


def test_long_sequence_and_large_batch():
    compare(Case(T=700, B=2, H=9, dtype=torch.float32))
    compare(Case(T=3, B=700, H=9, dtype=torch.float32))


def test_batch_of_65536_and_more():
    with without_cudnn():
        compare(Case(T=2, B=65_537, I=1, H=2))


def test_65536_steps_and_more(monkeypatch):
    case = Case(T=65_537, B=1, I=1, H=2)
    ours = case.run(lstm_ext.LSTM.from_torch(case.module()))
    # On a GPU cuDNN refuses so many steps, and without it nn.LSTM takes minutes.
    monkeypatch.setattr(device, "DEVICE", torch.device("cpu"))
    theirs = case.run(case.module())
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name].cpu(), expected, msg=name, **tol(case.dtype))
