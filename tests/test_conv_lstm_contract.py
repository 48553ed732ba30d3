"""ConvLSTM1d, 2d, 3d and their cells: parameters, repr and errors."""

import device
import pytest
import torch
from device import here
from tolerances import tol

import lstm_ext
from lstm_ext import pointwise

L, N, IN, C = 4, 3, 2, 5


def test_parameters_and_repr():
    module = lstm_ext.ConvLSTM2d(2, 3, (3, 5), 2, peephole=True, stride=2, padding=(1, 2))
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "weight_ih_l0": (12, 2, 3, 5),
        "weight_hh_l0": (12, 3, 3, 5),
        "bias_ih_l0": (12,),
        "bias_hh_l0": (12,),
        "weight_ch_l0": (9,),
        "weight_ih_l1": (12, 3, 3, 5),
        "weight_hh_l1": (12, 3, 3, 5),
        "bias_ih_l1": (12,),
        "bias_hh_l1": (12,),
        "weight_ch_l1": (9,),
    }
    bound = 1 / (3 * 15) ** 0.5
    for parameter in module.parameters():
        assert 0.5 * bound < parameter.abs().max() <= bound
    assert repr(module) == (
        "ConvLSTM2d(2, 3, kernel_size=(3, 5), num_layers=2, stride=(2, 2), padding=(1, 2), "
        "peephole=True)"
    )
    assert repr(lstm_ext.ConvLSTM1dCell(1, 2, 3)) == "ConvLSTM1dCell(1, 2, kernel_size=(3,))"


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"in_channels": 0}, ValueError, "in_channels must be an integer of at least 1, got 0"),
        ({"hidden_channels": 2.0}, ValueError, "hidden_channels must be .* got 2.0"),
        ({"num_layers": True}, ValueError, "num_layers must be .* got True"),
        ({"kernel_size": (3,)}, ValueError, r"kernel_size must be .* 2 of them, got \(3,\)"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be .* got 0"),
        ({"stride": (1, 0)}, ValueError, r"stride must be .* got \(1, 0\)"),
        ({"stride": None}, ValueError, "stride must be .* got None"),
        ({"padding": "full"}, ValueError, "padding must be .* got 'full'"),
        ({"padding": -1}, ValueError, "padding must be an integer of at least 0, .* got -1"),
        ({"bias": 1}, TypeError, "bias should be of type bool, got: int"),
        ({"peephole": 1}, TypeError, "peephole should be of type bool, got: int"),
        ({"batch_first": 1}, TypeError, "batch_first should be of type bool, got: int"),
    ],
)
def test_constructor_errors(change, error, message):
    options = {"in_channels": IN, "hidden_channels": C, "kernel_size": 3, **change}
    with pytest.raises(error, match=message):
        lstm_ext.ConvLSTM2d(**options)


def test_forward_errors():
    module = here(lstm_ext.ConvLSTM2d(IN, C, 3, padding="valid"))
    x = here(torch.randn(L, N, IN, 6, 5))
    state = here(torch.zeros(1, N, C, 4, 3))
    cases = [
        (RuntimeError, r"in_channels channels. Expected 2, got 1", (x[:, :, :1],), {}),
        (ValueError, "ConvLSTM2d: Expected input to be 4D or 5D, got 3D instead", (x[0, 0],), {}),
        (RuntimeError, r"too small for kernel size \(3, 3\)", (x[..., :2],), {}),
        (TypeError, r"^ConvLSTM2d: hx should be a pair .*, got Tensor", (x, state), {}),
        (
            RuntimeError,
            r"Expected hidden\[1\] size \(1, 3, 5, 4, 3\), got \[1, 3, 5, 4, 2\]",
            (x, (state, state[..., :2])),
            {},
        ),
        (RuntimeError, "^ConvLSTM2d expects two hidden states", (x, (state,)), {}),
        (
            TypeError,
            r"hx should be a pair .*, got tuple of \['Tensor', 'NoneType'\]",
            (x, (state, None)),
            {},
        ),
        (RuntimeError, "parameter tensors are not the same dtype", (x.double(),), {}),
        (RuntimeError, "hidden tensors are not the same dtype", (x, (state, state.double())), {}),
        (ValueError, "Expected lengths between 0 and", (x,), {"lengths": torch.tensor([1, 2, 5])}),
        (ValueError, r"Expected lengths of size \(3,\)", (x,), {"lengths": torch.tensor([1, 2])}),
    ]
    for error, message, arguments, options in cases:
        if "between" in message:
            options["lengths"] = options["lengths"].cpu()
        with pytest.raises(error, match=message):
            module(*arguments, **options)
    cell = here(lstm_ext.ConvLSTM2dCell(IN, C, 3))
    with pytest.raises(ValueError, match="ConvLSTM2dCell: Expected input to be 3D or 4D, got 5D"):
        cell(x)


@pytest.mark.parametrize("kind", ["", "Cell"])
def test_inputs_that_are_no_dense_tensors(kind):
    module = here(getattr(lstm_ext, f"ConvLSTM1d{kind}")(IN, C, 3))
    x, state = here(torch.randn(2, N, IN, 6)), here(torch.zeros(1, N, C, 6))
    if kind:
        x, state = x[0], state[0]
    packed = torch.nn.utils.rnn.pack_sequence([here(torch.randn(2, IN, 6))])
    # A cell has no lengths.
    of_packed = "PackedSequence$" if kind else "PackedSequence: .*for lengths="
    for wrong, words in ((packed, of_packed), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"Expected input to be a Tensor, got {words}"):
            module(wrong)
    with pytest.raises(RuntimeError, match="Expected input to be dense, got torch.sparse_coo"):
        module(x.to_sparse())
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] to be dense, got torch.sparse"):
        module(x, (state, state.to_sparse()))
    with pytest.raises(RuntimeError, match="Expected input to be dense, got a nested tensor"):
        module(torch.nested.nested_tensor([x[0], x[1]]))
    weight = f"weight_hh{'' if kind else '_l0'}"
    sparse = {weight: getattr(module, weight).detach().to_sparse()}
    with pytest.raises(RuntimeError, match=f"Expected {weight} to be dense, got torch.sparse"):
        torch.func.functional_call(module, sparse, x)


def test_the_constructor_names_no_private_class():
    with pytest.raises(TypeError, match=r"^ConvLSTM\.__init__\(\) missing .* 'kernel_size'"):
        lstm_ext.ConvLSTM2d(IN, C)


@pytest.mark.parametrize(
    "name, value, made",
    [
        ("in_channels", 1, "2"),
        ("hidden_channels", 1, "5"),
        ("num_layers", 1, "2"),
        ("num_layers", 3, "2"),
        ("bias", False, "True"),
        ("peephole", True, "False"),
        ("kernel_size", 5, r"\(3, 3\)"),
        ("stride", 2, r"\(1, 1\)"),
        ("padding", "full", "'same'"),
        ("dilation", 2, r"\(1, 1\)"),
    ],
)
def test_attributes_changed_after_construction(name, value, made):
    """Some would be ignored, others fail in odd words."""
    words = f"got {name}={value!r}, expected {name}={made} as .* cannot be changed afterwards"
    film = here(torch.randn(L, N, IN, 6, 6))
    for module, x in (
        (lstm_ext.ConvLSTM2d(IN, C, 3, 2), film),
        (lstm_ext.ConvLSTM2dCell(IN, C, 3), film[0]),
    ):
        if hasattr(module, "batch_first") or name != "num_layers":
            setattr(here(module), name, value)
            with pytest.raises(RuntimeError, match=words):
                module(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize("kind", ["", "Cell"])
def test_the_tracer_and_the_scripter_are_refused(kind):
    module = here(getattr(lstm_ext, f"ConvLSTM1d{kind}")(IN, C, 3))
    x = here(torch.randn(N, IN, 6) if kind else torch.randn(L, N, IN, 6))
    with pytest.raises(RuntimeError, match=r"cannot be traced by torch\.jit\.trace"):
        torch.jit.trace(module, x)
    with pytest.raises(RuntimeError, match=r"nor compiled by torch\.jit\.script"):
        torch.jit.script(torch.nn.Sequential(module))


@pytest.mark.cpu_only(reason="tells what a build without CUDA does")
def test_a_device_without_kernels_is_refused(monkeypatch):
    def refuse(device):
        raise RuntimeError("built for the CPU only")

    monkeypatch.setattr(pointwise.ops, "has_native_kernels", refuse)
    with pytest.raises(RuntimeError, match="built for the CPU only"):
        lstm_ext.ConvLSTM1d(1, 1, 1)(torch.zeros(1, 1, 1, 1))


@pytest.mark.parametrize(
    "name, size",
    [
        ("weight_ih_l0", (4 * C, IN, 3)),
        ("weight_hh_l0", (4 * C, C, 1, 1)),
        ("bias_ih_l0", (1,)),
        ("bias_hh_l1", (C,)),
        ("weight_ch_l0", (C,)),
        ("weight_ch_l1", (9 * C,)),
    ],
)
def test_parameters_of_a_wrong_size_are_refused(name, size):
    """A short peephole would be read past its end, a bias of one number broadcast."""
    module = here(lstm_ext.ConvLSTM2d(IN, C, 3, 2, peephole=True))
    setattr(module, name, torch.nn.Parameter(here(torch.zeros(size))))
    with pytest.raises(RuntimeError, match=f"Expected {name} of size .*, got "):
        module(here(torch.randn(L, N, IN, 6, 6)))
    setattr(module, name, None)
    with pytest.raises(TypeError, match=f"{name}: expected a Tensor, got NoneType"):
        module(here(torch.randn(L, N, IN, 6, 6)))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn], ids=str)
def test_dtypes_without_kernels_are_refused(dtype):
    module = here(lstm_ext.ConvLSTM1d(IN, C, 3)).to(dtype)
    with pytest.raises(TypeError, match="lstm_ext has no kernel for torch"):
        module(here(torch.zeros(L, N, IN, 6)).to(dtype))


@pytest.mark.parametrize("backend", ["aot_eager", "export"])
def test_lengths_in_a_graph_are_checked_when_it_runs(backend):
    module, x = here(lstm_ext.ConvLSTM1d(IN, C, 3)), here(torch.randn(L, N, IN, 6))
    right = here(torch.tensor([2, 0, 4]))
    if backend == "export":
        run = torch.export.export(module, (x,), {"lengths": right}).module()
    else:
        run = torch.compile(module, fullgraph=True, backend=backend)
    expected = module(x, lengths=right)[0]
    torch.testing.assert_close(run(x, lengths=right)[0], expected, **tol(torch.float32))
    if device.DEVICE.type == "cpu":
        for wrong in (L + 1, -1):
            with pytest.raises(RuntimeError, match="lengths: expected 0 to"):
                run(x, lengths=here(torch.tensor([2, wrong, 4])))


def test_states_of_another_size_are_named_as_they_were_given():
    cell, states = here(lstm_ext.ConvLSTM2dCell(IN, C, 3)), here(torch.zeros(1, C, 6, 6))
    with pytest.raises(RuntimeError, match=r"hidden\[0\] size \(5, 6, 6\), got \[1, 5, 6, 6\]"):
        cell(here(torch.zeros(IN, 6, 6)), (states, states))
    module, state = here(lstm_ext.ConvLSTM2d(IN, C, 3)), here(torch.zeros(()))
    with pytest.raises(RuntimeError, match=r"hidden\[0\] size \(1, 5, 6, 6\), got \[\]"):
        module(here(torch.zeros(L, IN, 6, 6)), (state, state))
