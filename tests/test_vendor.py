"""Products by cuBLASLt, on a library that stands in for it: see emulator/fake_cublaslt.cpp."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from emulated import load_module
from emulator.build import build

from lstm_ext.engine import DTYPE_CODE

STREAM = 0x57  # what the library expects
TF32_EPS = 2.0**-11
SIZES = (6, 5, 7)  # M, N, K


@pytest.fixture(scope="module")
def vendor():
    """The module, the library, and what was said before one was open."""
    core = load_module("_vendor", ["csrc/cuda/vendor.cpp", "tests/emulator/vendor_module.cpp"])
    library_path = build("libfake_cublaslt.so", ["tests/emulator/fake_cublaslt.cpp"], kind="shared")
    said = [core.cuda_open_vendor(name) for name in ("libnowhere.so.1", "libm.so.6")]
    before = core.cuda_vendor_version()
    with pytest.raises(RuntimeError) as error:
        product(core)
    assert core.cuda_open_vendor(str(library_path)) == ""
    return SimpleNamespace(
        core=core,
        library=ctypes.CDLL(str(library_path)),
        said=said,
        before=before,
        error=str(error.value),
    )


def product(core, M=6, N=5, K=7, **facts):
    defaults = {"dtype": 1, "tf32": False, "wide": False, "accumulate": False, "device": 0}
    defaults |= {"a_transposed": False, "b_transposed": False, "alignment": 16}
    facts = defaults | facts
    rows = {"lda": M if facts["a_transposed"] else K, "ldb": K if facts["b_transposed"] else N}
    return core.CudaProduct(M=M, N=N, K=K, **(rows | {"ldout": N} | facts))


def test_opening(vendor):
    assert "libnowhere.so.1" in vendor.said[0]
    assert vendor.said[1] == "libm.so.6 has no cublasLtCreate"
    assert vendor.before == 0 and vendor.core.cuda_vendor_version() == 130100
    assert vendor.error.startswith("cuBLASLt is not open: cannot multiply float32 [6, 7] x [7, 5]")
    assert vendor.core.cuda_open_vendor("libnowhere.so.1") == "", "one is open"


def padded(rows, columns, dtype, extra):
    """Rows that are longer than they are wide, of which nothing else is to be touched."""
    return torch.randn(rows, columns + extra).to(dtype)[:, :columns]


@pytest.mark.parametrize(
    "dtype, wide", [(t, wide) for t in DTYPE_CODE for wide in (False, True)[: 4 // t.itemsize or 1]]
)
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_products(vendor, dtype, wide, a_transposed, b_transposed, accumulate):
    M, N, K = SIZES
    a = padded(*((K, M) if a_transposed else (M, K)), dtype, 1)
    b = padded(*((N, K) if b_transposed else (K, N)), dtype, 2)
    whole = torch.randn(M, N + 3).to(torch.float32 if wide else dtype)
    out, beside = whole[:, :N], whole[:, N:].clone()
    factors = (a.t() if a_transposed else a, b.t() if b_transposed else b)
    expected = factors[0].double() @ factors[1].double()
    if accumulate:
        expected += out.double()
    made = product(
        vendor.core,
        dtype=DTYPE_CODE[dtype],
        wide=wide,
        accumulate=accumulate,
        a_transposed=a_transposed,
        b_transposed=b_transposed,
        lda=a.stride(0),
        ldb=b.stride(0),
        ldout=out.stride(0),
    )
    assert bool(made.workspace) != a_transposed
    scratch = torch.empty(made.workspace, dtype=torch.uint8)
    made.run(a.data_ptr(), b.data_ptr(), out.data_ptr(), scratch.data_ptr(), STREAM)
    torch.testing.assert_close(out, expected.to(out.dtype))
    assert torch.equal(whole[:, N:], beside)
    assert vendor.library.fake_reductions() == 2, "parts of a sum are kept in the compute type"


def test_tf32_only_when_asked(vendor):
    a, b = torch.full((6, 7), 1 + TF32_EPS / 4), torch.ones(7, 5)
    for tf32, expected in ((False, 7 * (1 + TF32_EPS / 4)), (True, 7.0)):
        out = torch.empty(6, 5)
        made = product(vendor.core, tf32=tf32)
        scratch = torch.empty(made.workspace, dtype=torch.uint8)
        made.run(a.data_ptr(), b.data_ptr(), out.data_ptr(), scratch.data_ptr(), STREAM)
        assert (out == expected).all()


def test_asked_once(vendor):
    chosen, handles = vendor.library.fake_chosen, vendor.library.fake_handles
    product(vendor.core, M=9)
    before, devices = chosen(), handles()
    product(vendor.core, M=9)
    assert (chosen(), handles()) == (before, devices)
    different = [
        {"M": 10},
        {"alignment": 4},
        {"ldout": 8},
        {"accumulate": True},
        {"dtype": 0},
        {"tf32": True},
        {"a_transposed": True},
    ]
    for number, facts in enumerate(different):
        product(vendor.core, **({"M": 9} | facts))
        assert chosen() == before + 1 + number
    assert handles() == devices
    product(vendor.core, M=9, device=3)
    assert handles() == devices + 1


def test_by_several_threads(vendor):
    a, b = torch.randn(32, 7), torch.randn(7, 5)

    def run(number):
        rows = number % 8 + 1
        out = torch.empty(rows, 5)
        made = product(vendor.core, M=rows, accumulate=False, alignment=4)
        scratch = torch.empty(made.workspace, dtype=torch.uint8)
        made.run(a.data_ptr(), b.data_ptr(), out.data_ptr(), scratch.data_ptr(), STREAM)
        return out

    before = vendor.library.fake_chosen()
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(run, range(64)))
    for number, out in enumerate(results):
        torch.testing.assert_close(out, a[: number % 8 + 1] @ b)
    assert vendor.library.fake_chosen() == before + 8


@pytest.mark.parametrize(
    "fail, K, what",
    [
        (lambda library: library.fake_fail_next(15), 71, r".*: not supported \(status 15\)"),
        (lambda library: library.fake_find(1, 15), 72, r".*: not supported \(status 15\)"),
        (lambda library: library.fake_find(0, 0), 73, ""),
    ],
)
def test_no_way_to_multiply(fail, K, what, vendor):
    library, alive = vendor.library, vendor.library.fake_alive()
    fail(library)
    shape = rf"bfloat16 \[{K}, 6\]\^T x \[5, {K}\]\^T on device 0"
    facts = {"a_transposed": True, "b_transposed": True, "dtype": 2, "K": K}
    try:
        with pytest.raises(RuntimeError, match="cuBLASLt .*" + shape + what):
            product(vendor.core, **facts)
    finally:
        library.fake_find(1, 0)
    assert library.fake_alive() == alive, "nothing is left behind"
    product(vendor.core, **facts)  # nor kept


def test_a_product_that_fails(vendor):
    made, out = product(vendor.core, tf32=True), torch.zeros(6, 5)
    scratch = torch.empty(made.workspace, dtype=torch.uint8)
    a, b = torch.ones(6, 7), torch.ones(7, 5)
    arguments = (a.data_ptr(), b.data_ptr(), out.data_ptr(), scratch.data_ptr(), STREAM)
    vendor.library.fake_fail_next(13)
    what = (
        r"cuBLASLt error while multiplying float32 \(TF32\) \[6, 7\] x \[7, 5\] on device 0: "
        r"an error \(status 13\)"
    )
    with pytest.raises(RuntimeError, match=what):
        made.run(*arguments)
    made.run(*arguments)
    assert (out == 7).all()


def test_what_is_forgotten_can_still_run(vendor):
    """Of thousands of shapes, as of batches of any length, not all are kept."""
    alive = vendor.library.fake_alive
    first = product(vendor.core, M=1, K=3)
    for rows in range(2, 4200):
        product(vendor.core, M=rows, K=3)
    assert alive() < 4 * 4100
    a, b, out = torch.ones(1, 3), torch.ones(3, 5), torch.empty(1, 5)
    scratch = torch.empty(first.workspace, dtype=torch.uint8)
    first.run(a.data_ptr(), b.data_ptr(), out.data_ptr(), scratch.data_ptr(), STREAM)
    assert (out == 3).all()
