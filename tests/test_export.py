"""The operators (torch.library), torch.export and make_fx."""

import device
import pytest
import torch
from device import here
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import lstm_ext
from lstm_ext import library
from lstm_ext.flat import flatten, kinds_of
from lstm_ext.ops import Direction, LayerWeights, Masks
from lstm_ext.steps import Steps

T, B, I, H, P = 5, 4, 3, 8, 2
BITS = {"rtol": 0, "atol": 0}
TIME, BATCH = Dim("T"), Dim("B")
SIZES = ((5, 4), (9, 2), (1, 1), (130, 3))


def nodes(program):
    return [str(n.target) for n in program.graph.nodes if "lstm_ext" in str(n.target)]


# --- operators ------------------------------------------------------------------------------------


def weights(dtype, proj, varied, masks):
    p = P if proj else H
    sizes = {"w_ih": (4 * H, I), "w_hh": (4 * H, p), "b_ih": (4 * H,)}
    sizes |= {"w_hr": (P, H)} if proj else {}
    if varied:
        sizes |= {"w_ch": (3 * H,), "gamma_ih": (4 * H,), "gamma_hh": (4 * H,)}
        sizes |= {"gamma_ch": (H,), "beta_ch": (H,)}
    made = {name: here(torch.randn(size, dtype=dtype)) for name, size in sizes.items()}
    return LayerWeights(**made, masks=masks)


ON = {"device": device.DEVICE}
CALLS = {
    "plain": {},
    "two_directions": {"D": 2},
    "cells": {"cells": True},
    "cells_of_two": {"cells": True, "D": 2},
    "cells_in_half": {"cells": True, "dtype": torch.bfloat16},
    "projection": {"proj": True, "dtype": torch.float64},
    "variants": {"varied": True, "masked": True, "D": 2},
    "lengths": {"steps": lambda: Steps.padded(T, B, lengths=torch.tensor([5, 0, 1, 2]), **ON)},
    "resets": {"steps": lambda: Steps.padded(T, B, reset_mask=torch.rand(T, B) < 0.3, **ON)},
    "packed": {"steps": lambda: Steps.packed(torch.tensor([4, 2, 2, 1, 1]), 10, **ON)},
    "batch_first": {"steps": lambda: Steps.padded(T, B, batch_first=True, **ON)},
}


def operands(
    D=1, dtype=torch.float32, proj=False, varied=False, masked=False, cells=False, steps=None
):
    """Those of lstm_layer but save."""
    steps = steps() if steps else Steps.padded(T, B, device=device.DEVICE)
    masks = Masks(None, 0.25, here(torch.rand(steps.rows, H) < 0.4)) if masked else None
    directions = [
        Direction(
            here(torch.randn(B, P if proj else H, dtype=dtype)),
            here(torch.randn(B, H, dtype=dtype)),
            weights(dtype, proj, varied, masks),
            reverse,
        )
        for reverse in (False, True)[:D]
    ]
    x = here(torch.randn(steps.rows, I, dtype=dtype))
    flat = flatten(directions)
    return (*library.encode(steps, kinds_of(directions), x, flat), cells)


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    arguments = operands(**CALLS[name])
    layer, backward = torch.ops.lstm_ext.lstm_layer, torch.ops.lstm_ext.lstm_layer_backward
    x, flat, *_, cells = arguments
    trained = tree_map_only(torch.Tensor, lambda t: t.clone(), arguments)
    for tensor in (trained[0], *trained[1]):
        if tensor is not None:
            tensor.requires_grad_()
    opcheck(layer.default, (*trained, False))
    if name != "lengths":  # what is saved of padding is arbitrary, and so differs by call
        opcheck(layer.default, (*arguments, True))

    D = len(flat) // (12 if CALLS[name].get("varied") else 7)
    shown = 1 + cells + 2 * D
    results = layer(*arguments, True)
    if cells and D == 1 and x.dtype == torch.float32:  # then c_t is returned once
        results.insert(shown + 1, results[1])
    grads = [torch.randn_like(t) for t in results[:shown]]
    if not cells:
        grads.insert(1, None)
    saved = [results[0], *results[shown:]]
    wanted = [True, *(t is not None for t in flat)]
    opcheck(backward.default, (*arguments[:-1], grads, saved, wanted))
    only_h0 = [False, True, *[False] * (len(flat) - 1)]
    (dh0,) = backward(*arguments[:-1], grads, saved, only_h0)
    assert torch.equal(dh0, backward(*arguments[:-1], grads, saved, wanted)[1])


def test_operators_check_what_they_get():
    *layer, cells = operands()
    run = torch.ops.lstm_ext.lstm_layer
    with pytest.raises(RuntimeError, match="Expected h0 of size"):
        run(layer[0], [layer[1][0][:2], *layer[1][1:]], *layer[2:], cells, False)
    with pytest.raises(ValueError, match="between 0 and the number of steps, 5, got .* 6"):
        run(*layer[:-2], torch.full((B,), 6), None, cells, False)
    packed = operands(**CALLS["packed"])
    offsets = packed[8] + 1
    with pytest.raises(ValueError, match="batch_sizes: expected numbers"):
        run(*packed[:8], offsets, *packed[9:], False)


ONES = here(torch.ones(2, 2, dtype=torch.bool))
#: What stands where in the operator's arguments, and the words of the error.
REFUSED = {
    "rows": ({6: B + 1}, r"Expected h0 of size \(5, 8\), got \(4, 8\)"),
    "another_batch": ({5: 2 * T, 6: B // 2}, "Expected h0 of size"),
    "of_a_module": ({0: lambda x: x.view(T, B, I)}, "Expected input rows of size"),
    "no_weight": ({1: lambda flat: [*flat[:2], None, *flat[3:]]}, "weight_hh, got None for one"),
    "no_state": ({1: lambda flat: [None, *flat[1:]]}, "weight_hh, got None for one"),
    "no_c": ({1: lambda flat: [flat[0], None, *flat[2:]]}, "weight_hh, got None for one"),
    "of_three": ({1: lambda flat: flat * 3, 4: [False, True, False]}, "1 or 2 directions, got 3"),
    "reset_mask": ({10: ONES}, r"Expected reset_mask to be torch.bool of size \(5, 4\), got"),
    "lengths": ({9: ONES.long()}, r"Expected lengths to be torch.int64 of size \(4,\), got"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("backward", [False, True])
def test_operators_refuse_what_is_wrong(name, backward):
    changes, words = REFUSED[name]
    *layer, cells = operands()
    results = torch.ops.lstm_ext.lstm_layer(*layer, cells, True)
    for at, change in changes.items():
        layer[at] = change(layer[at]) if callable(change) else change
    with pytest.raises(RuntimeError, match=words):
        if backward:
            grads, wanted = [*results[:1], None, *results[1:3]], [True] * (1 + len(layer[1]))
            saved = [results[0], *results[3:]]
            torch.ops.lstm_ext.lstm_layer_backward(*layer, grads, saved, wanted)
        else:
            torch.ops.lstm_ext.lstm_layer(*layer, cells, False)


@pytest.mark.parametrize("proj", [False, True])
def test_backward_refuses_gradients_of_other_sizes(proj):
    *layer, cells = operands(proj=proj)
    y, h_n, c_n, *saved = torch.ops.lstm_ext.lstm_layer(*layer, cells, True)
    wanted = [t is not None for t in (y, *layer[1])]
    run = torch.ops.lstm_ext.lstm_layer_backward
    for wrong in ([y[:2], None, h_n, c_n], [y, None, h_n[:1], c_n], [y, c_n, h_n, c_n]):
        with pytest.raises(RuntimeError, match="Expected a gradient of size"):
            run(*layer, wrong, [y, *saved], wanted)
    with pytest.raises(RuntimeError, match="Expected 4 gradients, got 3"):
        run(*layer, [y, None, h_n], [y, *saved], wanted)


# --- torch.export ---------------------------------------------------------------------------------


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(10, I), lstm_ext.LSTM(I, H, 2, batch_first=True)

    def forward(self, words, lengths):
        return self.lstm(self.embedding(words), lengths=lengths)[0].softmax(-1)


@pytest.mark.parametrize("strict", [False, True], ids=["lax", "strict"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("every", [None, 4])
def test_export_with_any_steps_and_batch(strict, training, every):
    """One node a layer, whatever T and B; states and gradients too."""
    options = {"bidirectional": True, "proj_size": P, "checkpoint_every": every}
    module = here(lstm_ext.LSTM(I, H, 2, **options)).train(training)
    operator = "lstm_layer" if every is None else "lstm_layer_parts"

    def states(batch):
        return here((torch.randn(4, batch, P), torch.randn(4, batch, H)))

    program = export(
        module,
        (here(torch.randn(T, B, I)), states(B)),
        dynamic_shapes=({0: TIME, 1: BATCH}, ({1: BATCH}, {1: BATCH})),
        strict=strict,
    )
    assert nodes(program) == [f"lstm_ext.{operator}.default"] * 2
    assert nodes(program.run_decompositions()) == [f"lstm_ext.{operator}.default"] * 2
    run = program.module()
    for steps, batch in SIZES:
        x, hx = here(torch.randn(steps, batch, I)), states(batch)
        expected, made = module(x, hx), run(x, hx)
        assert_close(made, expected, **BITS)
    made = torch.autograd.grad(made[0].sum(), list(run.parameters()))
    expected = torch.autograd.grad(expected[0].sum(), list(module.parameters()))
    by_name = dict(zip((n for n, _ in run.named_parameters()), made, strict=True))
    for (name, _), gradient in zip(module.named_parameters(), expected, strict=True):
        assert_close(by_name[name], gradient, **BITS)


@pytest.mark.parametrize("strict", [False, True])
def test_a_cell_is_one_operator(strict):
    """torch.compile sees its operations."""
    cell, x = here(lstm_ext.LSTMCell(I, H)), here(torch.randn(B, I))
    program = export(cell, (x,), strict=strict)
    assert nodes(program) == ["lstm_ext.lstm_layer.default"]
    assert_close(program.module()(x), cell(x), **BITS)


def test_export_with_lengths(tmp_path):
    """Saved and loaded; lengths are still checked when it runs."""
    module = here(Tagger()).eval()
    words = here(torch.randint(10, (B, T)))
    program = export(
        module,
        (words, torch.tensor([5, 0, 2, 3])),
        dynamic_shapes=({0: BATCH, 1: TIME}, {0: BATCH}),
    )
    torch.export.save(program, tmp_path / "tagger.pt2")
    run = torch.export.load(tmp_path / "tagger.pt2").module()
    for steps, batch in SIZES:
        words, lengths = torch.randint(10, (batch, steps)), torch.randint(0, steps + 1, (batch,))
        assert_close(run(here(words), lengths), module(here(words), lengths), **BITS)
    if device.DEVICE.type == "cpu":  # elsewhere the device asserts it
        with pytest.raises(ValueError, match="between 0 and the number of steps, 130"):
            run(here(words), lengths + 131)


def test_export_of_variants():
    kwargs = {"peephole": True, "layer_norm": True, "zoneout": 0.25, "return_cell_sequence": True}
    module = here(lstm_ext.LSTM(I, H, bidirectional=True, merge_mode="sum", **kwargs)).eval()
    program = export(module, (here(torch.randn(T, B, I)),), dynamic_shapes=({0: TIME, 1: BATCH},))
    x = here(torch.randn(7, 2, I))
    assert_close(program.module()(x), module(x), **BITS)


@pytest.mark.cpu_only(reason="compiles for the CPU")
def test_ahead_of_time(tmp_path):
    """AOTInductor: a package that calls the operator."""
    module = lstm_ext.LSTM(I, H, 2, bidirectional=True).eval()
    lengths = torch.tensor([5, 0, 2, 3])
    dynamic = {"input": {0: TIME, 1: BATCH}, "lengths": {0: BATCH}}
    with torch.no_grad():
        program = export(
            module, (torch.randn(T, B, I),), {"lengths": lengths}, dynamic_shapes=dynamic
        )
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "lstm.pt2")
        )
        run = torch._inductor.aoti_load_package(path)
        for steps, batch in SIZES[:2]:
            x, lengths = torch.randn(steps, batch, I), torch.randint(0, steps + 1, (batch,))
            assert_close(run(x, lengths=lengths), module(x, lengths=lengths))


# --- make_fx and tensors without data -------------------------------------------------------------


def test_make_fx_records_both_passes():
    module = here(lstm_ext.LSTM(I, H, 2, **{"dtype": torch.float64}))
    x, other = here(torch.randn(2, T, B, I, dtype=torch.float64))
    parameters = dict(module.named_parameters())

    def step(parameters, x):
        y = torch.func.functional_call(module, parameters, (x,))[0]
        return torch.autograd.grad(y.square().sum(), list(parameters.values()))

    graph = make_fx(step)(parameters, x)
    recorded = [str(n.target) for n in graph.graph.nodes if "lstm_ext" in str(n.target)]
    assert (
        recorded
        == ["lstm_ext.lstm_layer.default"] * 2 + ["lstm_ext.lstm_layer_backward.default"] * 2
    )
    assert_close(graph(parameters, other), step(parameters, other), **BITS)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("given", ["nothing", "lengths", "reset_mask"])
def test_make_fx_in_every_mode(mode, given):
    """With symbols for the sizes too; lengths are checked when the graph runs."""
    module = here(lstm_ext.LSTM(I, H, 2, bidirectional=True)).requires_grad_(False)

    def run(parameters, x, tensor):
        kwargs = {} if given == "nothing" else {given: tensor}
        return torch.func.functional_call(module, parameters, (x,), kwargs)[0]

    def call(steps, batch):
        lengths, resets = torch.randint(0, steps + 1, (batch,)), torch.rand(steps, batch) < 0.3
        tensor = resets if given == "reset_mask" else lengths
        return dict(module.named_parameters()), here(torch.randn(steps, batch, I)), tensor

    graph = make_fx(run, tracing_mode=mode)(*call(T, B))
    for sizes in SIZES if mode == "symbolic" else [(T, B)]:
        arguments = call(*sizes)
        if 1 not in sizes:
            assert_close(graph(*arguments), run(*arguments), **BITS)
    if given == "lengths" and device.DEVICE.type == "cpu":
        with pytest.raises(ValueError, match="between 0 and the number of steps"):
            graph(*arguments[:2], arguments[2] + 1000)


def test_make_fx_refuses_a_second_derivative():
    module = here(lstm_ext.LSTM(I, H)).requires_grad_(False)

    def step(x):
        (first,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
        return torch.autograd.grad(first.sum(), x)

    with pytest.raises(RuntimeError, match="first derivative only, got a second derivative"):
        make_fx(step)(here(torch.randn(T, B, I)).requires_grad_())


def test_fake_tensors_have_the_shapes():
    module = here(lstm_ext.LSTM(I, H, 2, bidirectional=True, return_cell_sequence=True))
    x = here(torch.randn(T, B, I))
    y, states, cells = module(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake_x, lengths = mode.from_tensor(x), mode.from_tensor(torch.zeros(B, dtype=torch.int64))
        assert module(fake_x, lengths=lengths)[0].shape == y.shape
        fake_y, fake_states, fake_cells = module(fake_x)
    fakes = (fake_y, *fake_states, fake_cells)
    for fake, real in zip(fakes, (y, *states, cells), strict=True):
        assert isinstance(fake, FakeTensor)
        assert fake.shape == real.shape and fake.stride() == real.stride()
        assert fake.dtype == real.dtype and fake.device == real.device


def test_a_recorded_first_derivative_can_be_differentiated_when_it_runs():
    """In the exported program, and in a graph that holds the backward's operator."""
    module = here(lstm_ext.LSTM(I, H, bidirectional=True, dtype=torch.float64))
    module.requires_grad_(False)
    x = here(torch.randn(T, B, I, dtype=torch.float64)).requires_grad_()

    def slope(function):
        y, (h_n, _) = function(x)
        loss = y.square().sum() + h_n.sum()
        return torch.autograd.grad(loss, x, create_graph=True)[0]

    (expected,) = torch.autograd.grad(slope(module).square().sum(), x)
    program = export(module, (x,), strict=False).module()
    (made,) = torch.autograd.grad(slope(program).square().sum(), x)
    assert_close(made, expected)

    def first(x):
        y, (h_n, _) = module(x)
        return torch.autograd.grad(y.square().sum() + h_n.sum(), x)[0]

    (made,) = torch.autograd.grad(make_fx(first)(x)(x).square().sum(), x)
    assert_close(made, expected)


def test_an_exported_layer_inside_a_checkpoint():
    """Which lets backward read each saved tensor once."""
    module = here(lstm_ext.LSTM(I, H, dtype=torch.float64))
    x = here(torch.randn(T, B, I, dtype=torch.float64)).requires_grad_()
    program = export(module, (x,), strict=False).module()

    def run(x):
        return program(x)[0]

    made, expected = (
        torch.autograd.grad(y.square().sum(), x)
        for y in (checkpoint(run, x, use_reentrant=False), module(x)[0])
    )
    assert_close(made, expected)


# --- torch.fx -------------------------------------------------------------------------------------


class EveryKind(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.cell = lstm_ext.LSTM(3, 4), lstm_ext.LSTMCell(4, 5)
        self.inner = torch.nn.Sequential(lstm_ext.ConvLSTM1d(2, 2, 3))

    def forward(self, x, film, lengths):
        y, (h, c) = self.lstm(x, lengths=lengths)
        return self.cell(y[0]), self.inner(film)[0].relu(), c


def test_modules_are_leaves_of_symbolic_traces():
    """As those of torch.nn are."""
    model = here(EveryKind())
    traced = torch.fx.symbolic_trace(model)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert calls == ["lstm", "cell", "inner.0"]
    x, film = here(torch.randn(5, 2, 3)), here(torch.randn(3, 2, 2, 6))
    inputs = (x, film, torch.tensor([5, 2]))
    torch.testing.assert_close(traced(*inputs), model(*inputs))


def test_a_trace_that_would_run_hooks_twice_is_refused():
    module = lstm_ext.LSTM(3, 4)
    with pytest.raises(RuntimeError, match="cannot trace a LSTM itself: trace a module that holds"):
        torch.fx.symbolic_trace(module)
    for register in (module.register_forward_hook, module.register_forward_pre_hook):
        handle = register(lambda *args: None)
        with pytest.raises(RuntimeError, match="cannot trace a LSTM with hooks"):
            torch.fx.symbolic_trace(torch.nn.Sequential(module))
        handle.remove()
    assert torch.fx.symbolic_trace(torch.nn.Sequential(module))
