"""lstm_ext.LSTM keeps nn.LSTM's contract: the same call gives the same result or the same error.

Every error is compared with the one nn.LSTM raises for the same call; where we differ on purpose
the case is in a list of its own that says why.
"""

import itertools
import warnings

import pytest
import torch
from device import DEVICE, here, without_cudnn
from tolerances import tol
from torch import nn
from torch.testing import assert_close

import lstm_ext

TOL = tol(torch.float64)
BITS = {"rtol": 0, "atol": 0}


def pair(*args, **kwargs):
    """An nn.LSTM in fp64 and the lstm_ext.LSTM that shares its parameters."""
    theirs = here(nn.LSTM(*args, **kwargs, dtype=torch.float64))
    return theirs, lstm_ext.LSTM.from_torch(theirs)


def randn(*shape):
    return here(torch.randn(*shape, dtype=torch.float64))


def states(module, *batch):
    count = module.num_layers * (1 + module.bidirectional)
    h0 = randn(count, *batch, module.proj_size or module.hidden_size)
    return h0, randn(count, *batch, module.hidden_size)


def outcome(call):
    """(error type, text) of a call, or (None, result), and the warnings it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            got = None, call()
        except Exception as error:
            got = type(error), str(error)
    return got, [(w.category, str(w.message)) for w in caught]


def outcome_here(module, *args):
    """outcome of an lstm_ext module's call, on the device; its error told as if on the CPU."""
    kind, got = outcome(lambda: here(module)(*here(args)))[0]
    return kind, got.replace(str(DEVICE), "cpu") if kind else got


# --- constructor ---------------------------------------------------------------------------------

BAD_CONSTRUCTIONS = [
    ((3, 4), {"dropout": 1.5}),
    ((3, 4), {"dropout": -0.1}),
    ((3, 4), {"dropout": True}),
    ((3, 4), {"dropout": "much"}),
    ((3, 4), {"dropout": None}),
    ((3, 4), {"bias": 1}),
    ((3, 4), {"bias": None}),
    ((3, 4), {"batch_first": 1}),
    ((3.0, 4), {}),
    ((3, 4.0), {}),
    ((0, 4), {}),
    ((3, 0), {}),
    ((-3, 4), {}),
    ((3, 4), {"num_layers": 0}),
    ((3, 4), {"num_layers": 1.5}),
    ((3, 4), {"proj_size": -1}),
    ((3, 4), {"proj_size": 4}),
    ((3, 4), {"proj_size": 5}),
    ((3, 4), {"dtype": torch.int64}),
    ((3, 4), {"device": "nowhere"}),
]


@pytest.mark.parametrize("args, kwargs", BAD_CONSTRUCTIONS)
def test_constructor_errors(args, kwargs):
    expected, _ = outcome(lambda: nn.LSTM(*args, **kwargs))
    assert expected[0] is not None
    got, _ = outcome(lambda: lstm_ext.LSTM(*args, **kwargs))
    assert got == expected


def test_constructor_needs_its_sizes_and_knows_its_keywords():
    for args, kwargs in [((), {}), ((3,), {}), ((3, 4), {"layers": 2}), ((3, 4) + (1,) * 9, {})]:
        for cls in (nn.LSTM, lstm_ext.LSTM):
            with pytest.raises(TypeError):
                cls(*args, **kwargs)
    with pytest.raises(TypeError, match="return_cell_sequence should be of type bool, got: int"):
        lstm_ext.LSTM(3, 4, return_cell_sequence=1)


def test_dropout_with_one_layer_warns_at_the_callers_line():
    expected, got = (outcome(lambda c=c: c(3, 4, dropout=0.5))[1] for c in (nn.LSTM, lstm_ext.LSTM))
    assert len(got) == 1
    assert got == expected


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_layers": 3, "bias": False},
        {"batch_first": True, "dropout": 0.25, "num_layers": 2},
        {"bidirectional": True, "proj_size": 2, "num_layers": 2},
    ],
)
def test_same_seed_gives_the_same_module(kwargs):
    torch.manual_seed(3)
    theirs = nn.LSTM(3, 4, **kwargs)
    torch.manual_seed(3)
    ours = lstm_ext.LSTM(3, 4, **kwargs)
    assert repr(ours) == repr(theirs)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert_close(ours.state_dict(), theirs.state_dict(), **BITS)
    torch.manual_seed(4)
    theirs.reset_parameters()
    torch.manual_seed(4)
    ours.reset_parameters()
    assert_close(ours.state_dict(), theirs.state_dict(), **BITS)
    public = {k for k in vars(theirs) if not k.startswith("_")}
    assert {k: getattr(ours, k) for k in public} == {k: getattr(theirs, k) for k in public}


def test_positional_arguments_device_and_dtype():
    args = (3, 4, 2, False, True, 0.5, True, 2, "meta", torch.bfloat16)
    theirs, ours = nn.LSTM(*args), lstm_ext.LSTM(*args)
    assert repr(ours) == repr(theirs)
    described = [(n, p.shape, p.dtype, p.device) for n, p in ours.named_parameters()]
    assert described == [(n, p.shape, p.dtype, p.device) for n, p in theirs.named_parameters()]


def test_repr_names_return_cell_sequence():
    module = lstm_ext.LSTM(3, 4, return_cell_sequence=True)
    assert repr(module) == "LSTM(3, 4, return_cell_sequence=True)"


# --- forward: errors -----------------------------------------------------------------------------

H = torch.zeros(2, 2, 4)  # right for nn.LSTM(3, 4, 2) and a batch of two
X = torch.zeros(5, 2, 3)

BAD_CALLS = {
    "no tensor": ([1.0],),
    "None": (None,),
    "1-D": (X[0, 0],),
    "4-D": (X[None],),
    "features": (torch.zeros(5, 2, 7),),
    "features, unbatched": (torch.zeros(5, 7),),
    "dtype": (X.double(),),
    "integers": (X.long(),),
    "dtype before features": (torch.zeros(5, 2, 7).double(),),
    "features before states": (torch.zeros(5, 2, 7), (H[:1], H)),
    "unbatched, 3-D states": (X[:, 0], (H, H)),
    "batched, 2-D states": (X, (H[0], H[0])),
    "batched, one 2-D state": (X, (H, H[0])),
    "rank of states before dtype": (X.double(), (H, H[0])),
    "layers of h": (X, (H[:1], H)),
    "layers of c": (X, (H, H[:1])),
    "batch of h": (X, (H[:, :1], H)),
    "hidden size of c": (X, (H, torch.zeros(2, 2, 5))),
    "unbatched, layers of h": (X[:, 0], (H[:1, 0], H[:, 0])),
    "three states": (X, (H, H, H)),
    "device of the weights": (X.to("meta"),),
    "device of h before weights": (X.to("meta"), (H, H)),
    "device of h": (X, (H.to("meta"), H)),
    "device of c": (X, (H, H.to("meta"))),
}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", BAD_CALLS)
def test_forward_errors(name, batch_first):
    args = BAD_CALLS[name]
    if batch_first and isinstance(args[0], torch.Tensor) and args[0].dim() == 3:
        args = (args[0].transpose(0, 1), *args[1:])
    theirs = nn.LSTM(3, 4, 2, batch_first=batch_first)
    ours = lstm_ext.LSTM.from_torch(theirs)
    expected, _ = outcome(lambda: theirs(*args))
    assert expected[0] is not None
    assert outcome_here(ours, *args) == expected


def test_forward_errors_of_projections():
    h, c = torch.zeros(1, 2, 2), torch.zeros(1, 2, 4)
    theirs = nn.LSTM(3, 4, proj_size=2)
    ours = lstm_ext.LSTM.from_torch(theirs)
    for hx in ((c, c), (h, h), (c, h)):
        expected, _ = outcome(lambda hx=hx: theirs(X, hx))
        assert expected[0] is RuntimeError
        assert outcome_here(ours, X, hx) == expected
        theirs.cpu()  # shares its parameters with ours


# (what nn.LSTM does, what we do instead, the call, why)
DIFFERENCES = [
    # A tensor has two halves too; nn.LSTM then complains of their number of dimensions.
    (RuntimeError, (TypeError, "hx should be a pair of Tensors"), (X, H)),
    (IndexError, (RuntimeError, "lstm expects two hidden states"), (X, (H,))),
    (AttributeError, (TypeError, r"of \['NoneType', 'NoneType'\]"), (X, (None, None))),
    # nn.LSTM says "get_mkldnn_dtype: unsupported data type".
    (RuntimeError, (RuntimeError, "found input tensor with torch.float32 and hidden tensor with "
                    "torch.float64"), (X, (H.double(), H.double()))),
    (RuntimeError, (RuntimeError, "found input tensor with torch.float32 and hidden tensor with "
                    "torch.float64"), (X, (H, H.double()))),
]  # fmt: skip


@pytest.mark.parametrize("theirs_raises, ours, args", DIFFERENCES)
def test_forward_errors_that_differ_on_purpose(theirs_raises, ours, args):
    theirs = nn.LSTM(3, 4, 2)
    assert outcome(lambda: theirs(*args))[0][0] is theirs_raises
    with pytest.raises(ours[0], match=ours[1]):
        here(lstm_ext.LSTM.from_torch(theirs))(*here(args))


def test_a_weight_of_another_shape_is_refused():
    """nn.LSTM reads past its memory on the CPU: it gives a result."""
    ours = here(lstm_ext.LSTM(3, 4, 2))
    x = here(X)
    for name, shape in [("weight_hh_l1", (16, 5)), ("weight_ih_l0", (16, 4)), ("bias_hh_l0", (4,)),
                        ("weight_hh_l0", (12, 4))]:  # fmt: skip
        kept = getattr(ours, name)
        setattr(ours, name, nn.Parameter(here(torch.zeros(shape))))
        with pytest.raises((RuntimeError, ValueError)):
            ours(x)
        setattr(ours, name, kept)
    ours(x)


@pytest.mark.parametrize("name", ["weight_hh_l1", "bias_ih_l0", "weight_ih_l1"])
def test_a_weight_of_another_dtype_or_device_is_refused(name):
    theirs = nn.LSTM(3, 4, 2)
    kept = getattr(theirs, name).detach()
    setattr(theirs, name, nn.Parameter(kept.to("meta")))
    expected, _ = outcome(lambda: theirs(X))
    assert expected[0] is RuntimeError
    ours = here(lstm_ext.LSTM(3, 4, 2))
    setattr(ours, name, nn.Parameter(kept.to("meta")))
    assert outcome_here(ours.forward, X) == expected
    # What nn.LSTM says on the CPU, "get_mkldnn_dtype: unsupported data type", names nothing.
    setattr(ours, name, nn.Parameter(here(kept.double())))
    with pytest.raises(RuntimeError, match="torch.float32 and parameter tensor with torch.float64"):
        ours(here(X))


def test_a_missing_weight_is_refused():
    ours, x = here(lstm_ext.LSTM(3, 4, 2)), here(X)
    ours.bias_hh_l1 = None
    with pytest.raises(TypeError, match="bias_hh_l1: expected a Tensor, got NoneType"):
        ours(x)
    del ours.bias_hh_l1
    with pytest.raises(AttributeError, match="bias_hh_l1"):
        ours(x)


# --- forward: layouts ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layers, bidirectional, batch_first, with_hx, batched",
    list(itertools.product([1, 2], [False, True], [False, True], [False, True], [False, True])),
)
def test_layouts_and_gradients(layers, bidirectional, batch_first, with_hx, batched):
    proj = 2 if with_hx == batched else 0
    theirs, ours = pair(3, 4, layers, True, batch_first, 0.0, bidirectional, proj)
    x = randn(5, 2, 3) if batched else randn(5, 3)
    batch = ((5 if batch_first else 2),) if batched else ()
    hx = [s.requires_grad_() for s in states(theirs, *batch)] if with_hx else None
    x.requires_grad_()
    results = []
    for module in (theirs, ours):
        y, (h_n, c_n) = module(x, hx)
        inputs = [x, *module.parameters(), *(hx or ())]
        torch.manual_seed(1)
        cotangents = [randn(*t.shape) for t in (y, h_n, c_n)]
        results.append((y, h_n, c_n, torch.autograd.grad([y, h_n, c_n], inputs, cotangents)))
    assert_close(results[1], results[0], **TOL)
    assert results[1][0].is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"proj_size": 2}, {"num_layers": 2, "batch_first": True}, {"peephole": True}],
    ids=str,
)
def test_states_may_be_detached_in_place(kwargs, dtype):
    """On their way to the next part of a sequence, as nn.LSTM's."""
    module, hx = here(lstm_ext.LSTM(3, 4, dtype=dtype, **kwargs)), None
    for _ in range(2):
        y, hx = module(here(X).to(dtype), hx)
        y.sum().backward()
        for state in hx:
            assert state.requires_grad
            state.detach_()


def test_backward_in_eval_mode():
    theirs, ours = pair(3, 4, 2, dropout=0.5)
    x = randn(5, 2, 3).requires_grad_()
    grads = []
    for module in (theirs.eval(), ours.eval()):
        with without_cudnn():
            y, _ = module(x)
            grads.append(torch.autograd.grad(y.square().sum(), [x, *module.parameters()]))
    assert_close(grads[1], grads[0], **TOL)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"num_layers": 2, "bidirectional": True, "proj_size": 2}])
def test_no_steps_returns_the_initial_state(kwargs, batch_first):
    ours = here(lstm_ext.LSTM(3, 4, batch_first=batch_first, return_cell_sequence=True, **kwargs))
    shape = (2, 0) if batch_first else (0, 2)
    features = ours.proj_size or 4
    d = 1 + ours.bidirectional
    count = d * ours.num_layers
    hx = here((torch.randn(count, 2, features), torch.randn(count, 2, 4)))
    y, hn, cells = ours(here(torch.zeros(*shape, 3)), hx)
    assert y.shape == (*shape, d * features)
    assert cells.shape == (*shape, d * 4)
    assert_close(hn, hx, **BITS)
    y, hn, _ = ours(here(torch.zeros(0, 3)))
    assert y.shape == (0, d * features)
    assert hn[0].shape == (d * ours.num_layers, features)
    assert not hn[0].any() and not hn[1].any()


@pytest.mark.parametrize("with_hx", [False, True])
def test_no_sequences(with_hx):
    theirs, ours = pair(3, 4, 2, bidirectional=True, proj_size=2)
    x, hx = randn(5, 0, 3), states(theirs, 0) if with_hx else None
    got = ours(x, hx)
    if DEVICE.type == "cuda":  # cuDNN takes no empty batch
        theirs, x, hx = theirs.cpu(), x.cpu(), hx and tuple(s.cpu() for s in hx)
    assert_close(got, theirs(x, hx), check_device=False, **BITS)


# --- dropout -------------------------------------------------------------------------------------


@pytest.mark.cpu_only(reason="cuDNN draws other dropout masks")
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"bidirectional": True, "proj_size": 2}])
def test_dropout_draws_nn_lstms_masks(kwargs, batch_first):
    """On the CPU the same seed gives the same masks, so training runs can be compared."""
    theirs, ours = pair(3, 4, 3, dropout=0.4, batch_first=batch_first, **kwargs)
    x = randn(6, 5, 3)
    results = []
    for module in (theirs, ours):
        torch.manual_seed(7)
        results.append((*module(x), torch.get_rng_state()))
    assert_close(results[1], results[0], **TOL)
    again = ours(x)[0]
    assert not torch.equal(again, results[1][0])
    assert torch.equal(ours.eval()(x)[0], ours(x)[0])
    assert_close(ours(x), theirs.eval()(x), **TOL)


def test_dropout_of_one_spares_the_last_layer():
    theirs, ours = pair(3, 4, 2, dropout=1.0)
    x = randn(5, 2, 3)
    assert_close(ours(x), theirs(x), **TOL)
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        theirs, ours = pair(3, 4, dropout=1.0)
    assert_close(ours(x), theirs(x), **TOL)


def test_autocast_gives_the_autocast_dtype_like_nn_lstm():
    theirs = here(nn.LSTM(3, 4, 2))
    ours = lstm_ext.LSTM.from_torch(theirs)
    # nn.LSTM asks oneDNN under autocast, which has no bfloat16 on every processor.
    both = DEVICE.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for args in here([(X,), (X.bfloat16(), (H, H)), (X, (H.bfloat16(), H))]):
        for module in (ours, theirs) if both else (ours,):
            with torch.autocast(DEVICE.type, torch.bfloat16):
                y, s = module(*args)
            assert [t.dtype for t in (y, *s)] == [torch.bfloat16] * 3


@pytest.mark.parametrize("kwargs", [{}, {"num_layers": 2, "bidirectional": True, "proj_size": 2}])
def test_meta_tensors_give_shapes(kwargs):
    shapes = []
    for cls in (nn.LSTM, lstm_ext.LSTM):
        y, (h_n, c_n) = cls(3, 4, device="meta", **kwargs)(X.to("meta"))
        shapes.append([(t.shape, t.dtype, t.device) for t in (y, h_n, c_n)])
    assert shapes[1] == shapes[0]


def test_a_class_mixed_in_behind_sees_attributes():
    """As pyro's PyroModule, which takes what nn.Module refuses as a parameter."""

    class Mixin(nn.Module):
        def __setattr__(self, name, value):
            if callable(value) and not isinstance(value, nn.Parameter):
                name, value = "drawn", (name, value)
            super().__setattr__(name, value)

    for cls in (nn.LSTM, lstm_ext.LSTM):
        module = here(type("Mixed", (cls, Mixin), {})(3, 4))
        module.weight_ih_l0 = abs
        assert module.drawn == ("weight_ih_l0", abs)
    assert isinstance(module.weight_ih_l0, nn.Parameter)
    assert module(here(torch.randn(5, 2, 3)))[0].shape == (5, 2, 4)
