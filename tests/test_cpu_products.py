"""The CPU core's products: bf16 by its own instruction, and the input product in pieces."""

import math
import os
import subprocess
import sys

import pytest
import torch
from cases import Case
from tolerances import assert_as_good, tol

import lstm_ext
from lstm_ext import _C, reference
from lstm_ext.cpu import backward as cpu_backward
from lstm_ext.cpu import engine as cpu_engine
from lstm_ext.cpu import products as cpu_products
from lstm_ext.engine import native_steps
from lstm_ext.steps import Steps

pytestmark = pytest.mark.cpu_only(reason="the CPU's kernels")

BF16 = torch.bfloat16
needs_bf16 = pytest.mark.skipif(
    not {"avx512_bf16", "neon_bf16"} & set(cpu_engine.cpu_isas()),
    reason="this processor has no AVX512_BF16 and no FEAT_BF16",
)


def _judge(case, dtype):
    module = case.module()
    ours, plain = case.run(lstm_ext.LSTM.from_torch(module)), case.run(module)
    truth = case.run(module, torch.float64)
    for name in truth:
        if dtype == BF16:
            assert_as_good(ours[name], plain[name], truth[name], name)
        else:
            _assert_near(ours[name].double(), truth[name], dtype)


def _on_any_threads(run, counts=(1, 2, 3), grouped=False):
    """The tensors by name that run() returns, with the same bits on these numbers of threads.

    grouped: but for the gradients of weights and biases, which are near: groups of sequences are
    summed up on their own.
    """
    results = []
    for threads in counts:
        torch.set_num_threads(threads)
        results.append(run())
    for name, first in results[0].items():
        for other in (result[name] for result in results[1:]):
            if grouped and name.startswith(("dweight", "dbias")):
                _assert_near(other, first)
            else:
                assert torch.equal(first, other), name
    return results[0]


def _assert_near(found, expected, dtype=None):
    """dtype: of the numbers as they were computed; the expected ones' own, if None."""
    dtype = dtype or expected.dtype
    limits, scale = tol(torch.promote_types(dtype, torch.float32)), expected.abs().max().item()
    step = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0  # rounded the other way
    torch.testing.assert_close(
        found, expected, rtol=limits["rtol"] + step, atol=limits["atol"] * max(1.0, scale)
    )


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize(("H", "P"), [(256, 0), (300, 256), (512, 0), (320, 0)])
def test_single_sequence(isa, H, P, dtype):
    """Long enough for a copy of W_hh: a short last block, rows of several lengths."""
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        case = Case(T=19, B=1, I=8, H=H, proj=P, dtype=dtype)
        _judge(case, dtype)
        with torch.no_grad():
            results.append(lstm_ext.LSTM.from_torch(case.module())(case.inputs()["x"])[0])
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, BF16], ids=str)
@pytest.mark.parametrize(
    ("size", "more"),
    [
        ((1, 5, 256), {}),
        ((3, 16, 300), {"bidirectional": True}),
        ((4, 12, 256), {"lengths": [4, 1, 3, 4, 2, 2, 4, 1, 3, 3, 4, 2]}),
        ((2, 24, 256), {"proj": 130}),
        ((1, 48, 256), {}),
        ((1, 49, 256), {}),
        ((5, 9, 256), {}),
    ],
    ids=lambda value: "T{}-B{}-H{}".format(*value) if isinstance(value, tuple) else "",
)
def test_few_rows(isa, size, more, dtype):
    """Up to 48 in 4 steps: W_hh is not packed; on any number of threads the same bits."""
    T, B, H = size
    case = Case(T=T, B=B, I=140, H=H, dtype=dtype, **more)
    _on_any_threads(lambda: case.run(lstm_ext.LSTM.from_torch(case.module())))
    _judge(case, dtype)


def test_long_input_of_few_rows(isa):
    """On as many threads as groups of sequences would take, where vectors have 16 lanes."""
    module, x = lstm_ext.LSTM(256, 192), torch.randn(1, 43, 256)
    with torch.no_grad():
        _on_any_threads(lambda: {"y": module(x)[0]}, (1, 24))


@pytest.mark.parametrize("size", [(16, 1, 64), (15, 1, 64), (20, 5, 32)], ids=str)
def test_steps_for_two_threads(isa, size):
    """Too small for three; on any number the same bits."""
    T, B, H = size
    case = Case(T=T, B=B, I=7, H=H)

    def run():
        _judge(case, torch.float32)
        return case.run(lstm_ext.LSTM.from_torch(case.module()))

    _on_any_threads(run, grouped=B > 1)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize(
    "size",
    [(23, 5, 9, 19), (60, 1, 7, 33), (13, 4, 288, 272), (3, 70, 21, 40), (2, 101, 32, 16)],
    ids=lambda size: "T{}-B{}-I{}-H{}".format(*size),
)
def test_input_product_in_pieces(isa, size, dtype, threads):
    """Several pieces, of which the last is short, and pieces of more rows than a chunk."""
    torch.set_num_threads(threads)
    T, B, I, H = size
    _judge(Case(T=T, B=B, I=I, H=H, bidirectional=True, dtype=dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("proj", [None, 13], ids=["plain", "proj"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time-major", "batch-major"])
def test_pieces_of_unequal_sequences(isa, batch_first, proj, reverse, dtype):
    """A piece holds as many rows as sequences are left at its steps; resets within pieces."""
    T, B, I, H = 31, 6, 11, 37
    g = torch.Generator().manual_seed(3)
    lengths = torch.tensor([31, 1, 17, 0, 30, 9])
    mask = torch.rand(T, B, generator=g) < 0.1
    module = lstm_ext.LSTM(
        I, H, proj_size=proj or 0, batch_first=batch_first, bidirectional=reverse, dtype=dtype
    )
    x = torch.randn(T, B, I, generator=g).to(dtype)
    given = x.transpose(0, 1) if batch_first else x
    y = module(given, lengths=lengths, reset_mask=mask.T if batch_first else mask)[0]
    y = y.transpose(0, 1) if batch_first else y
    P = proj or H

    def plain(dtype):
        columns = []
        for suffix in ("", "_reverse")[: 1 + reverse]:
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")[
                : 5 if proj else 4
            ]
            weights = [getattr(module, f"{name}_l0{suffix}").to(dtype) for name in names]
            columns.append(
                reference.lstm_layer(
                    x.to(dtype),
                    torch.zeros(B, P, dtype=dtype),
                    torch.zeros(B, H, dtype=dtype),
                    *weights,
                    lengths=lengths,
                    reset_mask=mask,
                    reverse=bool(suffix),
                )[0]
            )
        return torch.cat(columns, dim=2).detach()

    truth = plain(torch.float64)
    if dtype == BF16:
        assert_as_good(y.detach(), plain(dtype), truth)
    else:
        torch.testing.assert_close(y.detach().double(), truth, **tol(dtype))


@needs_bf16
def test_which_layers_multiply_bf16(monkeypatch):
    """bf16 layers as nn.LSTM has them; not other dtypes, kernel sets, variants, thread limits."""
    used = []

    class Core:
        def __getattr__(self, name):
            if name != "CpuForward":
                return getattr(_C, name)
            return lambda dtype, bf16, *more: used.append(bf16) or _C.CpuForward(dtype, bf16, *more)

    monkeypatch.setattr(cpu_engine, "_C", Core())

    def asked(dtype=BF16, **options):
        used.clear()
        module = lstm_ext.LSTM(4, 8, dtype=dtype, return_cell_sequence=True, **options)
        module(torch.randn(3, 2, 4, dtype=dtype))
        (flag,) = used
        return flag

    before = cpu_engine.cpu_isa()
    try:
        cpu_engine.select_cpu_isa(cpu_engine.cpu_isas()[0])
        assert asked() and asked(proj_size=3)
        assert not asked(torch.float32) and not asked(torch.float16)
        assert not asked(peephole=True) and not asked(zoneout=(0.1, 0.1))
        cpu_engine.select_cpu_isa("portable")
        assert not asked()
    finally:
        cpu_engine.select_cpu_isa(before)


def test_kernels_without_bf16_products_refuse_them():
    steps = native_steps(_C, Steps.padded(1, 1), False)
    before = cpu_engine.cpu_isa()
    try:
        cpu_engine.select_cpu_isa("portable")
        with pytest.raises(ValueError, match="portable do not multiply bf16"):
            # fmt: off
            call = _C.CpuBackward(
                2, True, 1, steps, 4, 4, _C.Variants(), None, None, None, None, None, 4,
                None, None, None, None, None, 4, None, None, None, None, None, None, None,
                None, None, None, None, None,
            )
            # fmt: on
            _C.cpu_backward(call, None, lambda size: None)
    finally:
        cpu_engine.select_cpu_isa(before)


@needs_bf16
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("B", [1, 4, 24])
def test_bf16_against_torch(B, threads):
    """Sizes of use: rows of weights as they lie, and packed ones; K in several slices."""
    torch.set_num_threads(threads)
    _judge(Case(T=12, B=B, I=256, H=512, dtype=BF16), BF16)


@needs_bf16
@pytest.mark.parametrize("H", [24, 256])
def test_bf16_special_values(H):
    """An infinity or a NaN in one sequence stays there."""
    module = lstm_ext.LSTM(6, H, dtype=BF16).requires_grad_(False)
    x = torch.randn(5, 4, 6, dtype=BF16)
    clean = module(x)[0]
    x[2, 1, 3], x[2, 2, 0] = float("nan"), float("inf")
    y = module(x)[0]
    assert torch.equal(y[:, [0, 3]], clean[:, [0, 3]]) and torch.equal(y[:2], clean[:2])
    assert y[2:, 1].isnan().all()
    assert y[2:, 2].abs().nan_to_num(0).max() <= 1


@needs_bf16
def test_bf16_with_fewer_threads_than_asked_for():
    code = """
import sys; sys.path[:0] = sys.argv[1:]
import torch
torch.set_num_threads(4)
from cases import Case
from tolerances import assert_as_good
import lstm_ext
case = Case(T=20, B=33, I=80, H=64, layers=2, bidirectional=True, dtype=torch.bfloat16)
module = case.module()
ours = case.run(lstm_ext.LSTM.from_torch(module))
torch.set_num_threads(1)
plain, truth = case.run(module), case.run(module, torch.float64)
for name in truth:
    assert_as_good(ours[name], plain[name], truth[name], name)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, os.path.dirname(__file__)],
        env={**os.environ, "OMP_THREAD_LIMIT": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def _operands(names):
    """The dtypes of a product's two sides."""
    dtypes = {"64": torch.double, "32": torch.float, "16": torch.half, "bf16": BF16}
    left, right = (dtypes[name] for name in names.split())
    if left == BF16 and not _C.cpu_bf16_products():
        pytest.skip("these kernels do not multiply bf16")
    return left, right


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtypes", ["64 64", "32 32", "32 bf16", "32 16", "bf16 bf16"])
@pytest.mark.parametrize(
    "size",
    [
        (1, 20, 7, 3),
        (37, 76, 19, 5),
        (9000, 5, 13, 0),
        (801, 52, 13, 200),
        (913, 268, 41, 64),
        (600, 520, 300, 0),
        (1301, 52, 730, 400),
        (650, 1180, 730, 400),
        (640, 40, 257, 0),
    ],
    ids=lambda size: "{}x{}x{}+{}".format(*size),
)
def test_products_of_all_weights_at_once(isa, size, dtypes, threads, monkeypatch):
    """Both products and the sums: several slices, pieces of columns (the last of one block, too)
    and groups of rows; rows or columns shared, by more threads than there are blocks, too."""
    monkeypatch.setattr(cpu_products, "_is_for_torch", lambda *args, **kwargs: False)
    torch.set_num_threads(threads)
    rows, M, N, more_N = size
    dtype_a, dtype_w = _operands(dtypes)
    g = torch.Generator().manual_seed(5)
    a = torch.randn(rows, M, generator=g).to(dtype_a)
    w = torch.randn(rows, N, generator=g).to(dtype_w)
    more_w = torch.randn(rows, more_N, generator=g).to(dtype_w) if more_N else None
    out, more_out, sums = cpu_products.transposed_matmul(a, w, more_w, True)
    true = a.double().T @ torch.cat([w, *([more_w] if more_N else [])], 1).double()
    found = torch.cat([out, *([more_out] if more_N else [])], 1)
    limits = tol(sums.dtype)
    scale = true.abs().max().item()
    assert found.dtype == dtype_w
    rounding = torch.finfo(dtype_w).eps / 2 if dtype_w.itemsize == 2 else 0
    torch.testing.assert_close(
        found.double(), true, rtol=limits["rtol"] + rounding, atol=limits["atol"] * scale
    )
    torch.testing.assert_close(
        sums.double(), a.double().sum(0), rtol=0, atol=tol(sums.dtype)["atol"] * scale
    )
    # Whatever the number of threads, every sum is made in one order.
    torch.set_num_threads(threads % 3 + 1)
    again = cpu_products.transposed_matmul(a, w, more_w, True)
    assert torch.equal(out, again[0])
    assert more_w is None or torch.equal(more_out, again[1])
    assert torch.equal(sums, again[2])


@pytest.mark.parametrize("dtypes", ["64 64", "32 32", "32 bf16", "bf16 bf16"])
@pytest.mark.parametrize("size", [(1, 9, 3), (53, 700, 1100), (700, 1301, 600)], ids=str)
def test_products_with_weights(isa, size, dtypes, monkeypatch):
    """As they lie: several slices, pieces of columns and groups of rows."""
    monkeypatch.setattr(cpu_products, "_is_for_torch", lambda *args, **kwargs: False)
    dtype_a, dtype_w = _operands(dtypes)
    M, K, N = size
    K += K % 2 if dtype_a == BF16 else 0  # pairs
    g = torch.Generator().manual_seed(5)
    a, w = torch.randn(M, K, generator=g).to(dtype_a), torch.randn(K, N, generator=g).to(dtype_w)
    true = a.double() @ w.double()
    out = _on_any_threads(lambda: {"out": cpu_products.matmul(a, w)})["out"]
    limits = tol(torch.promote_types(dtype_a, torch.float32))
    rounding = torch.finfo(BF16).eps / 2 if dtype_a == BF16 else 0
    torch.testing.assert_close(
        out.double(),
        true,
        rtol=limits["rtol"] + rounding,
        atol=limits["atol"] * true.abs().max().item(),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("size", "more"),
    [
        ((23, 37, 19, 21), {"bidirectional": True}),
        ((61, 16, 70, 33), {"proj": 18}),
        ((3, 400, 5, 16), {"bias": False}),
        ((2, 1300, 5, 16), {}),  # more rows at a step than a slice of the products has
        ((90, 9, 144, 40), {"memory": "strided"}),
        ((60, 17, 23, 33), {"batch_first": True, "bidirectional": True}),
        ((400, 3, 70, 20), {"batch_first": True, "memory": "strided"}),
        ((90, 12, 70, 33), {"lengths": [90, 3, 41, 90, 89, 1, 77, 60, 30, 90, 20, 51], "proj": 9}),
        ((300, 5, 19, 21), {"lengths": [7, 300, 299, 12, 288], "bidirectional": True}),
    ],
    ids=lambda value: "T{}-B{}-I{}-H{}".format(*value) if isinstance(value, tuple) else "",
)
def test_gradients_beside_the_recurrence(isa, size, more, dtype, monkeypatch):
    """Several parts of the steps, of unequal length; columns or rows of dx shared by threads."""

    def refuse(*args):
        raise AssertionError("a product over all steps")

    monkeypatch.setattr(cpu_backward, "matmul", refuse)
    monkeypatch.setattr(cpu_backward, "transposed_matmul", refuse)
    T, B, I, H = size
    case = Case(T=T, B=B, I=I, H=H, dtype=dtype, **more)
    if case.proj:  # W_hr's gradient is one still
        monkeypatch.setattr(cpu_backward, "transposed_matmul", cpu_products.transposed_matmul)
    module = lstm_ext.LSTM.from_torch(case.module())
    _on_any_threads(lambda: case.run(module), grouped=True)
    if dtype != torch.float16:  # nn.LSTM has no gradients of it here
        _judge(case, dtype)


@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
@pytest.mark.parametrize(
    "lengths",
    [
        [60, 0, 200, 133, 5, 199],
        [90, 12, 17, 0, 33, 61],
        [1, 0, 0, 0, 0, 0],
        [0, 0, 0, 9, 0, 0],
        [0] * 6,
    ],
    ids=["all steps", "the first 90", "one step", "one sequence", "none"],
)
def test_gradients_beside_the_recurrence_of_lengths(batch_first, lengths, monkeypatch):
    """As the products over all steps have them; what lies in the padding is NaN.

    So few units that three threads have groups of sequences (8 lanes): some have no steps.
    """
    torch.manual_seed(0)
    T, B, I, H = 200, 192, 37, 8
    exact = {"dtype": torch.float64}
    module = lstm_ext.LSTM(I, H, bidirectional=True, batch_first=batch_first, **exact)
    x, lengths = torch.randn(T, B, I, **exact), torch.tensor(lengths).repeat_interleave(B // 6)
    padding = torch.arange(T)[:, None] >= lengths
    x[padding] = math.nan
    cotangent = torch.randn(T, B, 2 * H, **exact)
    if batch_first:
        x, cotangent = x.transpose(0, 1).contiguous(), cotangent.transpose(0, 1)
    x.requires_grad_()
    parameters = [x, *module.parameters()]

    def gradients(threads):
        torch.set_num_threads(threads)
        y = module(x, lengths=lengths)[0]
        return torch.autograd.grad(y, parameters, cotangent)

    beside, *others = (gradients(threads) for threads in (1, 2, 3))
    monkeypatch.setattr(cpu_backward, "FUSED_ROWS", 10**9)
    after = gradients(2)
    assert not beside[0][padding.T if batch_first else padding].any()
    for i, (expected, *found) in enumerate(zip(after, beside, *others, strict=True)):
        for one in found:
            torch.testing.assert_close(one, expected, rtol=1e-10, atol=1e-11)
            assert i or torch.equal(one, found[0])  # the gradient of x


def test_gradients_beside_the_recurrence_of_variants(monkeypatch):
    """As the products over all steps have them: resets, dropped h, state that stays, no dx."""
    torch.manual_seed(0)
    module = lstm_ext.LSTM(19, 21, peephole=True, zoneout=(0.2, 0.3), recurrent_dropout=0.4)
    x, cotangent = torch.randn(50, 16, 19), torch.randn(50, 16, 21)
    resets = torch.rand(50, 16) < 0.1

    def gradients(fused_rows):
        monkeypatch.setattr(cpu_backward, "FUSED_ROWS", fused_rows)
        torch.manual_seed(1)
        y = module(x, reset_mask=resets)[0]
        return torch.autograd.grad(y, list(module.parameters()), cotangent)

    monkeypatch.setattr(cpu_backward, "_fused", _counted(cpu_backward._fused, found := []))
    for beside, after in zip(gradients(1), gradients(10**9), strict=True):
        torch.testing.assert_close(beside, after, rtol=1e-4, atol=1e-4 * after.abs().max().item())
    assert found == [True, False]


def _counted(call, results):
    def run(*args):
        results.append(call(*args))
        return results[-1]

    return run
