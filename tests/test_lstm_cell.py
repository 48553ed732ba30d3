"""lstm_ext.LSTMCell keeps nn.LSTMCell's contract."""

import copy
import pickle

import pytest
import torch
from device import DEVICE, here, leaf
from tolerances import tol
from torch import nn
from torch.testing import assert_close

import lstm_ext

TOL = tol(torch.float64)
BITS = {"rtol": 0, "atol": 0}
X, H = torch.zeros(2, 3), torch.zeros(2, 4)  # right for a cell of sizes 3, 4


def outcome(call):
    try:
        return None, call()
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("batch", [(), (1,), (5,), (0,)])
def test_equals_nn_lstm_cell(batch, with_hx, bias):
    theirs = here(nn.LSTMCell(3, 4, bias, dtype=torch.float64))
    ours = lstm_ext.LSTMCell.from_torch(theirs)
    x = leaf(torch.randn(*batch, 3, dtype=torch.float64))
    hx = [leaf(torch.randn(*batch, 4, dtype=torch.float64)) for _ in range(2)]
    inputs = [x, *theirs.parameters(), *(hx if with_hx else ())]
    results = []
    for cell in (theirs, ours):
        hn = cell(x, hx) if with_hx else cell(x)
        torch.manual_seed(1)
        cotangents = [torch.randn_like(s) for s in hn]
        results.append((hn, torch.autograd.grad(hn, inputs, cotangents)))
    assert_close(results[1], results[0], **TOL)


def test_a_sequence_of_steps_equals_the_layer():
    cell = here(lstm_ext.LSTMCell(3, 4).double())
    lstm = here(lstm_ext.LSTM(3, 4).double())
    lstm.load_state_dict({f"{k}_l0": v for k, v in cell.state_dict().items()})
    x = here(torch.randn(6, 2, 3, dtype=torch.float64))
    hx, outputs = None, []
    for step in x:
        hx = cell(step, hx)
        outputs.append(hx[0])
    y, (h_n, c_n) = lstm(x)
    assert_close((torch.stack(outputs), *hx), (y, h_n[0], c_n[0]), **TOL)


def test_gradcheck_and_gradgradcheck():
    cell = here(lstm_ext.LSTMCell(2, 3).double())
    inputs = [leaf(torch.randn(2, n, dtype=torch.float64)) for n in (2, 3, 3)]

    def run(x, h, c):
        return cell(x, (h, c))

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


BAD_CALLS = {
    "None": (None,),
    "3-D": (torch.zeros(2, 3, 3),),
    "0-D": (torch.tensor(1.0),),
    "features": (torch.zeros(2, 7),),
    "features, unbatched": (torch.zeros(7),),
    "features before states": (torch.zeros(2, 7), (H[:1], H)),
    "3-D h": (X, (H[None], H)),
    "3-D c": (X, (H, H[None])),
    "batch of h": (X, (H[:1], H)),
    "batch of c": (X, (H, H[:1])),
    "hidden size of h": (X, (torch.zeros(2, 5), H)),
    "hidden size of c": (X, (H, torch.zeros(2, 5))),
    "three states": (X, (H, H, H)),
    "one state": (X, (H,)),
}
# Of states batched unlike the input, and by chance of a size that gets past the checks that
# nn.LSTMCell had before PyTorch 2.15, which looks at the dimensions first.
UNLIKE = {
    "batched, 1-D h": (1, (X, (H[0], H))),
    "batched, 1-D states": (1, (X, (H[0], H[0]))),
    "batched, 1-D h of the batch's size": (1, (X, (H[0, :2], H))),
    "unbatched, 2-D states": (3, (X[0], (H, H))),
    "unbatched, 2-D states of one": (3, (X[0], (H[:1], H[:1]))),
}


def errors_of_both(args):
    theirs = nn.LSTMCell(3, 4)
    expected = outcome(lambda: theirs(*args))
    assert expected[0] is not None
    ours, args = here(lstm_ext.LSTMCell.from_torch(theirs)), here(args)
    kind, text = outcome(lambda: ours(*args))
    return expected, (kind, text.replace(str(DEVICE), "cpu"))


@pytest.mark.parametrize("name", BAD_CALLS)
def test_errors(name):
    theirs, ours = errors_of_both(BAD_CALLS[name])
    assert ours == theirs


@pytest.mark.parametrize("name", UNLIKE)
def test_errors_of_states_batched_unlike_the_input(name):
    dims, args = UNLIKE[name]
    theirs, ours = errors_of_both(args)
    text = f"Expected 2D hidden0 (batch x hidden_size), but got {dims}D tensor"
    assert ours == (RuntimeError, text)
    assert torch.__version__ < (2, 15) or theirs == ours


# (what nn.LSTMCell does, what we do instead, the call, why)
DIFFERENCES = [
    # nn.LSTMCell speaks of the matmul that fails.
    (RuntimeError, (RuntimeError, "torch.float64 and parameter tensor with torch.float32"),
     (X.double(),)),
    (RuntimeError, (RuntimeError, "torch.int64 and parameter tensor with torch.float32"),
     (X.long(),)),
    (RuntimeError, (RuntimeError, "found input tensor with torch.float32 and hidden tensor with"),
     (X, (H.double(), H.double()))),
    # nn.LSTMCell lets this pass and returns a c of the wider dtype.
    (None, (RuntimeError, "found input tensor with torch.float32 and hidden tensor with"),
     (X, (H, H.double()))),
    (RuntimeError, (RuntimeError, "found input tensor at cpu and hidden tensor at meta"),
     (X, (H.to("meta"), H))),
    (RuntimeError, (RuntimeError, "found input tensor at meta and parameter tensor at cpu"),
     (X.to("meta"),)),
    # "must be tuple of Tensors, not Tensor", after looking at its rows one by one.
    (TypeError, (TypeError, r"pair of Tensors \(h_0, c_0\), got Tensor"), (X, H)),
    (AttributeError, (TypeError, r"got tuple of \['NoneType', 'NoneType'\]"), (X, (None, None))),
]  # fmt: skip


@pytest.mark.parametrize("theirs_raises, ours, args", DIFFERENCES)
def test_errors_that_differ_on_purpose(theirs_raises, ours, args):
    theirs = nn.LSTMCell(3, 4)
    assert outcome(lambda: theirs(*args))[0] is theirs_raises
    ours_here, args_here = here(lstm_ext.LSTMCell.from_torch(theirs)), here(args)
    with pytest.raises(ours[0], match=ours[1].replace("at cpu", f"at {DEVICE}")):
        ours_here(*args_here)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "name", ["weight_ih", "weight_hh", "weight_ch", "gamma_ih", "gamma_hh", "gamma_ch", "beta_ch"]
)
def test_a_missing_weight_is_refused(name, grad):
    varied = not name.startswith("weight_") or name == "weight_ch"
    cell = here(lstm_ext.LSTMCell(3, 4, peephole=varied, layer_norm=varied))
    setattr(cell, name, None)
    with torch.set_grad_enabled(grad), pytest.raises(TypeError, match=f"{name}: expected a Tensor"):
        cell(here(X))


@pytest.mark.parametrize("name", ["bias_ih", "bias_hh"])
def test_a_missing_bias_is_none(name):
    theirs = nn.LSTMCell(3, 4)
    setattr(theirs, name, None)
    ours = here(lstm_ext.LSTMCell.from_torch(theirs))
    assert_close(ours(here(X)), here(theirs(X)), **tol(torch.float32))


def test_a_state_batched_unlike_the_input_never_passes():
    ours = here(lstm_ext.LSTMCell(3, 4))
    for hx in [(torch.zeros(4, 4), torch.zeros(4, 4)), (torch.zeros(4, 1), torch.zeros(4, 1))]:
        with pytest.raises(RuntimeError, match="Expected 2D hidden0"):
            ours(here(X[0]), here(hx))


@pytest.mark.parametrize("bias", [False, True])
def test_same_seed_gives_the_same_module(bias):
    torch.manual_seed(3)
    theirs = nn.LSTMCell(3, 4, bias)
    torch.manual_seed(3)
    ours = lstm_ext.LSTMCell(3, 4, bias)
    assert repr(ours) == repr(theirs)
    assert_close(ours.state_dict(), theirs.state_dict(), **BITS)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


def test_constructor_errors():
    for args in [(3,), (3, "4"), (3.5, 4), (-3, 4)]:
        expected = outcome(lambda args=args: nn.LSTMCell(*args))
        got = outcome(lambda args=args: lstm_ext.LSTMCell(*args))
        assert got[0] is expected[0] is not None


def test_device_dtype_pickle_and_deepcopy():
    cell = lstm_ext.LSTMCell(3, 4, False, "cpu", torch.float64)
    assert cell.weight_ih.dtype == torch.float64
    assert lstm_ext.LSTMCell(3, 4, device="meta").weight_hh.is_meta
    cell, x = here((cell, torch.randn(2, 3, dtype=torch.float64)))
    for twin in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        assert type(twin) is lstm_ext.LSTMCell
        assert_close(twin(x), cell(x), **BITS)
        assert twin.weight_ih is not cell.weight_ih


def test_autocast_reaches_the_cell():
    """nn.LSTMCell stays in float32 under autocast to bfloat16."""
    cell = here(lstm_ext.LSTMCell(3, 4))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        hn = cell(here(torch.randn(2, 3)))
        again = cell(here(torch.randn(2, 3)), hn)
    assert [s.dtype for s in (*hn, *again)] == [torch.bfloat16] * 4
    again[0].sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in cell.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_no_features(dtype):
    """An input without features: what x is multiplied with has no memory."""
    peer = here(nn.LSTMCell(0, 20, dtype=dtype))
    ours = lstm_ext.LSTMCell.from_torch(peer)
    x = here(torch.randn(3, 0, dtype=dtype))
    states = [here(torch.randn(3, 20, dtype=dtype)).requires_grad_() for _ in range(2)]
    results = []
    for cell in (ours, peer):
        h, c = cell(x, states)
        with torch.no_grad():
            again = cell(x, states)
        leaves = [*states, *peer.parameters()]
        first = torch.autograd.grad(h.sum() + c.square().sum(), leaves, create_graph=True)
        total = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(total, leaves, allow_unused=True)
        made = [h, c, *again]
        if dtype != torch.bfloat16:  # in which nn.LSTMCell's derivatives are no measure
            made += [*first, *(t for t in second if t is not None)]
        results.append(made)
    near = 0.02 if dtype == torch.bfloat16 else 1e-4
    for a, b in zip(*results, strict=True):
        assert_close(a.float(), b.float(), rtol=near, atol=near)


@pytest.fixture
def nan_in_new_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


NO_UNITS = [{}, {"zoneout": 0.1}, {"peephole": True}, {"layer_norm": True}]


@pytest.mark.cpu_only(reason="on a GPU a layer has hidden units")
@pytest.mark.parametrize("variant", NO_UNITS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_no_units(nan_in_new_memory, dtype, variant):
    """nn.LSTMCell takes it, nn.LSTM does not. What nothing is added up to is zero."""
    cell = here(lstm_ext.LSTMCell(17, 0, dtype=dtype, **variant))
    for rows in (1, 3, 600):
        x = leaf(torch.randn(rows, 17, dtype=dtype))
        h, c = cell(x)
        assert h.shape == c.shape == (rows, 0)
        (gradient,) = torch.autograd.grad(h.sum() + c.sum(), x)
        assert gradient.shape == x.shape and not gradient.any()


@pytest.mark.parametrize("name", ["peephole", "layer_norm"])
@pytest.mark.parametrize("made_with", [False, True])
def test_attributes_that_the_parameters_were_not_made_for(name, made_with):
    module, x = here(lstm_ext.LSTMCell(4, 6, **{name: made_with})), here(torch.randn(3, 4))
    module(x)
    setattr(module, name, not made_with)
    expected = f"got {name}={not made_with}, expected {name}={made_with} as the cell"
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, pytest.raises(RuntimeError, match=expected):
            module(x)


def test_an_input_that_is_no_dense_tensor():
    module, x = lstm_ext.LSTMCell(4, 6), torch.randn(3, 4)
    with pytest.raises(TypeError, match="Expected input to be a Tensor, got PackedSequence"):
        module(nn.utils.rnn.pack_sequence([x]))
    with pytest.raises(RuntimeError, match="Expected input to be dense, got torch.sparse_coo"):
        module(x.to_sparse())


class Drawn(nn.Module):
    calls = 0

    def forward(self, weight):
        self.calls += 1
        return weight * 2


@pytest.mark.parametrize("name", ["weight_ih", "weight_ch"])
def test_a_parametrization_is_asked_once(name):
    module, drawn = here(lstm_ext.LSTMCell(4, 6, peephole=name == "weight_ch")), Drawn()
    nn.utils.parametrize.register_parametrization(module, name, drawn)
    drawn.calls = 0
    module(here(torch.randn(3, 4)))
    assert drawn.calls == 1


class Doubled(dict):
    def __getitem__(self, name):
        value = super().__getitem__(name)
        return value if value is None else value.detach() * 2


@pytest.mark.parametrize("make", [nn.LSTMCell, nn.LSTM])
def test_parameters_in_a_dict_that_makes_them(make):
    """As DeepSpeed's, which gathers what it is asked for."""
    peer, x = make(4, 6).double(), torch.randn(5, 3, 4).double()
    ours = lstm_ext.convert(nn.Sequential(make(4, 6).double()))[0]
    ours.load_state_dict(peer.state_dict())
    x = x[0] if make is nn.LSTMCell else x
    peer.load_state_dict({k: 2 * v for k, v in peer.state_dict().items()})
    ours.__dict__["_parameters"] = Doubled(ours._parameters)
    with torch.no_grad():
        assert_close(ours(x)[0], peer(x)[0])
