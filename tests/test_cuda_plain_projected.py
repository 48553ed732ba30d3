"""As test_cuda_plain.py, of layers with projections."""

import itertools

import pytest
import torch
from cases import Case, compare
from device import here, leaf
from short_way import DTYPES, H, I, both_ways, draw, gradients, lstm, module_both_ways

pytestmark = pytest.mark.usefixtures("exact_float32")
P = 7


def states(batch, count=1, dtype=torch.float32):
    return tuple(leaf(draw(count, batch, width, dtype=dtype)) for width in (P, H))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("given, batch_first", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("steps, batch", [(1, 1), (1, 9), (6, 3)])
def test_both_ways(dtype, bidirectional, given, batch_first, steps, batch, short, poisoned):
    options = {"bidirectional": bidirectional, "batch_first": batch_first}
    module = lstm(I, H, proj_size=P, dtype=dtype, **options)
    x = leaf(draw(*((batch, steps) if batch_first else (steps, batch)), I, dtype=dtype))
    hx = states(batch, 1 + bidirectional, dtype) if given else None
    module_both_ways(short, module, x, hx, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"T": 1},
        {"hx": False, "memory": "strided"},
        {"bias": False, "B": 1, "batch_first": True},
        {"H": 64, "proj": 32, "I": 33, "layers": 2},
    ],
)
def test_as_nn_lstm(dtype, bidirectional, case, short):
    case = {"T": 7, "B": 5, "I": 6, "H": 20, "proj": 9, **case}
    compare(Case(**case, dtype=dtype, bidirectional=bidirectional))
    assert short.forwards == short.backwards == [True] * case.get("layers", 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", ["padded", "padded, batch_first", "packed", "resets"])
def test_rows_that_differ(dtype, bidirectional, kind, short, poisoned):
    module = lstm(I, H, proj_size=P, dtype=dtype, bidirectional=bidirectional)
    module.batch_first = "batch_first" in kind
    x, hx = draw(6, 3, I, dtype=dtype), states(3, 1 + bidirectional, dtype)
    lengths, call = torch.tensor([4, 0, 6]), {}
    if kind.startswith("padded"):
        for k, length in enumerate(lengths):
            x[length:, k] = torch.nan
        x, call = x.transpose(0, 1) if module.batch_first else x, {"lengths": here(lengths)}
    elif kind == "packed":
        lengths = torch.tensor([2, 6, 5])
    else:
        call = {"reset_mask": here(torch.rand(6, 3) < 0.3)}
    x = leaf(x)

    def run():
        if kind == "packed":
            pack = torch.nn.utils.rnn.pack_padded_sequence
            given = pack(x, lengths, enforce_sorted=False)
            y, last = module(given, hx)
            outputs = [y.data, *last]
        else:
            y, last = module(x, hx, **call)
            outputs = [y, *last]
        return [*outputs, *gradients(outputs, [x, *hx, *module.parameters()])]

    made = both_ways(short, run, dtype)
    assert all(t.isfinite().all() for t in made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps, given", list(itertools.product([1, 4], [False, True])))
def test_any_inputs_may_be_wanted(dtype, steps, given, short):
    module = lstm(I, H, proj_size=P, bias=False, dtype=dtype)
    x, hx = draw(steps, 3, I, dtype=dtype), states(3, dtype=dtype)
    tensors = [x, *(hx if given else ()), *module.parameters()]
    for flags in itertools.product([False, True], repeat=len(tensors)):
        for tensor, flag in zip(tensors, flags, strict=True):
            tensor.detach_().requires_grad_(flag)
        wanted = [t for t in tensors if t.requires_grad]

        def run(wanted=wanted):
            y, (_, c_n) = module(x, hx if given else None)
            assert y.requires_grad == bool(wanted)
            return torch.autograd.grad(y.sum() + c_n.sum(), wanted) if wanted else []

        both_ways(short, run, dtype)


def test_second_derivatives(short):
    module = lstm(2, 3, proj_size=2, dtype=torch.float64)
    x = leaf(draw(2, 2, 2, dtype=torch.float64))
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], x, fast_mode=True)
    assert all(short.forwards)
