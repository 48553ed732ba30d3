"""The kernels: every instruction set, poisoned memory, bounds, threads, repeatability."""

import os
import subprocess
import sys

import device
import pytest
import torch
from cases import HALF, Case, compare
from device import here
from layers import lstm_layer
from tolerances import assert_as_good, tol
from torch.utils.data import DataLoader, Dataset

import lstm_ext
from lstm_ext import ops, reference
from lstm_ext.cpu import engine as cpu_engine
from lstm_ext.cpu import products as cpu_products
from lstm_ext.ops import LayerWeights
from lstm_ext.steps import Steps

DTYPES = [torch.float64, torch.float32, *HALF]
# Each shape takes another way through the kernels: T, B, I, H.
SHAPES = {
    "ones": (1, 1, 1, 1),
    "odd": (4, 7, 5, 19),
    "wide": (3, 2, 40, 130),
    "one_row": (4, 1, 9, 200),
    "three_rows": (3, 3, 5, 77),
    "dots": (3, 1, 256, 256),
    "dots_odd_units": (3, 4, 272, 272 + 16),
    "dots_three_rows": (2, 3, 256, 256),
    "one_step": (1, 9, 6, 33),
    "groups": (20, 9, 6, 33),
    "torch_input": (9, 50, 6, 20),
    "chunks_of_rows": (2, 101, 3, 20),
    "slices_of_k": (3, 13, 3, 400),
}


def _layer(T, B, I, H, P=None, seed=0):
    """x (T, B, I), h0, c0 and the weights, in float64."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size, scale=1.0):
        return here(torch.randn(*size, generator=g, dtype=torch.float64)) * scale

    p = P or H
    scale = H**-0.5
    weights = [draw(4 * H, I, scale=scale), draw(4 * H, p, scale=scale), draw(4 * H), draw(4 * H)]
    weights.append(draw(P, H, scale=scale) if P else None)
    return draw(T, B, I), draw(B, p), draw(B, H), weights


def _both(T, B, I, H, dtype, *, P=None, batch_first=False, reverse=False, **options):
    """Outputs and gradients of the core, and of the reference in the same dtype and in float64."""
    x, h0, c0, weights = _layer(T, B, I, H, P)
    tensors = [t if t is None else t.to(dtype) for t in (x, h0, c0, *weights)]

    def run(function, dtype):
        leaves = [t if t is None else t.to(dtype).requires_grad_() for t in tensors]
        outputs = function(*leaves)
        g = torch.Generator().manual_seed(9)
        loss = sum(
            (o.double() * here(torch.randn(o.shape, generator=g, dtype=torch.float64))).sum()
            for o in outputs
        )
        leaves = [t for t in leaves if t is not None]
        return [o.detach() for o in outputs] + list(torch.autograd.grad(loss, leaves))

    mask = options.get("reset_mask")
    steps = Steps.padded(
        T,
        B,
        batch_first=batch_first,
        lengths=options.get("lengths"),
        reset_mask=mask.T if mask is not None and batch_first else mask,
        device=device.DEVICE,
    )

    def core(x, h0, c0, *weights):
        rows = steps.from_time_major(x)
        y, h_n, c_n, cells = lstm_layer(
            rows, h0, c0, LayerWeights(*weights), steps, reverse=reverse, cells=True
        )
        return steps.to_time_major(y), h_n, c_n, steps.to_time_major(cells)

    def plain(x, h0, c0, *weights):
        return reference.lstm_layer(x, h0, c0, *weights, reverse=reverse, **here(options))

    return run(core, dtype), run(plain, dtype), run(plain, torch.float64)


def _check(ours, plain, truth, dtype):
    for mine, same_dtype, exact in zip(ours, plain, truth, strict=True):
        if dtype in HALF:
            assert_as_good(mine, same_dtype, exact)
        else:
            scale = max(1.0, exact.abs().max().item()) if exact.numel() else 1.0
            limits = tol(dtype)
            torch.testing.assert_close(
                mine.double(), exact, rtol=limits["rtol"], atol=limits["atol"] * scale
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set(isa, shape, dtype):
    _check(*_both(*SHAPES[shape], dtype), dtype)


OPTIONS = {
    "lengths": {"lengths": torch.tensor([3, 0, 6, 1, 5])},
    "resets": {"reset_mask": torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.3},
    "both": {
        "lengths": torch.tensor([6, 2, 4, 4, 1]),
        "reset_mask": torch.rand(6, 5, generator=torch.Generator().manual_seed(2)) < 0.3,
    },
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("proj", [None, 11], ids=["plain", "proj"])
@pytest.mark.parametrize("options", OPTIONS)
def test_lengths_and_resets(isa, options, proj, reverse, dtype):
    for batch_first in (False, True):
        _check(
            *_both(6, 5, 4, 19, dtype, P=proj, batch_first=batch_first, reverse=reverse,
                   **OPTIONS[options]),
            dtype,
        )  # fmt: skip


def test_lengths_with_few_rows_left(isa):
    """One to four rows, dots and not: how many sequences are left changes from step to step."""
    options = {"lengths": torch.tensor([5, 1, 3, 4])}
    for H in (200, 256):
        for reverse in (False, True):
            _check(*_both(5, 4, 8, H, torch.float32, reverse=reverse, **options), torch.float32)


@pytest.mark.cpu_only(reason="the core's dots on the CPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_single_step_of_more_rows_than_a_chunk(isa, dtype):
    """Dots of 26 rows and of 27: weights that are many are not packed for one step."""
    _check(*_both(1, 53, 352, 352, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_poisoned_memory(poisoned, isa, shape, dtype):
    _check(*_both(*SHAPES[shape], dtype), dtype)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("proj", [None, 11], ids=["plain", "proj"])
def test_poisoned_memory_with_lengths(poisoned, isa, options, proj):
    _check(*_both(6, 5, 4, 19, torch.float32, P=proj, **OPTIONS[options]), torch.float32)


@pytest.mark.cpu_only(reason="the core's workspace on the CPU")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_workspace_bounds(monkeypatch, isa, shape, threads):
    """Nothing is written past the bytes of workspace that the core asked for."""
    guarded = []

    def workspace(size):
        whole = torch.full((size + 8192,), 0x5A, dtype=torch.uint8)
        guarded.append(whole[size:])
        return whole[:size]

    monkeypatch.setattr(cpu_products, "workspace", workspace)
    torch.set_num_threads(threads)
    _both(*SHAPES[shape], torch.float32)
    _both(*SHAPES[shape][:3], 37, torch.bfloat16, P=9)
    assert len(guarded) >= 4
    assert all((guard == 0x5A).all() for guard in guarded)


@pytest.mark.cpu_only(reason="OpenMP threads")
@pytest.mark.parametrize("threads", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    "shape", [(20, 100, 8, 16), (5, 100, 8, 33), (6, 3, 8, 150), (4, 40, 8, 70)]
)
def test_threads(isa, shape, threads):
    """Any number of threads, more than cores or blocks of units; the same bits again."""
    torch.set_num_threads(threads)
    for proj in (None, 13):
        first = _both(*shape, torch.float32, P=proj)
        _check(*first, torch.float32)
        again = _both(*shape, torch.float32, P=proj)[0]
        assert all(torch.equal(a, b) for a, b in zip(first[0], again, strict=True))


@pytest.mark.cpu_only(reason="OpenMP threads")
def test_recurrence_does_not_depend_on_the_number_of_threads(isa):
    """Every sum runs over k in order, whichever thread and tile it falls to."""
    module = lstm_ext.LSTM(30, 150)
    x = torch.randn(8, 5, 30)  # 40 rows: the input product is the core's own too
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        with torch.no_grad():
            results.append(module(x)[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("B", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("H", [24, 256])
def test_batch_does_not_change_a_sequence(H, B):
    module = here(lstm_ext.LSTM(16, H, dtype=torch.float64))
    x = here(torch.randn(7, B, 16, dtype=torch.float64))
    with torch.no_grad():
        whole = module(x)[0]
        alone = torch.cat([module(x[:, b : b + 1])[0] for b in range(B)], dim=1)
    torch.testing.assert_close(whole, alone, **tol(torch.float64))


def test_extreme_values(isa):
    """Saturated gates, infinities and NaN behave as torch's sigmoid and tanh do."""
    values = torch.tensor(
        [0.0, -0.0, 1e-30, 1e-8, 0.1, 1.0, 9.0, 20.0, 88.0, 88.7, 89.0, 100.0, 709.5, 1e4, 1e38]
        + [float("inf")]
    )
    values = here(torch.cat([values, -values, torch.tensor([float("nan")])]))
    for dtype in (torch.float32, torch.float64):
        x = values.to(dtype).view(1, -1, 1)
        zero = here(torch.zeros(x.size(1), 1, dtype=dtype))
        for gate in range(4):
            w_ih = here(torch.zeros(4, 1, dtype=dtype))
            bias = here(torch.tensor([0.5, 0.25, 0.75, 1.0], dtype=dtype))
            w_ih[gate] = 1
            w_hh = here(torch.zeros(4, 1, dtype=dtype))
            ours = lstm_layer(
                x[0], zero, zero + 1, LayerWeights(w_ih, w_hh, bias), Steps.padded(1, x.size(1))
            )
            plain = reference.lstm_layer(x, zero, zero + 1, w_ih, w_hh, bias)
            for mine, theirs in zip(ours[:3], (plain[0][0], *plain[1:3]), strict=True):
                # inf * 0 is NaN in both products alike
                torch.testing.assert_close(mine, theirs, equal_nan=True, **tol(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
def test_a_closed_gate_is_zero(isa, dtype):
    """And not the least number that there is: nothing of an infinite cell passes, but NaN does."""
    module = here(lstm_ext.LSTM(1, 8).to(dtype))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.bias_ih_l0[8:16] = torch.tensor([-torch.inf] * 4 + [-1e4] * 4)
        h0 = here(torch.zeros(1, 2, 8, dtype=dtype))
        c0 = torch.ones_like(h0)
        c0[:, 1] = torch.inf
        _, (_, c) = module(here(torch.zeros(1, 2, 1, dtype=dtype)), (h0, c0))
    assert c[0, 0].eq(0).all() and c[0, 1].isnan().all()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rounding_of_half_types(isa, dtype):
    """h is rounded as torch rounds: ties to even, subnormals, overflow, NaN."""
    everything = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = everything[everything.isfinite() & (everything.float().abs() < 1)]
    # One step with saturated gates converts both ways: c = c0 and h = tanh(c).
    n = finite.numel()
    c0 = here(finite.view(n, 1))
    zero, w = here((torch.zeros(n, 1, dtype=dtype), torch.zeros(4, 1, dtype=dtype)))
    bias = here(torch.tensor([-100.0, 100.0, 0.0, 100.0], dtype=dtype))
    y, _, c_n, _ = lstm_layer(
        zero,
        zero,
        c0,
        LayerWeights(w, w, bias),
        Steps.padded(1, n),
    )
    assert torch.equal(c_n, c0)
    expected = c0.float().tanh()
    half_unit = torch.finfo(dtype).eps / 2 * expected.abs() * 1.001  # tanh itself is not exact
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
    assert ((y.float() - expected).abs() <= half_unit + smallest).all()


class _Features(Dataset):
    def __init__(self):
        self.module = lstm_ext.LSTM(8, 64).requires_grad_(False)
        self.x = torch.randn(6, 20, 8, 8)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.module(self.x[index])[0]


@pytest.mark.cpu_only(reason="worker processes by fork")
def test_fork_after_use():
    """A DataLoader's worker runs the core after the parent's threads have."""
    torch.set_num_threads(2)
    data = _Features()
    expected = [data[i] for i in range(len(data))]
    loader = DataLoader(
        data, batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    for got, want in zip(loader, expected, strict=True):
        torch.testing.assert_close(got, want, **tol(torch.float32))


@pytest.mark.cpu_only(reason="CPU kernel sets")
def test_instruction_set_by_environment():
    code = "import lstm_ext.ops as o; print(o.cpu_isa())"

    def run(name):
        env = {**os.environ, "LSTM_EXT_CPU_ISA": name}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)

    assert run("portable").stdout.strip() == "portable"
    failed = run("sse9")
    assert failed.returncode != 0
    assert "LSTM_EXT_CPU_ISA: CPU kernels that run here: " in failed.stderr
    assert "got 'sse9'" in failed.stderr and "portable" in failed.stderr


@pytest.mark.cpu_only(reason="OpenMP threads")
@pytest.mark.parametrize("limit", ["OMP_THREAD_LIMIT=1", "OMP_DYNAMIC=true"])
def test_openmp_grants_fewer_threads(limit):
    """Right numbers all the same, where nn.LSTM's training on oneDNN gives wrong ones."""
    code = """
import sys; sys.path[:0] = sys.argv[1:]
import torch
from lstm_ext import ops
assert not ops._C.openmp_grants(4)
torch.set_num_threads(4)
from cases import Case, compare
import lstm_ext
case = Case(T=20, B=33, I=80, H=64, layers=2, bidirectional=True, dtype=torch.float32)
module = case.module()
ours = case.run(lstm_ext.LSTM.from_torch(module))
truth = case.run(module, torch.float64)
for name in truth:
    scale = max(1.0, truth[name].abs().max().item())
    torch.testing.assert_close(ours[name].double(), truth[name], rtol=1e-5, atol=1e-5 * scale)
"""
    name, value = limit.split("=")
    done = subprocess.run(
        [sys.executable, "-c", code, os.path.dirname(__file__)],
        env={**os.environ, name: value},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.cpu_only(reason="CPU kernel sets")
def test_unknown_instruction_set():
    before = ops.cpu_isa()
    with pytest.raises(ValueError, match="got 'mmx'"):
        ops.select_cpu_isa("mmx")
    assert ops.cpu_isa() == before


def test_dtype_without_kernel():
    module = here(lstm_ext.LSTM(3, 4).to(torch.complex64))
    with pytest.raises(TypeError, match="no kernel for torch.complex64.*torch.float32"):
        module(here(torch.zeros(2, 1, 3, dtype=torch.complex64)))


def test_cuda_tensor_on_a_cpu_build(monkeypatch):
    info = {**ops._C.build_info(), "cuda": False, "cuda_reason": "no toolkit"}

    class Core:
        build_info = staticmethod(lambda: info)

    monkeypatch.setattr(ops, "_C", Core)
    monkeypatch.setattr(ops, "_engines", {"cpu": cpu_engine})
    with pytest.raises(RuntimeError, match="LSTM_EXT_CUDA=1 pip install"):
        ops.has_native_kernels(torch.device("cuda:0"))
    assert ops.has_native_kernels(torch.device("cpu"))
    assert not ops.has_native_kernels(torch.device("mps"))


def test_jit_trace_is_refused():
    module = here(lstm_ext.LSTM(4, 8)).requires_grad_(False)
    with pytest.raises(RuntimeError, match="torch.jit.trace"):
        torch.jit.trace(module, (here(torch.randn(5, 3, 4)),), check_trace=False)


@pytest.mark.skipif(
    os.environ.get("LSTM_EXT_LARGE_TESTS") != "1",
    reason="needs 14 GB and a minute; LSTM_EXT_LARGE_TESTS=1 runs it",
)
def test_offsets_past_32_bits():
    """More than 2**31 elements of gates, read and written at their ends."""
    T, H = 2_200_000, 256  # T * 4H = 2.25e9
    module = here(lstm_ext.LSTM(1, H)).requires_grad_(False)
    x = here(torch.randn(T, 1, 1))
    y = module(x)[0]
    states = module(x[: T - 5])[1]
    torch.testing.assert_close(y[T - 5 :], module(x[T - 5 :], states)[0], **tol(torch.float32))


@pytest.mark.tf32
def test_large_case_against_torch():
    compare(Case(T=20, B=33, I=70, H=256, layers=2, dtype=torch.float32))
