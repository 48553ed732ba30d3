"""Ways through the layers that the other tests do not take: each was found by a change of the code
that none of them noticed."""

import pytest
import torch
from torch import nn
from torch._vmap_internals import _vmap
from torch.func import functional_call

import lstm_ext
from lstm_ext import quantize

pytestmark = pytest.mark.cpu_only(reason="made of tensors on the CPU")

F64 = {"dtype": torch.float64}


def negated(t):
    """The same numbers, lazily negated."""
    return torch._neg_view(-t)


def strided(t):
    return torch.stack([t, t + 1], -1)[..., 0]


def gradients(outputs, inputs, v, **kwargs):
    return torch.autograd.grad(outputs, inputs, v, retain_graph=True, **kwargs)


# --- the operators --------------------------------------------------------------------------------


def layer_arguments(T=3, B=2, I=3, H=4, rows=None, masks=None, keeps=None, lengths=None, P=None):
    sizes = (B, P or H), (B, H), (4 * H, I), (4 * H, P or H)
    flat = [*map(torch.randn, sizes), None, None, torch.randn(P, H) if P else None]
    x = torch.randn(rows or T * B, I)
    return x, flat, masks, keeps, [False], T, B, False, None, lengths, None, False, False


WRONG = {
    "Expected input of 18 rows, got 6": {"T": 9, "rows": 6},
    "Expected input of 6 rows, got 5": {"rows": 5},
    "Expected lengths to be torch.int64": {"lengths": torch.tensor([3, 1], dtype=torch.int32)},
    "Expected h_dropout of size": {"masks": [torch.ones(2, 3), None, None], "keeps": [0.0, 0.0]},
    "Expected keep_h of size": {
        "masks": [None, torch.ones(3, 4).bool(), None],
        "keeps": [0.0, 0.0],
    },
}


@pytest.mark.parametrize("words", WRONG)
def test_sizes_of_the_operator(words):
    with pytest.raises(RuntimeError, match=words):
        torch.ops.lstm_ext.lstm_layer(*layer_arguments(**WRONG[words]))


def test_what_the_operator_would_read_or_write_elsewhere():
    run = torch.ops.lstm_ext.lstm_layer
    x, flat, *rest = layer_arguments()
    no_rows = [*flat[:6], torch.randn(0, 4)]
    no_rows[0], no_rows[3] = torch.randn(2, 0), torch.randn(16, 0)
    with pytest.raises(RuntimeError, match="weight_hr of at least one row"):
        run(x, no_rows, *rest)
    gammas = [torch.ones(n) for n in (16, 16, 4, 4)]
    for k in range(4):
        norm = [None if i == k else t for i, t in enumerate(gammas)]
        with pytest.raises(RuntimeError, match="all four tensors of a layer norm"):
            run(x, [*flat, None, *norm], *rest)
    starts, ends = torch.arange(3) * 2, torch.tensor([3, 3])
    assert len(run(x, flat, *rest[:6], starts, ends, *rest[8:])) == 3
    for batch_first, lengths in ((True, ends), (False, None)):
        with pytest.raises(RuntimeError, match="Expected offsets of steps, one after the other"):
            run(x, flat, *rest[:5], batch_first, starts, lengths, *rest[8:])


def test_a_square_projection_of_the_operator():
    one = layer_arguments(P=4)
    other = (*one[:9], torch.tensor([3, 3]), *one[10:])
    run = torch.ops.lstm_ext.lstm_layer
    for a, b in zip(run(*one), run(*other), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("make", [lstm_ext.LSTM, lambda *n: quantize(nn.LSTM(*n))])
def test_a_meta_tensor_among_others(make):
    """torch then asks what is for tensors without values, whose results hold nothing."""
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        exported = torch.export.export(make(3, 4), (x,)).module()
        with pytest.raises(RuntimeError, match="Expected all tensors on meta"):
            exported(x.to("meta"))
        with pytest.raises(RuntimeError, match="got one on meta"):
            exported.to("meta")(x)


# --- weights of 8 bits ----------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, torch.tensor([5, 5, 2, 5])], ids=["whole", "lengths"])
def test_negated_input_of_8_bits(lengths):
    module, x = quantize(nn.LSTM(7, 19)), torch.randn(5, 4, 7)
    hx = torch.randn(1, 4, 19), torch.randn(1, 4, 19)
    with torch.no_grad():
        found = module(negated(x), tuple(map(negated, hx)), lengths=lengths)[0]
        assert torch.equal(found, module(x, hx, lengths=lengths)[0])


def test_cells_of_8_bits_in_a_graph():
    module, x = quantize(lstm_ext.LSTM(7, 19, return_cell_sequence=True)), torch.randn(5, 4, 7)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x)[2], module(x)[2])


# --- the cell alone, and ConvLSTM -----------------------------------------------------------------


def convolutional(**kwargs):
    """A module and its input, initial states and parameters, of which it is a function."""
    torch.manual_seed(0)
    module = lstm_ext.ConvLSTM1d(2, 3, 3, peephole=True, **kwargs)
    tensors = [torch.randn(4, 2, 2, 5, **kwargs), *torch.randn(2, 1, 2, 3, 5, **kwargs)]
    tensors += [p.detach() for p in module.parameters()]
    names = [name for name, _ in module.named_parameters()]

    def run(x, h, c, *parameters):
        replaced = dict(zip(names, parameters, strict=True))
        y, states = functional_call(module, replaced, (x, (h, c)))
        return y, *states

    return run, tensors


@pytest.mark.parametrize("otherwise", [negated, strided])
def test_tensors_of_a_convolutional_layer_that_lie_otherwise(otherwise):
    run, tensors = convolutional()
    expected = run(*tensors)
    for k in range(len(tensors)):
        given = [otherwise(t) if i == k else t for i, t in enumerate(tensors)]
        torch.testing.assert_close(run(*given), expected)


@pytest.mark.parametrize("otherwise", [negated, strided])
def test_gradients_of_a_convolutional_layer_that_lie_otherwise(otherwise):
    run, tensors = convolutional()
    inputs = [t.requires_grad_() for t in tensors]
    outputs = run(*inputs)
    v = [torch.randn_like(t) for t in outputs]
    found, expected = (gradients(outputs, inputs, d) for d in (list(map(otherwise, v)), v))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("used", range(3), ids=["y", "h_n", "c_n"])
def test_a_gradient_of_one_result_of_a_convolutional_layer(used):
    run, tensors = convolutional(**F64)
    inputs = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: run(*t)[used], inputs, fast_mode=True)


def test_second_derivative_of_a_convolutional_layer_whose_inputs_depend_on_each_other():
    run, (x, h, _, *parameters) = convolutional(**F64)
    h.requires_grad_()

    def first(h):
        y, h_n, c_n = run(x, h, 2 * h, *parameters)
        (g,) = torch.autograd.grad((h_n * c_n).sum() + y.sum(), h, create_graph=True)
        return g

    assert torch.autograd.gradcheck(first, h)


def test_what_is_made_of_a_convolutional_layer_may_change():
    """Backward reads none of its results."""
    run, tensors = convolutional()
    inputs = [t.requires_grad_() for t in tensors]
    outputs = run(*inputs)
    expected = gradients(sum(t.sum() for t in outputs), inputs, None)
    with torch.no_grad():
        for t in outputs:
            t.zero_()
    found = gradients(sum(t.sum() for t in outputs), inputs, None)
    assert all(map(torch.equal, found, expected))
    cell = lstm_ext.ConvLSTM1dCell(2, 3, 3)
    h, c = cell(inputs[0][0])
    h.mul_(2)
    c.mul_(2)
    (h + c).sum().backward()
    changed = [p.grad for p in cell.parameters()]
    h, c = cell(inputs[0][0])
    cell.zero_grad()
    (2 * h + 2 * c).sum().backward()
    assert all(map(torch.equal, changed, (p.grad for p in cell.parameters())))


def test_an_initial_state_that_no_step_takes():
    """A sequence without steps has no part in W_hh's gradient, whatever its state."""
    module = lstm_ext.ConvLSTM1d(2, 3, 3)
    hx = torch.randn(2, 1, 2, 3, 5)
    hx[:, :, 0] = torch.inf
    y, _ = module(torch.randn(4, 2, 2, 5), tuple(hx), lengths=torch.tensor([0, 3]))
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_a_convolutional_cell_of_dual_tensors():
    cell, x = lstm_ext.ConvLSTM1dCell(2, 3, 3, **F64), torch.randn(2, 2, 5, **F64)
    dual = torch.autograd.forward_ad
    with dual.dual_level():
        tangent = dual.unpack_dual(cell(dual.make_dual(x, torch.ones_like(x)))[0]).tangent
    expected = torch.func.jvp(lambda x: cell(x)[0], (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, expected)


def test_float64_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = lstm_ext.ConvLSTM1d(2, 3, 3, **F64)(torch.randn(3, 2, 2, 5, **F64))
    assert y.dtype == torch.float64


def test_images_of_nothing_but_padding():
    with pytest.raises(RuntimeError, match="is too small"):
        lstm_ext.ConvLSTM1d(2, 3, 3, padding=2)(torch.randn(2, 2, 2, 0))


# --- derivatives ----------------------------------------------------------------------------------


def test_third_derivative_of_a_cell():
    cell, x = lstm_ext.LSTMCell(3, 4, **F64), torch.randn(2, 3, **F64).requires_grad_()
    hx = torch.randn(2, 4, **F64), torch.randn(2, 4, **F64)

    def second(x):
        (g,) = torch.autograd.grad(cell(x, hx)[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x, create_graph=True)[0]

    assert torch.autograd.gradcheck(second, x)


@pytest.mark.parametrize("kind", ["autocast", "negated"])
def test_second_derivative_of_a_cell(kind):
    cell, x = lstm_ext.LSTMCell(3, 4), torch.randn(2, 3).requires_grad_()
    hx, v = (torch.randn(2, 4), torch.randn(2, 4)), torch.randn(2, 3)
    (g,) = torch.autograd.grad(cell(x, hx)[0].square().sum(), x, create_graph=True)
    (expected,) = gradients(g, cell.weight_ih, v)
    with torch.autocast("cpu", enabled=kind == "autocast"):
        (found,) = gradients(g, cell.weight_ih, negated(v) if kind == "negated" else v)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", [{}, {"peephole": True}, {"layer_norm": True}], ids=str)
def test_autocast_around_higher_derivatives_alone(options):
    module = lstm_ext.LSTM(3, 4, **options)
    x, weights = torch.randn(5, 2, 3).requires_grad_(), list(module.parameters())
    (g,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)

    def higher():
        given = {"create_graph": True, "allow_unused": True}
        second = torch.autograd.grad(g.square().sum(), weights, **given)
        total = sum(t.square().sum() for t in second if t is not None)
        third = gradients(total, weights, None, allow_unused=True)
        return [t for t in (*second, *third) if t is not None]

    expected = higher()
    with torch.autocast("cpu"):
        found = higher()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_two_old_vmaps_are_refused():
    x = torch.randn(3, 2, 3).requires_grad_()
    y = lstm_ext.LSTM(3, 4)(x)[0]
    v = torch.randn(2, *y.shape)
    with pytest.raises(RuntimeError, match="one vmap of torch.autograd at a time"):
        _vmap(lambda a: _vmap(lambda b: gradients(y, x, a + b)[0])(v))(v)


# --- lengths, layouts, packed input ---------------------------------------------------------------


@pytest.mark.parametrize("cells", [False, True])
def test_a_sequence_without_its_one_step_passes_its_gradient_on(cells):
    module, h0 = lstm_ext.LSTM(3, 4, return_cell_sequence=cells), torch.randn(1, 3, 4)
    hx = h0.requires_grad_(), torch.randn(1, 3, 4)
    h_n = module(torch.randn(1, 3, 3), hx, lengths=torch.tensor([1, 0, 1]))[1][0]
    (g,) = torch.autograd.grad(h_n.sum(), h0)
    assert torch.equal(g[0, 1], torch.ones(4))


def test_nan_in_the_padding_of_many_rows_with_a_projection():
    module, x = lstm_ext.LSTM(8, 16, proj_size=4), torch.randn(200, 4, 8)
    lengths, found = torch.tensor([200, 3, 0, 150]), []
    padding = torch.arange(200)[:, None] >= lengths
    for fill in (0.0, float("nan")):
        output = module(x.masked_fill(padding[..., None], fill), lengths=lengths)[0]
        found.append(torch.autograd.grad(output.sum(), list(module.parameters())))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("lengths", [None, torch.tensor([3, 1])], ids=["whole", "lengths"])
def test_negated_gradients_of_states(lengths):
    module, x = lstm_ext.LSTM(3, 4), torch.randn(3, 2, 3).requires_grad_()
    states = module(x, lengths=lengths)[1]
    v = [torch.randn(1, 2, 4) for _ in range(2)]
    found, expected = gradients(states, x, list(map(negated, v))), gradients(states, x, v)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "options", [{}, {"peephole": True}, {"layer_norm": True}, {"proj_size": 2}], ids=str
)
def test_strided_weights_by_the_layer(options):
    module, x = lstm_ext.LSTM(3, 4, **options), torch.randn(3, 2, 3)
    given = {"lengths": torch.tensor([3, 1])}
    weights = {name: strided(p.detach()) for name, p in module.named_parameters()}
    found = functional_call(module, weights, (x,), given)
    assert torch.equal(found[0], module(x, **given)[0])


def test_half_cells_in_a_graph_train():
    module = lstm_ext.LSTM(3, 4, return_cell_sequence=True, dtype=torch.bfloat16)
    compiled, found = torch.compile(module, backend="aot_eager", fullgraph=True), []
    x = torch.randn(5, 2, 3, dtype=torch.bfloat16)
    for run in (module, compiled):
        y, _, cells = run(x)
        found.append(torch.autograd.grad(y.sum() + cells.sum(), list(module.parameters())))
    assert all(map(torch.equal, *found))


def test_errors_of_packed_input():
    packed = nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    hx = torch.zeros(1, 2, 4, **F64), torch.zeros(1, 2, 4, **F64)
    with pytest.raises(RuntimeError, match="Input and hidden tensors are not the same dtype"):
        lstm_ext.LSTM(3, 4)(packed, hx)
    for sizes in (torch.tensor([[2, 2], [1, 1]]), torch.tensor(6)):
        with pytest.raises(ValueError, match="batch_sizes: expected a 1-D"):
            lstm_ext.LSTM(3, 4)(nn.utils.rnn.PackedSequence(torch.randn(6, 3), sizes))


def test_a_state_of_another_size_is_named():
    cell, x = lstm_ext.LSTMCell(3, 4), torch.randn(2, 3)
    with pytest.raises(RuntimeError, match="hidden1 has inconsistent hidden_size"):
        cell(x, (torch.zeros(2, 4), torch.zeros(2, 5)))
