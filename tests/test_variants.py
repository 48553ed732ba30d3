"""Variants of the LSTM against the reference: every dtype, layout and combination; derivatives."""

import pytest
import torch
from allpairspy import AllPairs
from cases import HALF
from device import NAME, here, leaf
from layers import lstm_layer
from test_autograd import STEPS
from test_autograd import B as BATCH
from tolerances import assert_as_good, tol
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from variants import EVERYTHING, VARIANTS

import lstm_ext
from lstm_ext.cpu import products as cpu_products
from lstm_ext.ops import LayerWeights, Masks

DTYPES = [torch.float64, torch.float32, *HALF]
RAGGED = {
    "dense": {},
    "lengths": {"lengths": torch.tensor([3, 0, 6, 1, 5])},
    "resets": {"reset_mask": torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.3},
    "both": {
        "lengths": torch.tensor([6, 2, 4, 4, 1]),
        "reset_mask": torch.rand(6, 5, generator=torch.Generator().manual_seed(2)) < 0.3,
    },
    "packed": {"lengths": torch.tensor([6, 5, 3, 3, 1])},
}
AXES = {
    "variant": list(VARIANTS),
    "dtype": DTYPES,
    "ragged": list(RAGGED),
    "training": [True, False],
    "layers": [1, 2],
    "merge": ["one", "concat", "sum", "mul", "ave"],
    "proj": [0, 6],
    "bias": [True, False],
    "batch_first": [False, True],
    "H": [1, 7, 19, 48],
    "hx": [True, False],
}


def _possible(row):
    case = dict(zip(AXES, row, strict=False))
    if case.get("proj") and case.get("H", 48) <= 6:
        return False
    if case.get("variant") == "forget_bias" and case.get("bias") is False:
        return False
    # Norms of a few elements make the roundings of half types as large as the values, in any
    # implementation.
    normed = VARIANTS.get(case.get("variant"), {}).get("layer_norm", False)
    return not (normed and case.get("dtype") in HALF and case.get("H", 48) < 19)


ROWS = AllPairs(AXES.values(), filter_func=_possible)
PAIRS = [dict(zip(AXES, row, strict=True)) for row in ROWS]


def _module(case, T_, I):
    kwargs = {} if case["merge"] == "one" else {"bidirectional": True, "merge_mode": case["merge"]}
    module = lstm_ext.LSTM(
        I, case["H"], case["layers"], proj_size=case["proj"], bias=case["bias"],
        batch_first=case["batch_first"], return_cell_sequence=True, dtype=torch.float64,
        **kwargs, **VARIANTS[case["variant"]],
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith(("gamma", "beta", "weight_ch")):
                parameter += 0.5 * torch.randn_like(parameter)
    return module.to(case["dtype"]).train(case["training"])


def _compare(recorder, case, T=6, B=5, I=4):
    """Outputs and gradients of a module, and of the reference with its masks."""
    dtype, extra = case["dtype"], RAGGED[case["ragged"]]
    module = _module(case, T, I)
    count = case["layers"] * (1 + module.bidirectional)
    x = torch.randn(T, B, I, dtype=torch.float64).to(dtype).requires_grad_()
    hx = None
    if case["hx"]:
        sizes = (case["proj"] or case["H"], case["H"])
        hx = [torch.randn(count, B, n, dtype=torch.float64).to(dtype) for n in sizes]
        hx = tuple(state.requires_grad_() for state in hx)
    flip = (lambda t: t.transpose(0, 1)) if case["batch_first"] else (lambda t: t)
    if case["ragged"] == "packed":
        packed = pack_padded_sequence(flip(x), extra["lengths"], batch_first=case["batch_first"])
        y, (h_n, c_n), cells = module(packed, hx)
        assert isinstance(y, PackedSequence) and isinstance(cells, PackedSequence)
        y, cells = (pad_packed_sequence(p, total_length=T)[0] for p in (y, cells))
    else:
        given = {k: flip(v) if k == "reset_mask" else v for k, v in extra.items()}
        y, (h_n, c_n), cells = module(flip(x), hx, **given)
        y, cells = flip(y), flip(cells)
    ours = (y, h_n, c_n, cells)
    weights = recorder.weights()
    cotangents = [torch.randn(o.shape, dtype=torch.float64) for o in ours]

    def grads(outputs, inputs):
        loss = sum((o.double() * g).sum() for o, g in zip(outputs, cotangents, strict=True))
        return [*outputs, *torch.autograd.grad(loss, inputs, materialize_grads=True)]

    ours = grads(ours, [x, *(hx or ()), *weights])

    def plain(to):
        leaves = [t.detach().to(to).requires_grad_() for t in (x, *(hx or ()), *weights)]
        states = tuple(leaves[1:3]) if hx else None
        rest = leaves[3 if hx else 1 :]
        return grads(recorder.reference(module, leaves[0], states, rest, to, **extra), leaves)

    truth = plain(torch.float64)
    if dtype in HALF or module.layer_norm and dtype == torch.float32:
        # A norm multiplies what it gets by up to 316, 1 / sqrt(1e-5), where that is near zero, as
        # the product with a state that was reset: float32 too is judged by float32 then.
        eps = None if dtype in HALF else tol(dtype)["rtol"]
        # Half types round that gradient, too, before the next product. Eight seeds of a float16
        # case on the CUDA kernels: our error 0.6 of the peer's in the median, and 3.2 once.
        factor = 4 if dtype in HALF and module.layer_norm else 2
        for k, (mine, peer, exact) in enumerate(zip(ours, plain(dtype), truth, strict=True)):
            assert_as_good(mine, peer, exact, str(k), eps, factor)
        return
    for mine, exact in zip(ours, truth, strict=True):
        scale = max(1.0, exact.abs().max().item()) if exact.numel() else 1.0
        limits = tol(dtype)
        torch.testing.assert_close(
            mine.double(), exact, rtol=limits["rtol"], atol=limits["atol"] * scale
        )


@pytest.mark.parametrize("case", PAIRS, ids=lambda c: "-".join(str(v) for v in c.values()))
def test_pairwise(recorder, case):
    _compare(recorder, case)


PLAIN = {"ragged": "dense", "training": True, "layers": 1, "merge": "one", "proj": 0, "bias": True,
         "batch_first": False, "hx": True}  # fmt: skip
# T, B, H: each takes another way through the kernels.
SHAPES = [(1, 1, 1), (1, 9, 33), (2, 50, 20), (3, 2, 256), (4, 3, 130), (3, 13, 100)]


@pytest.mark.cpu_only(reason="the CPU engine's own")
@pytest.mark.parametrize("variant", ["cell_and_state", "everything"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_instruction_set(poisoned, isa, recorder, dtype, shape, variant):
    T, B, H = shape
    case = {**PLAIN, "variant": variant, "dtype": dtype, "H": H}
    _compare(recorder, case, T, B, 40)


@pytest.mark.cpu_only(reason="the CPU engine's own")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("proj", [0, 6])
@pytest.mark.parametrize("variant", VARIANTS)
def test_workspace_bounds(monkeypatch, recorder, variant, proj, threads):
    """Nothing is written past the bytes of workspace that the core asked for."""
    guards = []

    def workspace(size):
        whole = torch.full((size + 65536,), 0x5A, dtype=torch.uint8)
        guards.append(whole[size:])
        return whole[:size]

    monkeypatch.setattr(cpu_products, "workspace", workspace)
    torch.set_num_threads(threads)
    for H in (19, 150):
        recorder.directions.clear()
        case = {**PLAIN, "variant": variant, "proj": proj, "H": H, "dtype": torch.float64}
        _compare(recorder, case, 3, 13)
    assert len(guards) >= 4 and all((guard == 0x5A).all() for guard in guards)


@pytest.mark.cpu_only(reason="the CPU engine's own")
@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("proj", [0, 6])
@pytest.mark.parametrize("variant", ["cell_and_state", "everything"])
def test_threads(recorder, variant, proj, threads):
    torch.set_num_threads(threads)
    for ragged in ("dense", "both"):
        recorder.directions.clear()
        case = {**PLAIN, "ragged": ragged, "variant": variant, "proj": proj, "H": 150}
        _compare(recorder, {**case, "dtype": torch.float32})


@pytest.mark.cpu_only(reason="the CPU engine's own")
@pytest.mark.parametrize("variant", ["cell_and_state", "everything"])
def test_bits_do_not_depend_on_the_number_of_threads(variant):
    module = lstm_ext.LSTM(8, 150, **VARIANTS[variant])
    x, results = torch.randn(6, 20, 8), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        with torch.no_grad():
            # The norm of W_ih x is torch's, which shares its rows among the threads.
            results.append(module(x)[0])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# --- derivatives ------------------------------------------------------------------------------

I, H, P = 2, 3, 2
F64 = {"dtype": torch.float64}


def _masks(steps, p, training):
    torch.manual_seed(5)
    h_dropout = torch.nn.functional.dropout(torch.ones(BATCH, p, **F64), 0.4)
    if not training:
        return Masks(None, 0.3, 0.2)
    keep = (torch.rand(steps.rows, size) < 0.3 for size in (p, H))
    return Masks(here(h_dropout), *map(here, keep))


GRAD_AXES = {
    "name": list(STEPS),
    "proj": [False, True],
    "reverse": [False, True],
    "peephole": [False, True],
    "layer_norm": [False, True],
    "masks": ["none", "train", "eval"],
}
GRAD_PAIRS = [dict(zip(GRAD_AXES, row, strict=True)) for row in AllPairs(GRAD_AXES.values())]


def _function_and_inputs(case):
    steps, p = STEPS[case["name"]](), P if case["proj"] else H
    sizes = [(steps.rows, I), (BATCH, p), (BATCH, H), (4 * H, I), (4 * H, p), (4 * H,), (4 * H,)]
    sizes += [(P, H)] * case["proj"] + [(3 * H,)] * case["peephole"]
    sizes += [(4 * H,), (4 * H,), (H,), (H,)] * case["layer_norm"]
    masks = None if case["masks"] == "none" else _masks(steps, p, case["masks"] == "train")

    def run(x, h0, c0, *tensors):
        tensors = list(tensors)
        four = [tensors.pop(0) for _ in range(4)]
        w_hr = tensors.pop(0) if case["proj"] else None
        w_ch = tensors.pop(0) if case["peephole"] else None
        gammas = tensors or [None] * 4
        weights = LayerWeights(*four, w_hr, w_ch, *gammas, masks)
        return lstm_layer(x, h0, c0, weights, steps, reverse=case["reverse"], cells=True)

    return run, [leaf(torch.randn(size, **F64)) for size in sizes]


# Each entry of a Jacobian on the CPU; on other devices, where a call takes longer, random
# combinations of them.
GRADCHECK = {"fast_mode": NAME != "cpu"}


@pytest.mark.parametrize("case", GRAD_PAIRS, ids=lambda c: "-".join(str(v) for v in c.values()))
def test_gradcheck(case):
    assert torch.autograd.gradcheck(*_function_and_inputs(case), **GRADCHECK)


@pytest.mark.parametrize("case", GRAD_PAIRS, ids=lambda c: "-".join(str(v) for v in c.values()))
def test_gradgradcheck(case):
    assert torch.autograd.gradgradcheck(*_function_and_inputs(case), fast_mode=True)


@pytest.mark.parametrize("merge", ["sum", "mul", "ave", None])
def test_gradcheck_of_a_module(merge):
    module = lstm_ext.LSTM(2, 3, bidirectional=True, merge_mode=merge, **EVERYTHING, **F64)
    x = torch.randn(3, 2, 2, **F64).requires_grad_()

    def run(x, *parameters):
        torch.manual_seed(3)
        replaced = dict(zip(dict(module.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(module, replaced, (x,))[0]

    inputs = [x, *(p.detach().clone().requires_grad_() for p in module.parameters())]
    assert torch.autograd.gradcheck(run, inputs, **GRADCHECK)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_second_derivative_in_half_types(dtype):
    """Of the right dtype and size; the numbers are those of the reference, in its precision."""
    module = lstm_ext.LSTM(3, 5, **EVERYTHING, dtype=dtype)
    x = torch.randn(4, 2, 3, dtype=dtype, requires_grad=True)
    torch.manual_seed(2)
    (first,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
    second = torch.autograd.grad(first.pow(2).sum(), list(module.parameters()), allow_unused=True)
    for parameter, grad in zip(module.parameters(), second, strict=True):
        assert grad is None or grad.dtype == dtype and grad.shape == parameter.shape


def test_nan_in_the_padding_reaches_nothing():
    module = lstm_ext.LSTM(3, 5, 2, bidirectional=True, **EVERYTHING, **F64)
    lengths, x = torch.tensor([2, 4, 0]), torch.randn(4, 3, 3, **F64)
    holes = x.clone()
    for b, length in enumerate(lengths.tolist()):
        holes[length:, b] = float("nan")
    results = []
    for data in (x, holes):
        torch.manual_seed(1)
        data = data.requires_grad_()
        y, hn = module(data, lengths=lengths)
        grads = torch.autograd.grad(y.pow(2).sum(), [data, *module.parameters()])
        results.append([y, *hn, *grads])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
