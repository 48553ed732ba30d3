"""The parameters as nn.LSTM has them: names, state dict, pickles, and everything that replaces one.

What replaces a parameter must reach the next forward, since no copy of the weights is kept.
"""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from device import here
from tolerances import tol
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing import assert_close

import lstm_ext

TOL = tol(torch.float64)
BITS = {"rtol": 0, "atol": 0}
CONFIGS = [
    {},
    {"num_layers": 2, "bias": False, "batch_first": True},
    {"bidirectional": True, "proj_size": 2, "num_layers": 2},
    {"bias": False, "proj_size": 2},
]


def pair(*args, **kwargs):
    """An nn.LSTM in fp64 and an lstm_ext.LSTM with copies of its parameters."""
    theirs = here(nn.LSTM(*args, **kwargs, dtype=torch.float64))
    ours = here(lstm_ext.LSTM(*args, **kwargs, dtype=torch.float64))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def randn(*shape):
    return here(torch.randn(*shape, dtype=torch.float64))


def loss_and_grads(module, x):
    y, (h_n, c_n) = module(x)
    loss = y.square().sum() + h_n.sum() + c_n.square().sum()
    return loss, torch.autograd.grad(loss, list(module.parameters()))


@pytest.mark.parametrize("kwargs", CONFIGS)
def test_state_dict_both_ways(kwargs):
    theirs, ours = here((nn.LSTM(3, 4, **kwargs), lstm_ext.LSTM(3, 4, **kwargs)))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.load_state_dict(theirs.state_dict(), strict=True).missing_keys == []
    x = here(torch.randn(5, 2, 3))
    assert_close(ours(x), theirs(x), **tol(torch.float32))
    ours.reset_parameters()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_close(ours(x), theirs(x), **tol(torch.float32))
    ours.load_state_dict(
        {k: v + 1 for k, v in theirs.state_dict().items()}, strict=True, assign=True
    )
    assert_close(ours.weight_hh_l0, theirs.weight_hh_l0 + 1, check_device=True, **BITS)


def test_strict_loading_reports_as_nn_lstm():
    small, large = nn.LSTM(3, 4).state_dict(), nn.LSTM(3, 4, 2).state_dict()
    for source, cls_args in ((small, (3, 4, 2)), (large, (3, 4)), (small, (3, 5))):
        texts = []
        for cls in (nn.LSTM, lstm_ext.LSTM):
            with pytest.raises(RuntimeError) as error:
                cls(*cls_args).load_state_dict(source)
            texts.append(str(error.value))
        assert texts[1] == texts[0]


@pytest.mark.parametrize("kwargs", CONFIGS)
def test_flat_weights_and_friends(kwargs):
    theirs, ours = pair(3, 4, **kwargs)
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert ours._all_weights == theirs._all_weights
    assert_close(ours._flat_weights, theirs._flat_weights, **BITS)
    assert_close(ours.all_weights, theirs.all_weights, **BITS)
    assert ours.flatten_parameters() is None
    x = randn(5, 2, 3)
    for name in ("get_expected_hidden_size", "get_expected_cell_size"):
        for sizes in (None, torch.tensor([4, 2])):
            assert getattr(ours, name)(x, sizes) == getattr(theirs, name)(x, sizes)
    hx, order = (randn(2, 3, 4), randn(2, 3, 4)), here(torch.tensor([2, 0, 1]))
    assert_close(ours.permute_hidden(hx, order), theirs.permute_hidden(hx, order), **BITS)
    assert ours.permute_hidden(hx, None) is hx
    ours.check_input(x, None)
    ours.check_input(x[0], torch.tensor([2]))
    for args in [(x[0], None), (x, torch.tensor([2])), (randn(5, 2, 7), None), (x.float(), None)]:
        errors = []
        for module in (theirs, ours):
            with pytest.raises((RuntimeError, ValueError)) as error:
                module.check_input(*args)
            errors.append((error.type, str(error.value)))
        assert errors[1] == errors[0]
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(1, 2, 4\), got \[2, 3, 4\]"):
        ours.check_hidden_size(hx[0], (1, 2, 4))


def test_an_item_of_the_flat_weights_is_not_set_in_vain():
    """It would be lost: nn.LSTM computes with what is in its list."""
    ours = lstm_ext.LSTM(3, 4)
    with pytest.raises(TypeError, match="does not support item assignment"):
        ours._flat_weights[0] = torch.zeros(16, 3)


def test_flat_weights_are_the_current_ones():
    ours = lstm_ext.LSTM(3, 4)
    ours.weight_hh_l0 = nn.Parameter(torch.zeros(16, 4))
    assert ours._flat_weights[1] is ours.weight_hh_l0
    ours.double()
    assert ours._flat_weights[1] is ours.weight_hh_l0
    assert ours._flat_weights[1].dtype == torch.float64


def round_trips(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    yield copy.deepcopy(module)
    yield pickle.loads(pickle.dumps(module))
    yield torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("kwargs", [*CONFIGS, {"return_cell_sequence": True}])
def test_pickle_deepcopy_and_torch_save(kwargs):
    ours = here(lstm_ext.LSTM(3, 4, **kwargs, dtype=torch.float64)).eval()
    ours.to(torch.float64)
    x = randn(5, 2, 3)
    expected = ours(x)
    for twin in round_trips(ours):
        assert type(twin) is lstm_ext.LSTM
        assert repr(twin) == repr(ours)
        assert not twin.training
        assert_close(twin(x), expected, **BITS)
        assert all(a is not b for a, b in zip(twin.parameters(), ours.parameters(), strict=True))
        twin.weight_hh_l0.data.zero_()
        assert not torch.equal(twin(x)[0], expected[0])
    assert_close(ours(x), expected, **BITS)


@pytest.mark.parametrize("kwargs", CONFIGS)
def test_old_pickles(kwargs):
    """The attributes of nn.LSTM pickles of several ages, through __setstate__."""
    theirs, _ = pair(3, 4, **kwargs)
    now = {k: v for k, v in vars(theirs).items() if k != "_flat_weight_refs"}
    older = {k: v for k, v in now.items() if k not in ("_flat_weights", "_flat_weights_names")}
    ages = [now, older]
    if not kwargs.get("proj_size"):  # PyTorch 1.7 and before
        ages.append({k: v for k, v in older.items() if k != "proj_size"})
    oldest = {k: v for k, v in ages[-1].items() if k != "_all_weights"}
    ages.append({**oldest, "all_weights": theirs.all_weights})
    x = randn(5, 2, 3)
    for state in ages:
        module = lstm_ext.LSTM.__new__(lstm_ext.LSTM)
        module.__setstate__(copy.copy(state))
        assert_close(module(x), theirs(x), **TOL)
        assert module._all_weights == theirs._all_weights
        assert module._flat_weights_names == theirs._flat_weights_names
        assert repr(module) == repr(theirs)
        kept = ("all_weights", "_flat_weights", "_flat_weight_refs")
        assert not any(name in vars(module) for name in kept)
        next(round_trips(module))


def test_no_weight_is_kept_alive():
    ours = here(lstm_ext.LSTM(3, 4, 2, bidirectional=True))
    ours(here(torch.randn(5, 2, 3)))[0].sum().backward()
    old = [weakref.ref(p) for p in ours.parameters()]
    for name in ours._flat_weights_names:
        setattr(ours, name, nn.Parameter(torch.zeros_like(getattr(ours, name))))
    gc.collect()
    assert not any(ref() is not None for ref in old)


def test_every_way_to_change_a_weight_reaches_the_next_forward():
    theirs, ours = pair(3, 4, 2, bidirectional=True)
    x = randn(5, 2, 3)
    new = {k: randn(*v.shape) for k, v in theirs.state_dict().items()}

    def by_setattr(m):
        m.weight_hh_l1 = nn.Parameter(new["weight_hh_l1"].clone())

    def in_place(m):
        with torch.no_grad():
            m.weight_hh_l0_reverse.copy_(new["weight_hh_l0_reverse"])

    def by_data(m):
        m.bias_ih_l1.data = new["bias_ih_l1"].clone()

    def into_data(m):
        m.weight_ih_l0.data.mul_(2)

    def optimizer(m):
        opt = torch.optim.SGD(m.parameters(), lr=0.1)
        m(x)[0].square().sum().backward()
        opt.step()

    def register(m):
        m.register_parameter("weight_ih_l1", nn.Parameter(new["weight_ih_l1"].clone()))

    for change in (by_setattr, in_place, by_data, into_data, optimizer, register):
        before = ours(x)[0]
        for module in (theirs, ours):
            change(module)
        assert not torch.equal(ours(x)[0], before), change
        # nn.LSTM overlooks register_parameter until its flat weights are made anew.
        theirs._init_flat_weights()
        assert_close(loss_and_grads(ours, x), loss_and_grads(theirs, x), **TOL)


def test_moves_between_dtypes_and_devices():
    ours = here(lstm_ext.LSTM(3, 4, 2))
    x = here(torch.randn(5, 2, 3))
    expected = ours(x)[0]
    assert_close(ours.double()(x.double())[0].float(), expected, **tol(torch.float32))
    assert_close(ours.to(torch.float32)(x)[0], expected, **BITS)
    assert ours.bfloat16()(x.bfloat16())[0].dtype == torch.bfloat16
    assert all(p.is_meta for p in ours.to("meta").parameters())
    assert all(not p.is_meta for p in ours.to_empty(device="cpu").parameters())


def test_functional_call():
    theirs, ours = pair(3, 4, 2, proj_size=2)
    x = randn(5, 2, 3)
    before = ours(x)
    replaced = {k: randn(*v.shape).requires_grad_() for k, v in theirs.named_parameters()}
    results = []
    for module in (theirs, ours):
        y, hn = torch.func.functional_call(module, replaced, (x,))
        loss = y.square().sum() + hn[1].sum()
        results.append((y, hn, torch.autograd.grad(loss, list(replaced.values()))))
    assert_close(results[1], results[0], **TOL)
    assert_close(ours(x), before, **BITS)


def test_parametrizations():
    theirs, ours = pair(3, 4, 2, bidirectional=True)
    x = randn(5, 2, 3)
    for module in (theirs, ours):
        parametrizations.weight_norm(module, "weight_hh_l0")
        parametrizations.spectral_norm(module.eval(), "weight_ih_l1_reverse")
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        for module in (theirs, ours):
            module.parametrizations.weight_hh_l0.original0.mul_(2)
    assert_close(loss_and_grads(ours, x), loss_and_grads(theirs, x), **TOL)
    with parametrize.cached():
        assert_close(ours(x), theirs(x), **TOL)
    for module in (theirs, ours):
        parametrize.remove_parametrizations(module, "weight_hh_l0")
        parametrize.remove_parametrizations(module, "weight_ih_l1_reverse")
    assert type(ours) is lstm_ext.LSTM
    assert_close(ours(x), theirs(x), **TOL)


def test_weight_norm_by_hook_and_pruning():
    theirs, ours = pair(3, 4, 2)
    x = randn(5, 2, 3)
    for module in (theirs, ours):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(module, "weight_hh_l1")
        torch.manual_seed(1)
        prune.random_unstructured(module, "weight_ih_l0", 0.5)
        prune.l1_unstructured(module, "bias_hh_l0", 3)
    for _ in range(2):
        assert_close(loss_and_grads(ours, x), loss_and_grads(theirs, x), **TOL)
        with torch.no_grad():
            for module in (theirs, ours):
                for p in module.parameters():
                    p.mul_(1.5)
    for module in (theirs, ours):
        nn.utils.remove_weight_norm(module, "weight_hh_l1")
        prune.remove(module, "weight_ih_l0")
    assert_close(ours(x), theirs(x), **TOL)


def test_tied_weights():
    theirs, ours = pair(4, 4, 2)
    x = randn(5, 2, 4)
    for module in (theirs, ours):
        module.weight_hh_l1 = module.weight_hh_l0
        module.weight_ih_l1 = module.weight_hh_l0
        module.weight_ih_l0 = module.weight_hh_l0
        module.bias_hh_l0 = module.bias_ih_l0
    assert len(list(ours.parameters())) == len(list(theirs.parameters())) == 4
    assert_close(loss_and_grads(ours, x), loss_and_grads(theirs, x), **TOL)
    twin = copy.deepcopy(ours)
    assert twin.weight_hh_l1 is twin.weight_hh_l0


def test_frozen_weights():
    theirs, ours = pair(3, 4, 2)
    x = randn(5, 2, 3)
    for module in (theirs, ours):
        for name, p in module.named_parameters():
            p.requires_grad_(name in ("weight_hh_l0", "bias_ih_l1"))
        module(x)[0].square().sum().backward()
    assert [n for n, p in ours.named_parameters() if p.grad is not None] == [
        "weight_hh_l0",
        "bias_ih_l1",
    ]
    assert_close(ours.weight_hh_l0.grad, theirs.weight_hh_l0.grad, **TOL)
    assert_close(ours.bias_ih_l1.grad, theirs.bias_ih_l1.grad, **TOL)
    ours.requires_grad_(False)
    assert not ours(x)[0].requires_grad


def test_data_parallel_replica():
    """A replica's weights are plain tensors; its attributes are its own."""
    _, ours = pair(3, 4, 2)
    x = randn(5, 2, 3)
    replica = ours._replicate_for_data_parallel()
    for name, p in ours.named_parameters():
        setattr(replica, name, p * 2)
    doubled = copy.deepcopy(ours)
    with torch.no_grad():
        for p in doubled.parameters():
            p.mul_(2)
    assert_close(replica(x), doubled(x), **TOL)
    assert len(list(ours.parameters())) == 8
    replica(x)[0].sum().backward()
    assert ours.weight_ih_l0.grad is not None


def test_subclasses():
    class Loud(lstm_ext.LSTM):
        def forward(self, input, hx=None):
            output, states = super().forward(input, hx)
            return 2 * output, states

    ours = here(Loud(3, 4, batch_first=True))
    plain = here(lstm_ext.LSTM(3, 4, batch_first=True))
    plain.load_state_dict(ours.state_dict())
    x = here(torch.randn(2, 5, 3))
    assert_close(ours(x)[0], 2 * plain(x)[0], **BITS)
    assert repr(ours) == "Loud(3, 4, batch_first=True)"


def test_flat_weights_may_be_rebuilt_but_not_replaced():
    """The idiom of weight-drop code: replace a parameter, then make the list anew."""
    module = lstm_ext.LSTM(3, 4)
    module.weight_hh_l0 = torch.nn.Parameter(torch.zeros(16, 4))
    module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
    assert module._flat_weights[1] is module.weight_hh_l0
    with pytest.raises(AttributeError, match="set those attributes instead"):
        module._flat_weights = [w.detach().clone() for w in module._flat_weights]
