"""ConvLSTMs in a graph, where a layer is one operator: torch.compile, torch.export, make_fx."""

import importlib

import device
import pytest
import torch
from device import here, leaf
from test_conv_lstm import CELLS, F64, IN, SEQUENCES, SIZES, C, L, N, _near
from tolerances import tol
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import lstm_ext

FORWARD, BACKWARD = (
    getattr(torch.ops.lstm_ext, name).default
    for name in ("conv_lstm_layer", "conv_lstm_layer_backward")
)


@pytest.fixture(autouse=True)
def _no_earlier_graphs():
    torch._dynamo.reset()


def _close(got, expected):
    torch.testing.assert_close(got, expected, **tol(expected.dtype))


def _bits(got, expected):
    """Equal; but cuDNN adds in any order."""
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        if device.DEVICE.type == "cpu":
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        else:
            _near(a, b)


def _calls(graph):
    return [node.target for node in graph.graph.nodes if node.target in (FORWARD, BACKWARD)]


def _both(module, x, *args, **kwargs):
    """Its results, and the gradients of x and the parameters."""
    results = tree_leaves(module(x, *args, **kwargs))
    loss = sum(r.float().square().sum() for r in results)
    return [*results, *torch.autograd.grad(loss, [x, *module.parameters()])]


def _lengths(T, n):
    return here(torch.arange(n) * T // max(n - 1, 1))


# --- torch.compile --------------------------------------------------------------------------------

MODULES = {
    "1d": (1, {"dilation": 2, "bias": False}),
    "2d": (2, {"num_layers": 2, "peephole": True, "stride": 2}),
    "2d_valid": (2, {"padding": (0, 2)}),
    "2d_one_pixel": (2, {"kernel_size": 1, "hidden_channels": 1}),
    "3d": (3, {"batch_first": True}),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def _module(name, **options):
    dims, more = MODULES[name]
    given = {"in_channels": IN, "hidden_channels": C, "kernel_size": 3, **more, **options}
    return here(SEQUENCES[dims](**given)), dims


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_compiled_bits_for_any_steps(name, dtype):
    module, dims = _module(name, dtype=dtype)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    for T, n in ((8, 9), (10, 9), (12, 2), (40, 3)):  # first of no size that is another too
        shape = (n, T) if module.batch_first else (T, n)
        x = leaf(torch.randn(*shape, IN, *SIZES[dims], dtype=dtype))
        _bits(_both(compiled, x), _both(module, x))
        with torch.no_grad():
            _bits(compiled(x), module(x))
    assert counter.frame_count == 2  # with gradients and without


def test_compiled_for_any_size():
    """Whose "same" padding differs."""
    module, _ = _module("2d")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for T, n, size in ((4, 3, (6, 5)), (5, 2, (7, 8)), (9, 6, (12, 9)), (6, 4, (5, 14))):
        x = leaf(torch.randn(T, n, IN, *size))
        hx = tuple(
            here(torch.randn(2, n, C, *(-(-s // 2) for s in size))).requires_grad_() for _ in "hc"
        )
        _bits(_both(compiled, x, hx), _both(module, x, hx))
    assert counter.frame_count == 2


def test_compiled_lengths():
    module, _ = _module("2d")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    for T, n in ((4, 3), (7, 5), (12, 2)):
        x = torch.randn(T, n, IN, 6, 5)
        x[-1, 0] = torch.nan  # the first is of no length
        x, lengths = leaf(x), _lengths(T, n)
        _bits(_both(compiled, x, lengths=lengths), _both(module, x, lengths=lengths))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dims", CELLS)
def test_compiled_cells(dims):
    cell = here(CELLS[dims](IN, C, 3, peephole=True))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(cell, fullgraph=True, backend=counter, dynamic=True)
    for n in (8, 3, 9):
        x = leaf(torch.randn(n, IN, *SIZES[dims]))
        states = tuple(here(torch.randn(n, C, *SIZES[dims])) for _ in "hc")
        for got, want in zip(_both(compiled, x, states), _both(cell, x, states), strict=True):
            # Weights' gradients are sums over up to 540 pixels, in another order.
            scale = max(1, want.abs().max().item())
            _close(got / scale, want / scale)
    assert counter.frame_count == 1
    program = export(cell, (x, states))
    assert not _calls(program.graph_module)  # torch's operations, which a compiler fuses


@pytest.mark.cpu_only(reason="compiles for the CPU")
@pytest.mark.parametrize("padding", ["same", 1])
def test_by_the_default_compiler(padding):
    """Which is to divide by sizes that strides have left."""
    module, _ = _module("2d", padding=padding)
    compiled = torch.compile(module, fullgraph=True)
    for T, n, size in ((4, 3, (6, 5)), (7, 2, (6, 5)), (5, 5, (9, 8))):
        x = leaf(torch.randn(T, n, IN, *size))
        _bits(_both(compiled, x), _both(module, x))


@pytest.mark.cpu_only(reason="compiles for the CPU")
def test_ahead_of_time(tmp_path):
    module, _ = _module("2d")
    x = torch.randn(L, N, IN, 6, 5)
    sizes = ({0: Dim("L", min=1, max=100), 1: Dim("N", min=1, max=50)},)
    with torch.no_grad():
        program = export(module, (x,), dynamic_shapes=sizes)
        path = torch._inductor.aoti_compile_and_package(program, package_path=f"{tmp_path}/x.pt2")
        run = torch._inductor.aoti_load_package(path)
        for given in (x, torch.randn(9, 2, IN, 6, 5)):
            _bits(run(given), module(given))


@pytest.mark.cpu_only(reason="CPU autocast")
def test_compiled_autocast():
    module, _ = _module("2d")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = leaf(torch.randn(L, N, IN, 6, 5))
    results = []
    for function in (compiled, module):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, _ = function(x)
        assert y.dtype == torch.bfloat16
        results.append([y, *torch.autograd.grad(y.sum(), [x, *module.parameters()])])
    _bits(*results)


def test_compiled_without_steps():
    module, _ = _module("2d")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = leaf(torch.randn(0, N, IN, 6, 5))
    hx = tuple(here(torch.randn(2, N, C, 3, 3)).requires_grad_() for _ in "hc")
    results = []
    for function in (compiled, module):
        y, states = function(x, hx)
        loss = y.sum() + sum(s.square().sum() for s in states)
        inputs = [x, *hx, *module.parameters()]
        made = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        results.append([y, *states, *made])
    _bits(*results)


TRANSFORMS = {
    "vmap": lambda run, x, _: torch.func.vmap(run, in_dims=1)(x.unsqueeze(2)),
    "grad": lambda run, x, _: torch.func.grad(lambda x: run(x).square().sum())(x),
    "jvp": lambda run, x, v: torch.func.jvp(run, (x,), (v,)),
    "second": lambda run, x, v: torch.func.grad(
        lambda x: (torch.func.grad(lambda x: run(x).square().sum())(x) * v).sum()
    )(x),
    "grads_each": lambda run, x, _: torch.func.vmap(
        torch.func.grad(lambda x: run(x.unsqueeze(1)).square().sum()), in_dims=1
    )(x),
}


@pytest.mark.parametrize("recorder", ["compile", "make_fx", "after"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name, recorder):
    """In a graph, and of an exported program."""
    module, _ = _module("2d", **F64)
    module.requires_grad_(False)
    transform = TRANSFORMS[name]
    x, v = (here(torch.randn(3, N, IN, 4, 4, **F64)) for _ in range(2))

    def run(x):
        return module(x)[0]

    def transformed(x, v):
        return transform(run, x, v)

    expected = transformed(x, v)
    if recorder == "compile":
        made = torch.compile(transformed, fullgraph=True, backend="aot_eager")(x, v)
    elif recorder == "make_fx":
        made = make_fx(transformed)(x, v)(x, v)
    else:
        one = name in ("vmap", "grads_each")
        program = export(module, (x[:, :1] if one else x,)).module()
        made = transform(lambda x: program(x)[0], x, v)
    for got, want in zip(tree_leaves(made), tree_leaves(expected), strict=True):
        _close(got, want)


def test_a_vmap_over_weights_of_an_exported_layer():
    module, _ = _module("2d", num_layers=1, **F64)
    x = here(torch.randn(3, N, IN, 4, 4, **F64))
    program = export(module, (x,), strict=False).module()
    weights = [{k: p.detach() * scale for k, p in module.named_parameters()} for scale in (1, 2)]
    stacked = {k: torch.stack([w[k] for w in weights]) for k in weights[0]}

    def run(function, p):
        def loss(p):
            y, (_, c) = functional_call(function, p, (x,))
            return (y.square().sum() + c.sum()), y

        return torch.func.grad(loss, has_aux=True)(p)

    made, y = torch.func.vmap(lambda p: run(program, p))(stacked)
    for k, p in enumerate(weights):
        expected, want = run(module, p)
        _close(y[k], want)
        for name, gradient in expected.items():
            _close(made[name][k], gradient)


# --- torch.export and make_fx ---------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_export_with_any_steps_and_batch(strict, training, tmp_path):
    module, _ = _module("2d")
    x = here(torch.randn(L, N, IN, 6, 5))
    with torch.set_grad_enabled(training):
        program = export(module, (x,), dynamic_shapes=({0: Dim("L"), 1: Dim("N")},), strict=strict)
    assert _calls(program.graph_module) == [FORWARD] * 2
    torch.export.save(program, tmp_path / "frames.pt2")
    run = torch.export.load(tmp_path / "frames.pt2").module()
    for T, n in ((L, N), (9, 2), (1, 1), (30, 5)):
        x = leaf(torch.randn(T, n, IN, 6, 5))
        _bits(run(x), module(x))
        if training:
            _bits(_both(run, x)[3:], _both(module, x)[3:])


def test_export_with_lengths_and_any_size():
    module, _ = _module("2d")
    x = here(torch.randn(L, N, IN, 6, 5))
    auto = Dim.AUTO
    sizes = {"input": {0: auto, 1: auto, 3: auto, 4: auto}, "lengths": {0: auto}}
    given = {"lengths": _lengths(L, N)}
    program = export(module, (x,), given, dynamic_shapes=sizes)
    assert _calls(program.graph_module) == [FORWARD] * 2
    run = program.module()
    for T, n, size in ((L, N, (6, 5)), (9, 2, (7, 8)), (30, 5, (12, 3))):
        x, lengths = here(torch.randn(T, n, IN, *size)), _lengths(T, n)
        _bits(run(x, lengths=lengths), module(x, lengths=lengths))


def test_make_fx_records_both_passes():
    module, _ = _module("2d")
    parameters = {k: p.detach() for k, p in module.named_parameters()}

    def step(parameters, x):
        parameters = {k: p.requires_grad_() for k, p in parameters.items()}
        y, _ = functional_call(module, parameters, (x,))
        return y, *torch.autograd.grad(y.square().sum(), list(parameters.values()))

    def copies():
        return {k: p.clone() for k, p in parameters.items()}

    graph = make_fx(step, tracing_mode="symbolic")(copies(), here(torch.randn(9, 7, IN, 6, 8)))
    assert _calls(graph) == [FORWARD] * 2 + [BACKWARD] * 2
    for T, n, size in ((9, 7, (6, 8)), (7, 2, (9, 10))):
        x = here(torch.randn(T, n, IN, *size))
        _bits(graph(copies(), x), step(copies(), x))


@pytest.mark.parametrize("way", ["export", "make_fx", "recorded"])
def test_second_derivatives(way):
    """Of an exported program, of a graph that holds the backward's operator, and in a graph."""
    module, _ = _module("2d", **F64)
    module.requires_grad_(False)
    x = leaf(torch.randn(3, N, IN, 4, 4, **F64))

    def slope(x, function=module, create_graph=True):
        y, (h, _) = function(x)
        loss = y.square().sum() + h.sum()
        return torch.autograd.grad(loss, x, create_graph=create_graph)[0]

    def second(x, slope=slope):
        return torch.autograd.grad(slope(x).square().sum(), x)[0]

    if way == "export":
        program = export(module, (x,), strict=False).module()
        made = second(x, lambda x: slope(x, program))
    elif way == "make_fx":
        graph = make_fx(lambda x: slope(x, create_graph=False))(x)
        assert _calls(graph) == [FORWARD] * 2 + [BACKWARD] * 2
        made = second(x, graph)
    else:
        made = make_fx(lambda x: second(x))(x)(x)
    _close(made, second(x))


def test_forward_mode_of_an_exported_program():
    module, _ = _module("2d", **F64)
    x, v = (here(torch.randn(3, N, IN, 4, 4, **F64)) for _ in range(2))
    program = export(module, (x,)).module()
    tangents = []
    for run in (program, module):
        with torch.autograd.forward_ad.dual_level():
            y, (_, c) = run(torch.autograd.forward_ad.make_dual(x, v))
            tangents.append([torch.autograd.forward_ad.unpack_dual(t).tangent for t in (y, c)])
    for got, want in zip(*tangents, strict=True):
        _close(got, want)


def test_transforms_of_a_recorded_derivative():
    """vmap, and an error for the others."""
    module, _ = _module("2d", **F64)
    module.requires_grad_(False)
    x, v = (here(torch.randn(3, N, IN, 4, 4, **F64)) for _ in range(2))

    def slope(x):
        return torch.autograd.grad(module(x)[0].square().sum(), x)[0]

    graph = make_fx(slope)(x.clone().requires_grad_())
    both = torch.stack([x, v])
    expected = torch.stack([slope(t.clone().requires_grad_()) for t in both])
    _close(torch.func.vmap(graph)(both), expected)
    with pytest.raises(RuntimeError, match="a first derivative only, got Jvp"):
        torch.func.jvp(graph, (x,), (v,))
    with pytest.raises(RuntimeError, match="a first derivative only, got Grad"):
        torch.func.grad(lambda x: graph(x).sum())(x)


def test_torchs_onnx_export_sees_torchs_operations(monkeypatch):
    module, x = lstm_ext.ConvLSTM2d(IN, C, 3), torch.randn(L, N, IN, 6, 5)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    program = export(module, (x,), strict=False)
    assert not _calls(program.graph_module)
    _close(program.module()(x)[0], module(x)[0])


@pytest.mark.cpu_only(reason="a graph holds no device")
def test_onnx_of_a_module(tmp_path):
    """Plain nodes for a fixed number of steps."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    onnx = importlib.import_module("lstm_ext.onnx")
    module, x = lstm_ext.ConvLSTM2d(IN, C, 3, 2, peephole=True), torch.randn(L, N, IN, 6, 5)
    onnx.export(module.eval(), (x,), tmp_path / "m.onnx", verbose=False)
    session = runtime.InferenceSession(tmp_path / "m.onnx")
    made = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for got, want in zip(made, tree_leaves(module(x)), strict=True):
        _close(torch.from_numpy(got), want)


def test_a_jacobian_by_torchs_own_vmap():
    module = here(lstm_ext.ConvLSTM1d(IN, C, 3, **F64))
    x = here(torch.randn(2, 1, IN, 4, **F64))
    program = export(module, (x,), strict=False).module()
    found = torch.autograd.functional.jacobian(lambda x: program(x)[0], x, vectorize=True)
    _close(found, torch.autograd.functional.jacobian(lambda x: module(x)[0], x))


def test_on_meta_a_graph_is_of_torchs_operations():
    module = lstm_ext.ConvLSTM2d(IN, C, 3, device="meta")
    program = export(module, (torch.empty(L, N, IN, 6, 5, device="meta"),))
    assert not _calls(program.graph_module)
