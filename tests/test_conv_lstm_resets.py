"""ConvLSTM where episodes end inside a sequence: reset_mask, beside a loop and beside the parts."""

import importlib

import device
import pytest
import torch
from device import here, leaf
from test_conv_lstm import F64, IN, SEQUENCES, SIZES, C, L, N, _loop
from test_conv_lstm_compile import FORWARD, _bits, _both, _calls, _lengths
from tolerances import assert_as_good, tol
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export
from torch.utils._pytree import tree_leaves

import lstm_ext

#: The first and the last step, twice in a row, every step, and past the length below.
MASK = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 0, 1], [1, 1, 1]], dtype=torch.bool)
LENGTHS = torch.tensor([2, 4, 3])
PLACES = ["cpu"] if device.DEVICE.type == "cpu" else ["cpu", device.DEVICE]


@pytest.fixture(autouse=True)
def _no_earlier_graphs():
    torch._dynamo.reset()


def _close(got, expected):
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, **tol(b.dtype))


def _states(count, *size):
    return tuple(here(torch.randn(count, N, C, *size, **F64)).requires_grad_() for _ in "hc")


def _grads(results, inputs):
    torch.manual_seed(1)
    loss = sum((t * torch.randn(t.shape, **F64)).sum() for t in tree_leaves(results))
    return torch.autograd.grad(loss, inputs)


# --- values and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "lengths"])
@pytest.mark.parametrize("dims", SEQUENCES)
@pytest.mark.parametrize("place", PLACES)
def test_matches_a_loop_over_convolutions(place, dims, lengths, batch_first):
    options = {"num_layers": 2, "peephole": True, "batch_first": batch_first}
    module = here(SEQUENCES[dims](IN, C, 3, **options, **F64))
    x, hx = leaf(torch.randn(L, N, IN, *SIZES[dims], **F64)), _states(2, *SIZES[dims])
    given = {"lengths": lengths, "reset_mask": (MASK.T if batch_first else MASK).to(place)}
    y, states = module(x.transpose(0, 1) if batch_first else x, hx, **given)
    results = y.transpose(0, 1) if batch_first else y, states
    ends = None if lengths is None else here(lengths)
    expected = _loop(module, x, hx, ends, reset_mask=here(MASK))
    _close(results, expected)
    inputs = [x, *hx, *module.parameters()]
    _close(_grads(results, inputs), _grads(expected, inputs))
    with torch.no_grad():
        _close(module(x.transpose(0, 1) if batch_first else x, hx, **given), (y, states))


def test_an_episode_is_a_sequence_of_its_own():
    module = here(SEQUENCES[2](IN, C, 3, 2, **F64))
    x, hx = leaf(torch.randn(L, N, IN, *SIZES[2], **F64)), _states(2, *SIZES[2])
    mask = torch.zeros(L, N, dtype=torch.bool)
    mask[2] = True
    y, states = module(x, hx, reset_mask=mask)
    _close(y[:2], module(x[:2], hx)[0])
    _close((y[2:], states), module(x[2:]))
    # Nothing of what comes after goes back across the reset.
    for gradient in torch.autograd.grad(y[2:].sum(), [x, *hx], materialize_grads=True):
        assert not (gradient[:2] if gradient.shape == x.shape else gradient).any()


def test_a_state_that_is_reset_may_hold_anything():
    """As that of an episode that went to infinity."""
    module = here(SEQUENCES[2](IN, C, 3, peephole=True, **F64))
    x, mask = leaf(torch.randn(L, N, IN, *SIZES[2], **F64)), torch.zeros(L, N, dtype=torch.bool)
    mask[0] = True
    hx = tuple(here(torch.full((1, N, C, *SIZES[2]), torch.nan, **F64)) for _ in "hc")
    inputs = [x, *module.parameters()]
    found, expected = module(x, hx, reset_mask=mask), module(x)
    _close(found, expected)
    _close(_grads(found, inputs), _grads(expected, inputs))


def test_a_step_that_is_not_taken_resets_nothing():
    module = here(SEQUENCES[2](IN, C, 3, **F64))
    x, hx = here(torch.randn(L, N, IN, *SIZES[2], **F64)), _states(1, *SIZES[2])
    lengths, mask = torch.tensor([0, 2, 3]), torch.arange(L).unsqueeze(1) >= torch.tensor([0, 2, 3])
    found = module(x, hx, lengths=lengths, reset_mask=mask)
    _bits(found, module(x, hx, lengths=lengths))
    _close([s[:, 0] for s in found[1]], [s[:, 0] for s in hx])


@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched(batch_first):
    module = here(SEQUENCES[2](IN, C, 3, 2, batch_first=batch_first, **F64))
    x, mask = here(torch.randn(L, IN, *SIZES[2], **F64)), MASK[:, 0]
    y, states = module(x, lengths=[3], reset_mask=mask)
    time = 1 if batch_first else 0
    many = {"lengths": [3], "reset_mask": mask.unsqueeze(1 - time)}
    expected, batched = module(x.unsqueeze(1 - time), **many)
    _close((y, states), (expected.squeeze(1 - time), [s.squeeze(1) for s in batched]))


@pytest.mark.parametrize("lengths", [None, torch.tensor([1, 3])], ids=["whole", "lengths"])
def test_gradcheck_and_gradgradcheck(lengths):
    module = here(SEQUENCES[1](2, 2, 3, 2, peephole=True, **F64))
    names, mask = [name for name, _ in module.named_parameters()], MASK[:3, :2]

    def run(x, h, c, *parameters):
        replaced = dict(zip(names, parameters, strict=True))
        given = {"lengths": lengths, "reset_mask": mask}
        y, states = torch.func.functional_call(module, replaced, (x, (h, c)), given)
        return y, *states

    inputs = [leaf(torch.randn(3, 2, 2, 4, **F64))]
    inputs += [leaf(torch.randn(2, 2, 2, 4, **F64)) for _ in range(2)]
    inputs += [leaf(p) for p in module.parameters()]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(isa, dtype):
    truth = SEQUENCES[2](IN, 16, 3, 2)
    module = SEQUENCES[2](IN, 16, 3, 2, dtype=dtype)
    module.load_state_dict(truth.state_dict())
    truth.double().load_state_dict(module.state_dict())
    module, truth = here(module), here(truth)
    x, mask = leaf(torch.randn(L, N, IN, 9, 6, dtype=dtype)), here(MASK)
    found, expected = module(x, reset_mask=mask), truth(x.double(), reset_mask=mask)
    peer = _loop(module, x, reset_mask=mask)
    results = [
        [*tree_leaves(r), torch.autograd.grad(r[0].double().sum(), x)[0].double()]
        for r in (found, peer, expected)
    ]
    for got, theirs, want in zip(*results, strict=True):
        assert_as_good(got, theirs, want)


# --- transforms and graphs ------------------------------------------------------------------------


def test_transforms():
    module = here(SEQUENCES[1](IN, C, 3, 2, **F64))
    x, v = (here(torch.randn(3, L, N, IN, 6, **F64)) for _ in range(2))
    lengths, masks = here(torch.stack([LENGTHS, LENGTHS - 1, LENGTHS])), here(torch.rand(3, L, N))
    masks = masks < 0.4

    def run(x, lengths, mask):
        y, states = module(x, lengths=lengths, reset_mask=mask)
        return y, *states

    def slope(x, lengths, mask):
        return torch.func.grad(lambda x: sum(t.sum() for t in run(x, lengths, mask)))(x)

    for function in (run, slope):
        found = torch.func.vmap(function)(x, lengths, masks)
        each = [tree_leaves(function(x[k], lengths[k], masks[k])) for k in range(3)]
        _close(found, [torch.stack(parts) for parts in zip(*each, strict=True)])
    _, tangent = torch.func.jvp(lambda x: run(x, lengths[0], masks[0])[0], (x[0],), (v[0],))
    step, at = 1e-6, (lengths[0], masks[0])
    numeric = (run(x[0] + step * v[0], *at)[0] - run(x[0] - step * v[0], *at)[0]) / (2 * step)
    torch.testing.assert_close(tangent, numeric, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("lengths", [False, True], ids=["whole", "lengths"])
def test_one_graph_for_any_steps(lengths):
    module = here(SEQUENCES[2](IN, C, 3, 2, peephole=True))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    for T, n, part in ((8, 9, 0.3), (5, 3, 0.0), (12, 2, 1.0)):
        x, mask = leaf(torch.randn(T, n, IN, 6, 5)), here(torch.rand(T, n)) < part
        given = {"reset_mask": mask} | ({"lengths": _lengths(T, n)} if lengths else {})
        _bits(_both(compiled, x, **given), _both(module, x, **given))
    assert counter.frame_count == 1


def test_export_with_any_steps_and_batch():
    module, x = here(SEQUENCES[2](IN, C, 3, 2)), here(torch.randn(L, N, IN, 6, 5))
    T, n = Dim("T", min=1, max=100), Dim("n", min=1, max=50)
    sizes = {"input": {0: T, 1: n}, "reset_mask": {0: T, 1: n}}
    program = export(module, (x,), {"reset_mask": here(MASK)}, dynamic_shapes=sizes)
    assert _calls(program.graph_module) == [FORWARD] * 2
    run = program.module()
    for T, n in ((L, N), (9, 2), (1, 1)):
        x, mask = here(torch.randn(T, n, IN, 6, 5)), here(torch.rand(T, n)) < 0.4
        _bits(run(x, reset_mask=mask), module(x, reset_mask=mask))


@pytest.mark.cpu_only(reason="a graph holds no device")
def test_onnx(tmp_path):
    """Plain nodes for a fixed number of steps; the mask and the lengths are inputs."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    onnx = importlib.import_module("lstm_ext.onnx")
    module, x = lstm_ext.ConvLSTM2d(IN, C, 3, 2, peephole=True), torch.randn(L, N, IN, 6, 5)
    given = {"lengths": LENGTHS, "reset_mask": MASK}
    onnx.export(module.eval(), (x,), tmp_path / "m.onnx", kwargs=given, verbose=False)
    session = runtime.InferenceSession(tmp_path / "m.onnx")
    for lengths, mask in ((LENGTHS, MASK), (LENGTHS - 1, MASK.roll(1, 0))):
        values = x, lengths, mask
        named = zip(session.get_inputs(), values, strict=True)
        made = session.run(None, {i.name: v.numpy() for i, v in named})
        expected = module(x, lengths=lengths, reset_mask=mask)
        _close([torch.from_numpy(t) for t in made], expected)


# --- what is given --------------------------------------------------------------------------------


def test_a_mask_that_resets_nothing_costs_nothing(monkeypatch):
    module, x = here(SEQUENCES[1](IN, C, 3)), here(torch.randn(L, N, IN, 6))
    expected = module(x)
    monkeypatch.setattr(torch.Tensor, "masked_fill", None)
    _bits(module(x, reset_mask=torch.zeros(L, N, dtype=torch.bool)), expected)


@pytest.mark.parametrize(
    "mask, error, words",
    [
        (MASK.T, ValueError, r"Expected reset_mask of size \(4, 3\), got \(3, 4\)"),
        (MASK[:, 0], ValueError, r"Expected reset_mask of size \(4, 3\), got \(4,\)"),
        (MASK.long(), TypeError, "reset_mask should have dtype torch.bool, got torch.int64"),
        (MASK.tolist(), TypeError, "reset_mask should be a bool tensor, got list"),
    ],
)
def test_masks_that_are_refused(mask, error, words):
    module, x = here(SEQUENCES[1](IN, C, 3)), here(torch.randn(L, N, IN, 6))
    with pytest.raises(error, match=words):
        module(x, reset_mask=mask)


def test_masks_of_another_layout_are_refused():
    module, x = here(SEQUENCES[1](IN, C, 3, batch_first=True)), here(torch.randn(N, L, IN, 6))
    with pytest.raises(ValueError, match=r"Expected reset_mask of size \(3, 4\), got \(4, 3\)"):
        module(x, reset_mask=MASK)
    with pytest.raises(ValueError, match=r"Expected reset_mask of size \(4,\), got \(1, 4\)"):
        module(x[0], reset_mask=MASK.T[:1])
