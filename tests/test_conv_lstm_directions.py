"""ConvLSTM in two directions: values, gradients, graphs, parameters."""

import copy
import importlib
import pickle

import pytest
import torch
from device import here, leaf
from test_conv_lstm import F64, IN, MERGES, SEQUENCES, SIZES, C, L, N, _loop
from test_conv_lstm_compile import FORWARD, _bits, _both, _calls, _lengths
from test_conv_lstm_resets import LENGTHS, MASK, _close, _grads, _states
from tolerances import assert_as_good
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export
from torch.utils._pytree import tree_leaves

import lstm_ext

TWO = {"bidirectional": True}


@pytest.fixture(autouse=True)
def _no_earlier_graphs():
    torch._dynamo.reset()


def _layers(mode):
    return 1 if mode is None else 2


# --- values and gradients -------------------------------------------------------------------------

GIVEN = {
    "whole": {},
    "lengths": {"lengths": LENGTHS},
    "resets": {"reset_mask": MASK},
    "both": {"lengths": LENGTHS, "reset_mask": MASK},
}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("dims", SEQUENCES)
def test_matches_a_loop_over_convolutions(dims, given, batch_first):
    given = here(GIVEN[given])
    options = {"peephole": True, "stride": 2, "padding": 1, "batch_first": batch_first}
    module = here(SEQUENCES[dims](IN, C, 3, 2, **options, **TWO, **F64))
    x = torch.randn(L, N, IN, *SIZES[dims], **F64)
    if "lengths" in given:
        for n, length in enumerate(LENGTHS):
            x[length:, n] = torch.nan  # the reverse direction starts before
    x, hx = leaf(x), _states(4, *(-(-n // 2) for n in SIZES[dims]))
    swapped = given.copy()
    if batch_first and "reset_mask" in given:
        swapped["reset_mask"] = MASK.T

    def run():
        y, states = module(x.transpose(0, 1) if batch_first else x, hx, **swapped)
        return y.transpose(0, 1) if batch_first else y, states

    found, expected = run(), _loop(module, x.nan_to_num(), hx, **given)
    assert found[0].shape[2] == 2 * C and found[1][0].shape == hx[0].shape
    _close(found, expected)
    inputs = [x, *hx, *module.parameters()]
    _close(_grads(found, inputs), _grads(expected, inputs))
    with torch.no_grad():
        _close(run(), found)


@pytest.mark.parametrize("mode", MERGES, ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_merge_modes(batch_first, mode):
    options = {"merge_mode": mode, "batch_first": batch_first, **TWO}
    module = here(SEQUENCES[2](IN, C, 3, _layers(mode), **options, **F64))
    x = leaf(torch.randn(L, N, IN, *SIZES[2], **F64))
    y, states = module(x.transpose(0, 1) if batch_first else x)
    time_first = [t.transpose(0, 1) if batch_first else t for t in tree_leaves(y)]
    expected = _loop(module, x)
    assert isinstance(y, tuple) == (mode is None)
    _close((time_first, states), expected)
    inputs = [x, *module.parameters()]
    _close(_grads((time_first, states), inputs), _grads(expected, inputs))
    for t in tree_leaves(y):
        assert t.movedim(2, -1).is_contiguous()


def test_one_pixel_is_a_bidirectional_lstm():
    ours, peer = SEQUENCES[1](7, 6, 1, 2, **TWO, **F64), nn.LSTM(7, 6, 2, **TWO, **F64)
    assert list(ours.state_dict()) == list(peer.state_dict())
    state = {k: v.unsqueeze(2) if v.dim() == 2 else v for k, v in peer.state_dict().items()}
    ours.load_state_dict(state)
    ours, peer = here(ours), here(peer)
    x, hx = here(torch.randn(5, 3, 7, **F64)), here(torch.randn(2, 4, 3, 6, **F64))
    found = ours(x.unsqueeze(3), tuple(hx.unsqueeze(4)))
    _close([t.squeeze(3) for t in tree_leaves(found)], tree_leaves(peer(x, tuple(hx))))


@pytest.mark.parametrize("mode", MERGES, ids=str)
def test_unbatched(mode):
    module = here(SEQUENCES[1](IN, C, 3, merge_mode=mode, batch_first=True, **TWO, **F64))
    x, hx = here(torch.randn(L, IN, 6, **F64)), here(torch.randn(2, 2, C, 6, **F64))
    given = {"lengths": [3], "reset_mask": MASK[:, 0]}
    y, states = module(x, tuple(hx), **given)
    given["reset_mask"] = MASK.T[:1]
    expected, batched = module(x.unsqueeze(0), tuple(hx.unsqueeze(2)), **given)
    expected = [t.squeeze(0) for t in tree_leaves(expected)], [s.squeeze(1) for s in batched]
    _close((tree_leaves(y), states), expected)


def test_no_steps_and_no_sequences():
    module = here(SEQUENCES[1](IN, C, 3, 2, **TWO, **F64))
    hx = _states(4, 6)
    x = leaf(torch.randn(0, N, IN, 6, **F64))
    y, states = module(x, hx)
    assert y.shape == (0, N, 2 * C, 6)
    _bits(states, hx)
    y, (h, c) = module(x[:, :0].new_zeros(L, 0, IN, 6))
    assert y.shape == (L, 0, 2 * C, 6) and h.shape == c.shape == (4, 0, C, 6)


@pytest.mark.parametrize("mode", ["concat", "mul"])
def test_gradcheck_and_gradgradcheck(mode):
    module = here(SEQUENCES[1](1, 2, 3, 2, peephole=True, merge_mode=mode, **TWO, **F64))
    names = [name for name, _ in module.named_parameters()]
    given = {"lengths": torch.tensor([1, 3]), "reset_mask": MASK[:3, :2]}

    def run(x, h, c, *parameters):
        replaced = dict(zip(names, parameters, strict=True))
        y, states = torch.func.functional_call(module, replaced, (x, (h, c)), given)
        return y, *states

    inputs = [leaf(torch.randn(3, 2, 1, 3, **F64))]
    inputs += [leaf(torch.randn(4, 2, 2, 3, **F64)) for _ in range(2)]
    inputs += [leaf(p) for p in module.parameters()]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    truth = SEQUENCES[2](IN, 16, 3, 2, **TWO)
    module = SEQUENCES[2](IN, 16, 3, 2, **TWO, dtype=dtype)
    module.load_state_dict(truth.state_dict())
    truth.double().load_state_dict(module.state_dict())
    module, truth = here(module), here(truth)
    x, given = leaf(torch.randn(L, N, IN, 9, 6, dtype=dtype)), here(GIVEN["both"])
    runs = module(x, **given), _loop(module, x, **given), truth(x.double(), **given)
    results = [
        [*tree_leaves(r), torch.autograd.grad(r[0].double().sum(), x)[0].double()] for r in runs
    ]
    # In float32 the core adds a pixel's 171 products up one after another, oneDNN in parts.
    factor = 4 if dtype == torch.float32 else 2
    for got, theirs, want in zip(*results, strict=True):
        assert_as_good(got, theirs, want, factor=factor)


@pytest.mark.cpu_only(reason="CPU autocast")
def test_autocast():
    module = SEQUENCES[2](IN, C, 3, 2, merge_mode="sum", **TWO)
    half = copy.deepcopy(module).bfloat16()
    x = torch.randn(L, N, IN, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(x)
    _bits(found, half(x.bfloat16()))


# --- transforms and graphs ------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["eager", "compile"])
def test_transforms(way):
    module = here(SEQUENCES[1](IN, C, 3, 2, **TWO, **F64)).requires_grad_(False)
    x, v = (here(torch.randn(3, L, N, IN, 6, **F64)) for _ in range(2))
    given = here(GIVEN["both"])

    def run(x):
        y, states = module(x, **given)
        return y, *states

    def slope(x):
        return torch.func.grad(lambda x: sum(t.square().sum() for t in run(x)))(x)

    def made(function):
        if way == "eager":
            return function
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    for function in (run, slope):
        found = made(torch.func.vmap(function))(x)
        each = [tree_leaves(function(one)) for one in x]
        _close(found, [torch.stack(parts) for parts in zip(*each, strict=True)])
    _, tangent = made(lambda x, v: torch.func.jvp(lambda x: run(x)[0], (x,), (v,)))(x[0], v[0])
    step = 1e-6
    numeric = (run(x[0] + step * v[0])[0] - run(x[0] - step * v[0])[0]) / (2 * step)
    torch.testing.assert_close(tangent, numeric, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", ["concat", "ave", None], ids=str)
def test_one_graph_for_any_steps(mode):
    module = here(SEQUENCES[2](IN, C, 3, _layers(mode), peephole=True, merge_mode=mode, **TWO))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    for T, n in ((8, 9), (5, 3), (12, 2)):
        x, mask = leaf(torch.randn(T, n, IN, 6, 5)), here(torch.rand(T, n)) < 0.3
        given = {"reset_mask": mask, "lengths": _lengths(T, n)}
        _bits(_both(compiled, x, **given), _both(module, x, **given))
    assert counter.frame_count == 1


@pytest.mark.cpu_only(reason="compiles for the CPU")
def test_by_the_default_compiler():
    module = SEQUENCES[2](IN, C, 3, 2, **TWO)
    compiled = torch.compile(module, fullgraph=True)
    for T, n in ((4, 3), (7, 2)):
        x = leaf(torch.randn(T, n, IN, 6, 5))
        _bits(_both(compiled, x), _both(module, x))


def test_export_with_any_steps_and_batch():
    module, x = here(SEQUENCES[2](IN, C, 3, 2, **TWO)), here(torch.randn(L, N, IN, 6, 5))
    T, n = Dim("T", min=1, max=100), Dim("n", min=1, max=50)
    sizes = {"input": {0: T, 1: n}, "lengths": {0: n}}
    program = export(module, (x,), {"lengths": _lengths(L, N)}, dynamic_shapes=sizes)
    assert _calls(program.graph_module) == [FORWARD] * 4
    run = program.module()
    for T, n in ((L, N), (9, 2), (1, 1)):
        x, lengths = here(torch.randn(T, n, IN, 6, 5)), _lengths(T, n)
        _bits(run(x, lengths=lengths), module(x, lengths=lengths))


@pytest.mark.cpu_only(reason="a graph holds no device")
@pytest.mark.parametrize("mode", ["concat", None], ids=str)
def test_onnx(mode, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    onnx = importlib.import_module("lstm_ext.onnx")
    module = lstm_ext.ConvLSTM2d(IN, C, 3, _layers(mode), merge_mode=mode, **TWO).eval()
    x, given = torch.randn(L, N, IN, 6, 5), {"lengths": LENGTHS}
    onnx.export(module, (x,), tmp_path / "m.onnx", kwargs=given, verbose=False)
    session = runtime.InferenceSession(tmp_path / "m.onnx")
    named = zip(session.get_inputs(), (x, LENGTHS), strict=True)
    made = session.run(None, {i.name: v.numpy() for i, v in named})
    _close([torch.from_numpy(t) for t in made], tree_leaves(module(x, **given)))


# --- what a module is -----------------------------------------------------------------------------


def test_parameters_and_repr():
    module = lstm_ext.ConvLSTM2d(2, 3, 5, 2, peephole=True, **TWO)
    sizes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    kinds = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_ch"]
    ends = ("_l0", "_l0_reverse", "_l1", "_l1_reverse")
    assert list(sizes) == [kind + end for end in ends for kind in kinds]
    for end in ends:
        assert sizes[f"weight_ih{end}"] == (12, 2 if "0" in end else 6, 5, 5)
        assert sizes[f"weight_ch{end}"] == (9,)
    assert repr(module) == (
        "ConvLSTM2d(2, 3, kernel_size=(5, 5), num_layers=2, peephole=True, bidirectional=True)"
    )
    merging = lstm_ext.ConvLSTM2d(2, 3, 5, 2, merge_mode="ave", **TWO)
    assert merging.weight_ih_l1_reverse.shape == (12, 3, 5, 5)
    assert repr(merging).endswith("num_layers=2, bidirectional=True, merge_mode='ave')")


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"bidirectional": 1}, TypeError, "bidirectional should be of type bool, got: int"),
        ({"merge_mode": "sum"}, ValueError, "needs two directions, got bidirectional=False"),
        ({"merge_mode": "max", **TWO}, ValueError, "merge_mode should be one of .* got 'max'"),
        ({"merge_mode": None, "num_layers": 2, **TWO}, ValueError, "num_layers=1, got 2"),
    ],
)
def test_arguments_that_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        lstm_ext.ConvLSTM2d(IN, C, 3, **options)


def test_states_of_one_direction_and_changed_attributes_are_refused():
    module, x = here(SEQUENCES[1](IN, C, 3, **TWO)), here(torch.randn(L, N, IN, 6))
    state = here(torch.zeros(1, N, C, 6))
    with pytest.raises(RuntimeError, match=r"hidden\[0\] size \(2, 3, 5, 6\), got \[1, 3, 5, 6\]"):
        module(x, (state, state))
    with pytest.raises(RuntimeError, match=r"Expected weight_hh_l0_reverse of size .*, got \(1,\)"):
        torch.func.functional_call(module, {"weight_hh_l0_reverse": x.new_zeros(1)}, x)
    for name, value in (("bidirectional", False), ("merge_mode", "sum")):
        changed = copy.deepcopy(module)
        setattr(changed, name, value)
        with pytest.raises(RuntimeError, match=f"got {name}={value!r}, expected {name}="):
            changed(x)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles(again):
    module, x = (
        here(SEQUENCES[1](IN, C, 3, merge_mode="mul", **TWO)),
        here(torch.randn(L, N, IN, 6)),
    )
    _bits(again(module)(x), module(x))


@pytest.mark.parametrize("make", [lstm_ext.ConvLSTM1d, lstm_ext.ConvLSTM1dCell])
def test_a_pickle_from_before_there_was_a_second_direction(make):
    module = here(make(IN, C, 3))
    x = here(torch.randn(2, N, IN, 6))[0 if "Cell" in make.__name__ else slice(None)]
    state = module.__getstate__()
    made = state["_made_as"]._asdict()
    for name in ("bidirectional", "merge_mode"):
        del state[name], made[name]
    old = make.__new__(make)
    old.__setstate__({**state, "_made_as": tuple(made.values())})
    _bits(old(x), module(x))
    assert repr(old) == repr(module)
    old.stride = (2,)
    with pytest.raises(RuntimeError, match="cannot be changed afterwards"):
        old(x)
