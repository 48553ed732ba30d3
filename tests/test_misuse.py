"""What must raise or give the right number, however odd the surroundings; never crash."""

import pytest
import torch
from device import DEVICE, PLACES, here, leaf
from interpreter import run
from layers import lstm_layer
from tolerances import tol

import lstm_ext
from lstm_ext import reference
from lstm_ext.cpu import products as cpu_products
from lstm_ext.ops import LayerWeights
from lstm_ext.steps import Steps

F64 = {"dtype": torch.float64}


def test_default_device_elsewhere():
    """Tensors that the package makes for itself lie on the CPU, whatever the default device."""
    module = here(lstm_ext.LSTM(3, 4, 2, bidirectional=True))
    x, lengths = here(torch.randn(5, 2, 3)), torch.tensor([2, 5])
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    expected = module(x, lengths=lengths)[0]
    expected_packed = module(packed)[0].data
    with torch.device("meta"):
        y = module(x, lengths=lengths)[0]
        y_packed = module(packed)[0].data
        grads = torch.autograd.grad(y, list(module.parameters()), torch.ones_like(y))
    assert torch.equal(y, expected) and torch.equal(y_packed, expected_packed)
    assert all(g.device == DEVICE for g in grads)


@pytest.mark.parametrize("place", PLACES)
def test_lengths_and_mask_changed_before_backward(place):
    module = here(lstm_ext.LSTM(3, 4, bidirectional=True, **F64))
    x = here(torch.randn(5, 2, 3, **F64))

    def grads(spoil):
        lengths = torch.tensor([2, 4], device=place)
        mask = torch.full((5, 2), False, device=place)
        mask[1, 1] = True
        y = module(x, lengths=lengths, reset_mask=mask)[0]
        if spoil:
            lengths.fill_(10**9)
            mask.fill_(True)
        return torch.autograd.grad(y.sum(), list(module.parameters()))

    for spoiled, kept in zip(grads(True), grads(False), strict=True):
        assert torch.equal(spoiled, kept)


def test_strided_single_bias():
    H, B = 160, 300
    x, zero = here((torch.randn(B, 64), torch.zeros(B, H)))
    w_ih, w_hh = here((torch.randn(4 * H, 64) / 8, torch.randn(4 * H, H) / 13))
    for bias in (here(torch.randn(8 * H))[::2], here(torch.randn(1)).expand(4 * H)):
        ours = lstm_layer(x, zero, zero, LayerWeights(w_ih, w_hh, bias), Steps.padded(1, B))[0]
        plain = reference.lstm_layer(x.view(1, B, 64), zero, zero, w_ih, w_hh, bias)[0]
        torch.testing.assert_close(ours.view_as(plain), plain, **tol(torch.float32))


def test_second_derivative_without_steps():
    module = here(lstm_ext.LSTM(3, 4, **F64))
    hx = [leaf(torch.randn(1, 2, 4, **F64)) for _ in range(2)]
    x = leaf(torch.randn(0, 2, 3, **F64))
    h_n = module(x, hx)[1][0]
    (dh0,) = torch.autograd.grad(h_n.pow(2).sum(), hx[0], create_graph=True)
    (twice,) = torch.autograd.grad(dh0.sum(), hx[0])
    assert torch.equal(twice, torch.full_like(twice, 2))


def test_second_derivative_of_an_output_without_differentiable_inputs():
    """c after one step does not depend on w_hh if h0 is zero and only w_hh is trained."""
    module = here(lstm_ext.LSTM(3, 4, proj_size=2, **F64)).requires_grad_(False)
    module.weight_hr_l0.requires_grad_()
    x = here(torch.randn(1, 2, 3, **F64))
    c_n = module(x)[1][1]
    (first,) = torch.autograd.grad(c_n.sum(), module.weight_hr_l0, create_graph=True)
    assert first.abs().max() == 0


def test_second_derivative_under_autocast():
    module = here(lstm_ext.LSTM(3, 4))
    x = leaf(torch.randn(5, 2, 3))

    def second(inside):
        y = module(x)[0]
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=inside):
            return torch.autograd.grad(first.pow(2).sum(), x)[0]

    torch.testing.assert_close(second(True), second(False), **tol(torch.float32))


def test_saved_tensors_come_back_in_another_layout():
    module = here(lstm_ext.LSTM(3, 4, **F64))
    x = here(torch.randn(5, 2, 3, **F64))
    plain = torch.autograd.grad(module(x)[0].sum(), list(module.parameters()))

    def relaid(t):
        return t.T.contiguous().T if t.dim() == 2 else t

    with torch.autograd.graph.saved_tensors_hooks(relaid, lambda t: t):
        y = module(x)[0]
    for ours, theirs in zip(
        torch.autograd.grad(y.sum(), list(module.parameters())), plain, strict=True
    ):
        torch.testing.assert_close(ours, theirs, **tol(torch.float64))


@pytest.mark.cpu_only(reason="OpenMP threads")
def test_more_threads_than_blocks_of_few_sequences():
    """The dots' order of summation depends on the sequences at hand, never on the threads."""
    module = lstm_ext.LSTM(8, 256)
    x = torch.randn(4, 3, 8)
    results = []
    for threads in (1, 34):
        torch.set_num_threads(threads)
        with torch.no_grad():
            results.append(module(x)[0])
    assert torch.equal(*results)


@pytest.mark.cpu_only(reason="the core's workspace on the CPU")
def test_one_workspace_for_calls_of_any_size():
    """The kept buffer grows; a smaller call after a larger one, and under inference mode first."""
    cpu_products._kept.__dict__.clear()
    small, large = lstm_ext.LSTM(3, 4), lstm_ext.LSTM(30, 200)
    with torch.inference_mode():
        small(torch.randn(2, 1, 3))
    large(torch.randn(7, 40, 30))[0].sum().backward()
    kept = cpu_products._kept.buffer
    assert not kept.is_inference()
    y = small(torch.randn(2, 1, 3))[0]
    assert cpu_products._kept.buffer is kept
    y.sum().backward()
    assert small.weight_hh_l0.grad.isfinite().all()


def test_lazily_negated_tensors():
    """Input, states, weights and cotangents with torch's negative bit set."""
    module = here(lstm_ext.LSTM(3, 4, **F64))
    x, h0, c0 = (here(torch.randn(s, **F64)) for s in ((5, 2, 3), (1, 2, 4), (1, 2, 4)))
    cotangent = here(torch.randn(5, 2, 4, **F64))
    names = list(dict(module.named_parameters()))

    def run(flip):
        weights = {n: flip(p.detach()).requires_grad_() for n, p in module.named_parameters()}
        y = torch.func.functional_call(module, weights, (flip(x), (flip(h0), flip(c0))))[0]
        return [y, *torch.autograd.grad(y, [weights[n] for n in names], flip(cotangent))]

    lazy = run(lambda t: torch._neg_view(-t))
    for a, b in zip(lazy, run(lambda t: t), strict=True):
        torch.testing.assert_close(a.resolve_neg(), b, **tol(torch.float64))


@pytest.mark.cpu_only(reason="counts the bytes of the CPU's allocator")
def test_second_derivative_memory_is_linear_in_the_steps():
    """Bytes allocated by the second pass: twice the steps, about twice the bytes."""

    def allocated(steps):
        module = lstm_ext.LSTM(8, 8)
        x = torch.randn(steps, 4, 8, requires_grad=True)
        (first,) = torch.autograd.grad(module(x)[0].pow(2).sum(), x, create_graph=True)
        with torch.profiler.profile(profile_memory=True) as profile:
            first.pow(2).sum().backward()
        return sum(max(0, e.self_cpu_memory_usage) for e in profile.key_averages())

    assert allocated(80) < 2.5 * allocated(40)


@pytest.mark.parametrize(
    "made, name, value",
    [
        ({}, "num_layers", 3),
        ({}, "num_layers", 1),
        ({}, "num_layers", 0),
        ({}, "bias", False),
        ({"bias": False}, "bias", True),
        ({}, "bidirectional", True),
        ({"bidirectional": True}, "bidirectional", False),
        ({}, "proj_size", 2),
        ({"proj_size": 2}, "proj_size", 0),
        ({}, "peephole", True),
        ({"layer_norm": True}, "layer_norm", False),
    ],
)
def test_attributes_changed_after_construction(made, name, value):
    """nn.LSTM takes other weights in their place for some of these, or reports an invalid slice."""
    module, x = here(lstm_ext.LSTM(4, 4, 2, **made)), here(torch.randn(5, 2, 4))
    setattr(module, name, value)
    with pytest.raises(RuntimeError, match=f"got .*{name}={value}.*, expected what the module was"):
        module(x)


REFUSED = [
    ("zoneout", 2.0, ValueError, "range"),
    ("zoneout", (0.1,), ValueError, r"a pair \(h, c\), got \(0.1,\)"),
    ("recurrent_dropout", -0.1, ValueError, "recurrent_dropout should be a number in range"),
    ("weight_dropout", True, ValueError, "weight_dropout should be a number in range"),
    ("peephole", 1, TypeError, "peephole should be of type bool"),
    ("bidirectional", None, TypeError, "bidirectional should be of type bool"),
    ("merge_mode", "max", ValueError, "merge_mode should be one of"),
    ("merge_mode", "sum", ValueError, "needs two directions"),
    ("return_cell_sequence", 1, TypeError, "return_cell_sequence should be of type bool"),
    ("checkpoint_every", 0, ValueError, "should be at least 1, got 0"),
]


@pytest.mark.parametrize(
    "make, name, value, error, text",
    [
        (make, *refused)
        for make in (lstm_ext.LSTM, lstm_ext.LSTMCell)
        for refused in REFUSED
        if hasattr(make, refused[0])
    ],
)
def test_attributes_set_to_what_the_constructor_refuses(make, name, value, error, text):
    module = make(3, 4)
    before = getattr(module, name)
    with pytest.raises(error, match=text):
        setattr(module, name, value)
    assert getattr(module, name) == before


@pytest.mark.parametrize("name", ["lengths", "reset_mask"])
def test_lengths_and_mask_without_values(name):
    meta = {"lengths": torch.zeros(2, dtype=torch.int64), "reset_mask": torch.zeros(5, 2).bool()}
    module, x = here(lstm_ext.LSTM(3, 4)), here(torch.randn(5, 2, 3))
    with pytest.raises(ValueError, match=f"{name}: expected a tensor with values, got one on the"):
        module(x, **{name: meta[name].to("meta")})


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_sparse_tensors_are_refused(layout):
    cell, x = here(lstm_ext.LSTMCell(3, 4)), here(torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="Expected input to be dense, got torch.sparse_"):
        cell(x.to_sparse(layout=layout))
    states = tuple(here(torch.zeros(2, 4)).to_sparse(layout=layout) for _ in range(2))
    with pytest.raises(RuntimeError, match="Expected h0 to be dense, got torch.sparse_"):
        cell(x, states)


REFUSED = ["input", "nested input", "lengths", "nested lengths", "reset_mask"]


@pytest.mark.parametrize("name", REFUSED)
def test_sparse_and_nested_tensors_are_refused_by_a_layer(name):
    x, options = here(torch.ones(5, 2, 3)), {}
    if name == "input":
        x = x.to_sparse()
    elif name == "nested input":
        x = torch.nested.nested_tensor([x[:, 0], x[:3, 0]])
    elif name == "nested lengths":
        options = {"lengths": torch.nested.nested_tensor([torch.tensor([5])] * 2)}
    else:
        sparse = torch.ones(2).long() if name == "lengths" else torch.ones(5, 2).bool()
        options = {name: here(sparse).to_sparse()}
    for module in (lstm_ext.LSTM(3, 4), lstm_ext.LSTM(3, 4, 2, layer_norm=True)):
        with pytest.raises(RuntimeError, match=f"Expected {name.split()[-1]} to be dense, got "):
            here(module)(x, **options)


def test_attributes_in_any_order():
    made = lstm_ext.LSTM(3, 4, bidirectional=True, merge_mode="sum", forget_bias=1.0)
    copy = lstm_ext.LSTM.__new__(lstm_ext.LSTM)
    torch.nn.Module.__init__(copy)
    for name, value in sorted(made.__dict__.items(), reverse=True):
        setattr(copy, name, value)
    x = torch.randn(5, 2, 3)
    assert torch.equal(copy(x)[0], made(x)[0])


def test_variants_may_be_changed():
    module = lstm_ext.LSTM(3, 4, bidirectional=True)
    module.zoneout, module.merge_mode = [0.5, 1], "ave"
    same = lstm_ext.LSTM(3, 4, bidirectional=True, zoneout=(0.5, 1), merge_mode="ave")
    same.load_state_dict(module.state_dict())
    x = here(torch.randn(5, 2, 3))
    module, same = here(module.eval()), here(same.eval())
    assert repr(module) == repr(same) and torch.equal(module(x)[0], same(x)[0])


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(
    "change",
    ["half", "double", "narrow", "half_hook", "double_hook", "short_hook", "negated_hook"],
)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_what_is_saved_for_backward_replaced(change, bidirectional, layer_norm):
    """The core reads by address: of another size or dtype it would read memory of others."""
    module = here(lstm_ext.LSTM(48, 64, bidirectional=bidirectional, layer_norm=layer_norm))
    changed = {
        "half_hook": torch.Tensor.half,
        "double_hook": torch.Tensor.double,
        "short_hook": lambda t: t[:1],
        "negated_hook": lambda t: torch._neg_view(-t) if t.is_floating_point() else t,
    }
    pack = changed.get(change, lambda t: t)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, _ = module(leaf(torch.randn(9, 3, 48)))
        loss = y.mul(2).sum()
    if change in ("half", "double"):
        getattr(module, change)()
    elif change == "narrow":
        module.weight_hh_l0.data = module.weight_hh_l0.data[:, :1].contiguous()
    with pytest.raises((RuntimeError, ValueError), match="Expected"):
        loss.backward()


CHANGES = {
    "half": torch.Tensor.half,
    "double": torch.Tensor.double,
    "short": lambda t: t[:1],
    "negated": lambda t: torch._neg_view(-t),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_convolutional_layer_saves_replaced(change):
    module = here(lstm_ext.ConvLSTM2d(4, 8, 3, peephole=True))
    x = leaf(torch.randn(5, 2, 4, 6, 6))
    with torch.autograd.graph.saved_tensors_hooks(CHANGES[change], lambda t: t):
        y, _ = module(x)
    with pytest.raises(RuntimeError, match="Expected a result saved for backward"):
        y.sum().backward()


def test_what_a_convolutional_layer_saves_may_lie_otherwise():
    module = here(lstm_ext.ConvLSTM2d(4, 8, 3, peephole=True))
    x = leaf(torch.randn(5, 2, 4, 6, 6))
    inputs = [x, *module.parameters()]
    expected = torch.autograd.grad(module(x)[0].sum(), inputs)
    strided = lambda t: torch.stack([t, t + 1], -1)[..., 0]  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, strided):
        y, _ = module(x)
        found = torch.autograd.grad(y.sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tol(torch.float32))


def test_a_weight_of_a_convolutional_layer_changed_before_backward():
    module = here(lstm_ext.ConvLSTM2d(4, 8, 3, peephole=True))
    y, _ = module(here(torch.randn(5, 2, 4, 6, 6)))
    module.weight_ch_l0.data = module.weight_ch_l0.data[:5].clone()
    with pytest.raises(RuntimeError, match="Expected a result saved for backward"):
        y.sum().backward()


@pytest.mark.cpu_only(reason="no layer runs")
def test_a_second_import_says_what_it_is(tmp_path):
    program = "import sys, lstm_ext\n"
    program += "for name in [n for n in sys.modules if n.startswith('lstm_ext')]:\n"
    program += "    del sys.modules[name]\nimport lstm_ext"
    done = run("-c", program, cwd=tmp_path)
    assert "ImportError: lstm_ext was imported before in this process" in done.stderr


@pytest.mark.cpu_only(reason="no layer runs")
def test_the_import_brings_no_compiler(tmp_path):
    """torch._dynamo takes some seconds, and 70 MB."""
    program = "import sys, lstm_ext; sys.exit('torch._dynamo' in sys.modules)"
    assert run("-c", program, cwd=tmp_path).returncode == 0
