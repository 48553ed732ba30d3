"""What surrounds the CUDA engine's recurrence, emulated unless there is a GPU: products of any
strides, both ways that there are, weights arranged and rows added up."""

import device
import pytest
import torch
from device import here
from emulated import EmulatedEngine, load

from lstm_ext import ops
from lstm_ext.cuda.products import TorchProducts
from lstm_ext.engine import DTYPE_CODE, acc_dtype

DTYPES = list(DTYPE_CODE)
# Sums of ten products, as a half type or TF32 rounds them.
ROUNDED = {torch.float64: 1e-14, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture
def engine():
    return ops._engines["cuda"] if device.NAME == "cuda" else EmulatedEngine(load(), None)


@pytest.fixture(params=["vendor", "torch"])
def products(request, engine):
    return engine.products if request.param == "vendor" else TorchProducts()


def laid_out(kind, rows, columns, dtype):
    def draw(*size):
        return here(torch.randn(size).to(dtype))

    return {
        "rows": lambda: draw(rows, columns),
        "wider rows": lambda: draw(rows, columns + 3)[:, 1 : columns + 1],
        "columns": lambda: draw(columns, rows).t(),
        "longer columns": lambda: draw(columns + 1, rows + 2)[1:, 1 : rows + 1].t(),
        "strided": lambda: draw(2 * rows, 3 * columns)[::2, ::3],
        "expanded": lambda: draw(1, columns).expand(rows, columns),
    }[kind]()


KINDS = ["rows", "wider rows", "columns", "longer columns", "strided", "expanded"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_products(dtype, wide, add, kind, products):
    out_dtype = acc_dtype(dtype) if wide else dtype
    other = KINDS[(KINDS.index(kind) + 2) % len(KINDS)]
    for M, N, K in ((4, 5, 6), (1, 5, 6), (4, 1, 6), (4, 5, 1), (1, 1, 1), (24, 64, 80)):
        a, b = laid_out(kind, M, K, dtype), laid_out(other, K, N, dtype)
        whole = here(torch.randn(M + 1, N).to(out_dtype))
        out, beside = whole[1:], whole[:1].clone()
        expected = a.double() @ b.double() + (out.double() if add else 0)
        products.into(out, a, b, False, add)
        limit = ROUNDED[out_dtype] * max(expected.abs().max().item(), K**0.5)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=limit)
        assert torch.equal(whole[:1], beside)


@pytest.mark.parametrize("M, N, K", [(0, 2, 3), (2, 0, 3), (2, 3, 0)])
@pytest.mark.parametrize("add", [False, True])
def test_products_of_nothing(M, N, K, add, products):
    out = here(torch.ones(M, N))
    products.into(out, here(torch.ones(M, K)), here(torch.ones(K, N)), False, add)
    assert (out == (1 if add else 0)).all()


def test_tf32_only_when_asked(engine):
    a, b = here(torch.full((32, 32), 1 + 2.0**-13)), here(torch.ones(32, 32))
    out = torch.empty_like(a)
    for tf32, expected in ((False, 32 * (1 + 2.0**-13)), (True, 32.0)):
        engine.products.into(out, a, b, tf32)
        assert (out == expected).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows, columns", [(1, 1), (4, 33), (40, 10), (76, 19), (256, 64)])
def test_arranged(dtype, transposed, rows, columns, engine, poisoned):
    w = here(torch.randn(rows, columns).to(dtype))
    out = engine.arranged(w, transposed=transposed)
    expected = w.t() if transposed else w
    chunk = 64 // dtype.itemsize
    assert out.is_contiguous() and out.shape == (
        len(expected),
        -(-expected.size(1) // chunk) * chunk,
    )
    assert torch.equal(out[:, : expected.size(1)], expected)
    assert not out[:, expected.size(1) :].any()
    assert out.data_ptr() % 16 == 0
    as_read = not transposed and out.shape == w.shape
    assert (out.data_ptr() == w.data_ptr()) == as_read


def test_arranged_from_any_memory(engine):
    """Whole chunks on no 16-byte boundary, and columns that lie one after another."""
    memory = here(torch.randn(8 * 16 + 1))
    for w in (memory[1:].view(8, 16), memory[:-1].view(16, 8).t()):
        out = engine.arranged(w)
        assert out.data_ptr() != w.data_ptr() and out.is_contiguous() and torch.equal(out, w)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 127, 300])
@pytest.mark.parametrize("columns", [4, 76])
def test_rows_added_up(dtype, rows, columns, engine, poisoned):
    m = here(torch.randn(rows, columns).to(dtype))
    sums = m.new_empty(3, columns)
    first, second, third = (s.data_ptr() for s in sums)
    for pair in ((first, second), (0, third)):
        engine.core.cuda_sum_rows(
            DTYPE_CODE[dtype], m.data_ptr(), rows, columns, *pair, engine.stream(m.device)
        )
    expected = m.double().sum(0)
    limit = ROUNDED[dtype] * m.double().abs().sum(0).max().item() if rows else 0
    torch.testing.assert_close(sums[0].double(), expected, rtol=0, atol=limit)
    assert torch.equal(sums[1], sums[0]) and torch.equal(sums[2], sums[0])
