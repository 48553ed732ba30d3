"""torch.compile without a graph break: the eager numbers, any T and B, and errors for the rest."""

import device
import pytest
import torch
from device import here
from tolerances import across_ways, tol
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves
from variants import EVERYTHING, VARIANTS

import lstm_ext
from lstm_ext import plain

T, B, I, H = 5, 4, 3, 8
BITS = {"rtol": 0, "atol": 0}
MODULES = {
    "plain": {},
    "layers": {"num_layers": 2, "bidirectional": True, "dropout": 0.3},
    "batch_first": {"batch_first": True, "proj_size": 4, "bias": False},
    "cells": {"return_cell_sequence": True, "num_layers": 2},
    "cells_of_two": {"return_cell_sequence": True, "bidirectional": True},
    "merged": {"bidirectional": True, "merge_mode": "mul", "num_layers": 2},
    "pair": {"bidirectional": True, "merge_mode": None},
    "half": {"dtype": torch.bfloat16, "bidirectional": True},
    "parts": {"checkpoint_every": 2, "bidirectional": True, "return_cell_sequence": True},
    "parts_of_everything": {"checkpoint_every": 3, **EVERYTHING, "batch_first": True},
    "everything": EVERYTHING,
    **{name: VARIANTS[name] for name in ("peephole", "layer_norm", "zoneout", "weight_dropout")},
}
LENGTHS = torch.tensor([5, 0, 2, 3])


@pytest.fixture(autouse=True)
def _afresh():
    torch._dynamo.reset()


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def run(function, x, parameters, *args, **kwargs):
    """All that the function returns, and the gradients of x and of the parameters."""
    torch.manual_seed(3)
    x = x.detach().requires_grad_(torch.is_grad_enabled())
    outputs = [t for t in tree_leaves(function(x, *args, **kwargs)) if torch.is_tensor(t)]
    if not torch.is_grad_enabled():
        return outputs
    wanted = [x, *parameters]
    loss = sum((t.float() * (k + 1)).pow(2).sum() for k, t in enumerate(outputs))
    return outputs + list(torch.autograd.grad(loss, wanted, allow_unused=True))


def check(module, x, *args, backend="aot_eager", tolerance=None, **kwargs):
    """Training and evaluation, compiled and not."""
    tolerance = tolerance or across_ways(x.dtype)
    parameters = list(module.parameters())
    made = compiled(module, backend)
    for training in (True, False):
        module.train(training)
        with torch.set_grad_enabled(training):
            expected = run(module, x, parameters, *args, **kwargs)
            assert_close(run(made, x, parameters, *args, **kwargs), expected, **tolerance)


def inputs(dtype=torch.float32):
    return here(torch.randn(T, B, I, dtype=dtype))


@pytest.mark.parametrize("name", MODULES)
def test_the_same_bits(name):
    kwargs = MODULES[name]
    check(here(lstm_ext.LSTM(I, H, **kwargs)), inputs(kwargs.get("dtype", torch.float32)))


@pytest.mark.parametrize("place", device.PLACES)
def test_lengths_resets_and_states(place):
    module = here(lstm_ext.LSTM(I, H, 2, bidirectional=True))
    lengths, resets = LENGTHS.to(place), (torch.rand(T, B) < 0.3).to(place)
    hx = here(tuple(torch.randn(4, B, H) for _ in range(2)))
    check(module, inputs(), lengths=lengths)
    check(module, inputs(), hx, lengths=lengths, reset_mask=resets)
    check(module, inputs()[:, 0], here(tuple(s[:, 0] for s in hx)))


def test_packed_sequences():
    module = here(lstm_ext.LSTM(I, H, 2, bidirectional=True))
    made = compiled(lambda p: module(p))
    for lengths in ([5, 3, 3, 1], [9, 2, 2, 2, 1]):
        x = here(torch.randn(lengths[0], len(lengths), I))
        packed = pack_padded_sequence(x, torch.tensor(lengths).flip(0), enforce_sorted=False)
        (y, states), (expected, expected_states) = made(packed), module(packed)
        assert_close((y.data, states), (expected.data, expected_states), **BITS)
        assert torch.equal(y.batch_sizes, expected.batch_sizes)
    wrong = PackedSequence(packed.data, torch.tensor([4, 5, 3, 2, 1]), *packed[2:])
    with pytest.raises(RuntimeError, match="batch_sizes: expected"):
        made(wrong)


def test_packed_sequences_with_states():
    module = here(lstm_ext.LSTM(I, H, 2, bidirectional=True, proj_size=4))
    made = compiled(lambda p, hx: module(p, hx))

    def states(N, count=4, width=H):
        return here(torch.randn(count, N, 4)), here(torch.randn(count, N, width))

    for lengths in ([5, 3, 3, 1], [9, 2, 2, 2, 1]):
        for order in (torch.tensor(lengths), torch.tensor(lengths).flip(0)):
            x, hx = here(torch.randn(lengths[0], len(lengths), I)), states(len(lengths))
            packed = pack_padded_sequence(x, order, enforce_sorted=order[0] == lengths[0])
            (y, got), (expected, wanted) = made(packed, hx), module(packed, hx)
            assert_close((y.data, got), (expected.data, wanted), **BITS)
    wrong = {0: [states(4), states(6), states(5, count=2)], 1: [states(5, width=4)]}
    for k, cases in wrong.items():
        for hx in cases:
            with pytest.raises(RuntimeError, match=rf"Expected hidden\[{k}\] size \(4, \w+, "):
                made(packed, hx)
    if device.NAME == "cuda":
        return  # there what follows is an assertion of the device, and the process's last call
    in_order = PackedSequence(packed.data, packed.batch_sizes)
    for N in (4, 6):
        with pytest.raises(ValueError, match=f"batch_sizes: expected .* states of {N} sequences"):
            made(in_order, states(N))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_inside_and_around(dtype):
    module = here(lstm_ext.LSTM(I, H, 2))

    def inside(x):
        with torch.autocast(device.DEVICE.type, dtype=dtype):
            return module(x)

    x, parameters = inputs(), list(module.parameters())
    expected = run(inside, x, parameters)
    assert expected[0].dtype == dtype
    assert_close(run(compiled(inside), x, parameters), expected, **BITS)
    with torch.autocast(device.DEVICE.type, dtype=dtype):
        made = [t.detach() for t in tree_leaves(compiled(module)(x))]
    assert_close(made, [t.detach() for t in expected[:3]], **BITS)


@pytest.mark.parametrize("name", ["layers", "everything"])
def test_inductor(name):
    """Bits need torch's own random numbers there."""

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = lstm_ext.LSTM(I, H, **MODULES[name])
            self.out = nn.Linear(H * (1 + self.lstm.bidirectional), 3)

        def forward(self, x, lengths):
            return self.out(self.lstm(x.tanh(), lengths=lengths)[0]).softmax(-1)

    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    with torch._inductor.config.patch(fallback_random=True):
        check(here(Tagger()), inputs(), lengths=LENGTHS, backend="inductor", tolerance=tolerance)


@pytest.mark.parametrize("every", [None, 6])
def test_no_recompilation_for_other_sizes(every):
    """Both sizes dynamic from the start, or found so: the graphs of the first calls serve all."""
    module = here(lstm_ext.LSTM(I, H, 2, bidirectional=True, checkpoint_every=every))
    # On a GPU steps that eager mode would not take in parts have another order of sums in one.
    limits = BITS if every is None or device.NAME == "cpu" else tol(torch.float32)
    for options, calls in (({"dynamic": True}, 1), ({}, 2)):
        counter = CompileCounterWithBackend("aot_eager")
        made = compiled(module, counter, **options)
        sizes = ((5, 4), (7, 3), (6, 3), (50, 17), (200, 9), (9, 2))
        for k, (steps, batch) in enumerate(sizes):
            x, lengths = torch.randn(steps, batch, I), torch.randint(0, steps + 1, (batch,))
            x, lengths = here(x), here(lengths)
            y, expected = (m(x, lengths=lengths)[0] for m in (made, module))
            assert_close(y, expected, **BITS)
            wanted = list(module.parameters())
            slopes = [torch.autograd.grad(t.sum(), wanted) for t in (y, expected)]
            assert_close(*slopes, **limits)
            if k == calls - 1:
                seen = counter.frame_count
        assert counter.frame_count == seen


@pytest.mark.parametrize(("given", "every"), [(False, None), (True, None), (False, 2), (True, 2)])
def test_no_recompilation_for_other_packed_sizes(given, every):
    module = here(lstm_ext.LSTM(I, H, 2, bidirectional=True, checkpoint_every=every))
    counter = CompileCounterWithBackend("aot_eager")
    made = compiled(module, counter)
    for lengths in ([2, 5, 4], [7, 3], [3, 6, 6, 2], [3, 3], [9, 1, 8, 8, 3]):
        x, N = here(torch.randn(max(lengths), len(lengths), I)), len(lengths)
        packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
        hx = (here(torch.randn(4, N, H)), here(torch.randn(4, N, H))) if given else None
        assert_close(made(packed, hx)[0].data, module(packed, hx)[0].data, **BITS)
    assert counter.frame_count == 2


@pytest.mark.parametrize("name", ["layers", "batch_first", "everything", "cells"])
def test_vmap_inside(name):
    """Over inputs and lengths, and over an ensemble's parameters; trained, too."""
    module = here(lstm_ext.LSTM(I, H, **MODULES[name])).eval()
    other = here(lstm_ext.LSTM(I, H, **MODULES[name])).eval()
    stacked, _ = stack_module_state([module, other])
    batch = (B, T) if module.batch_first else (T, B)
    xs = here(torch.randn(3, *batch, I))
    lengths = here(torch.randint(0, T + 1, (3, B)))

    def mapped(xs, lengths):
        return vmap(lambda x, lengths: module(x, lengths=lengths))(xs, lengths)

    def ensemble(stacked, x):
        run = lambda p, x: functional_call(module, p, (x,))  # noqa: E731
        return vmap(run, in_dims=(0, None))(stacked, x)

    for function, first, *rest in ((mapped, xs, lengths), (ensemble, stacked, xs[0])):
        expected = tree_leaves(function(first, *rest))
        made = tree_leaves(compiled(function)(first, *rest))
        assert_close(made, expected, **BITS)
        wanted = list(module.parameters()) if function is mapped else list(stacked.values())
        slopes = [
            torch.autograd.grad(sum(t.square().sum() for t in tensors), wanted, allow_unused=True)
            for tensors in (made, expected)
        ]
        assert_close(*slopes)


def test_one_graph_with_one_node_a_layer():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    module = here(lstm_ext.LSTM(I, H, 3, bidirectional=True))
    compiled(module, backend)(inputs())
    (graph,) = graphs
    assert [str(n.target) for n in graph.graph.nodes].count("lstm_ext.lstm_layer") == 3


@pytest.mark.parametrize(
    "options, forward, backward",
    [({}, 2, 1), ({"bidirectional": True}, 1, 0), ({"proj_size": 2}, 2, 1)],
    ids=str,
)
def test_a_plain_layer_s_operators_go_the_short_way(options, forward, backward, monkeypatch):
    """A call with a gradient and one without; of two directions the latter only."""
    module, made = here(lstm_ext.LSTM(I, H, **options)), {}

    def counted(name):
        function, made[name] = getattr(plain, name), 0

        def run(*args):
            results = function(*args)
            made[name] += results is not None
            return results

        monkeypatch.setattr(plain, name, run)

    counted("plain_results")
    counted("plain_gradients")
    step = compiled(module)
    step(inputs())[0].sum().backward()
    with torch.no_grad():
        step(inputs())
    assert made == {"plain_results": forward, "plain_gradients": backward}


def test_parameters_are_read_at_every_call():
    module = here(lstm_ext.LSTM(I, H))
    made, x = compiled(module), inputs()
    for change in (lambda p: p.mul_(0.5), lambda p: p.data.add_(0.1)):
        with torch.no_grad():
            for parameter in module.parameters():
                change(parameter)
        assert_close(made(x)[0], module(x)[0], **BITS)


def test_a_training_step_as_in_eager_mode():
    torch.manual_seed(0)
    x = inputs()
    losses = []
    for use in (lambda m: m, compiled):
        torch.manual_seed(1)
        module = here(lstm_ext.LSTM(I, H, 2, dropout=0.2))
        optimizer, function = torch.optim.Adam(module.parameters(), 0.05), use(module)
        for _ in range(4):
            optimizer.zero_grad()
            loss = function(x)[0].sum()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    assert torch.equal(*losses)


# --- errors ---------------------------------------------------------------------------------------


def raised(function, x):
    """The innermost words of an error, which torch wraps in its own."""
    with pytest.raises(Exception) as caught:
        compiled(function)(x)
    words, error = [], caught.value
    while error is not None:
        words.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(words)


@pytest.mark.parametrize("frozen", [False, True])
def test_transforms_inside_raise(frozen):
    """Never zeros for a derivative."""
    module = here(lstm_ext.LSTM(I, H)).requires_grad_(not frozen)
    run = lambda x: module(x)[0]  # noqa: E731
    transforms = {
        "Grad": lambda x: torch.func.grad(lambda x: run(x).sum())(x),
        "Jvp": lambda x: torch.func.jvp(run, (x,), (x,))[1],
    }
    for name, function in transforms.items():
        torch._dynamo.reset()
        words = raised(function, inputs())
        assert "first derivative only, got" in words and name in words

    def dual(x):
        with torch.autograd.forward_ad.dual_level():
            made = run(torch.autograd.forward_ad.make_dual(x, x))
            return torch.autograd.forward_ad.unpack_dual(made).tangent

    torch._dynamo.reset()
    assert "first derivative only, got" in raised(dual, inputs())


def test_a_second_derivative_raises():
    module = here(lstm_ext.LSTM(I, H))
    x = inputs().requires_grad_()
    (first,) = torch.autograd.grad(compiled(module)(x)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        first.sum().backward()


def test_lengths_out_of_range():
    made = compiled(here(lstm_ext.LSTM(I, H)))
    made(inputs(), lengths=LENGTHS)
    with pytest.raises(ValueError, match="between 0 and the number of steps, 5, got .* 6"):
        made(inputs(), lengths=LENGTHS + 1)


def test_errors_of_the_module_stay():
    module = here(lstm_ext.LSTM(I, H))
    assert "input.size(-1) must be equal to input_size" in raised(module, inputs()[..., :2])
    assert "the same dtype" in raised(
        lambda x: module(x, (x.new_zeros(1, B, H).double(), x.new_zeros(1, B, H))), inputs()
    )
