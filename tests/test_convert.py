"""convert, from_torch and to_torch: the same parameters in another module."""

import copy
import warnings
import weakref
from collections import OrderedDict

import pytest
import torch
from device import here, leaf
from tolerances import tol
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.testing import assert_close

import lstm_ext

TOL = tol(torch.float64)


def shares_parameters(a, b):
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    return list(ours) == list(theirs) and all(ours[k] is theirs[k] for k in ours)


class Tagger(nn.Module):
    """An LSTM at several depths, one under two names, and a cell."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.encoder = nn.Sequential(nn.LSTM(3, 4, bidirectional=True, batch_first=True))
        self.decoders = nn.ModuleDict({"a": nn.LSTM(8, 4, 2, dropout=0.5), "b": nn.Identity()})
        self.again = self.decoders["a"]
        self.cell = nn.LSTMCell(4, 5)

    def forward(self, tokens):
        x, _ = self.encoder(self.embed(tokens))
        x, _ = self.decoders["a"](x.transpose(0, 1))
        y, _ = self.again(torch.cat([x, x], dim=2))
        return self.cell(y[-1])


@pytest.mark.cpu_only(reason="cuDNN draws other dropout masks")
def test_convert_in_place():
    model = here(Tagger().double()).eval()
    model.decoders.train()
    tokens = here(torch.randint(7, (2, 5)))
    torch.manual_seed(1)
    expected, before, keys = model(tokens), list(model.parameters()), list(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lstm_ext.convert(model) is model
    torch.manual_seed(1)
    assert_close(model(tokens), expected, **TOL)
    assert type(model.encoder[0]) is lstm_ext.LSTM
    assert type(model.cell) is lstm_ext.LSTMCell
    assert type(model.decoders["a"]) is lstm_ext.LSTM
    assert model.again is model.decoders["a"]
    assert [m.training for m in (model.encoder[0], model.again, model.cell)] == [False, True, False]
    assert list(model.state_dict()) == keys
    after = list(model.parameters())
    assert len(after) == len(before) and all(a is b for a, b in zip(after, before, strict=True))
    assert not any(type(m) in (nn.LSTM, nn.LSTMCell) for m in model.modules())
    again = model.encoder[0]
    assert lstm_ext.convert(model).encoder[0] is again


def test_one_module_under_two_names_of_one_parent():
    model = nn.Module()
    model.a = model.b = nn.LSTM(3, 4)
    lstm_ext.convert(model)
    assert type(model.a) is lstm_ext.LSTM
    assert model.b is model.a


@pytest.mark.parametrize("module", [nn.LSTM(3, 4), nn.LSTMCell(3, 4)])
def test_convert_of_an_lstm_itself_returns_the_new_one(module):
    new = lstm_ext.convert(module)
    assert type(new) is getattr(lstm_ext, type(module).__name__)
    assert shares_parameters(new, module)


def test_an_optimizer_made_before_stays_valid():
    model = here(nn.Sequential(nn.LSTM(3, 4)).double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    lstm_ext.convert(model)
    x = here(torch.randn(5, 2, 3).double())
    for m, opt in ((model, optimizer), (twin, twin_optimizer)):
        for _ in range(3):
            opt.zero_grad()
            m(x)[0].square().sum().backward()
            opt.step()
    assert_close(model.state_dict(), twin.state_dict(), **TOL)


class Mine(nn.LSTM):
    pass


def test_what_would_lose_something_is_left_alone_with_one_warning():
    model = nn.ModuleDict({k: nn.LSTM(3, 4) for k in ("plain", "parametrized", "patched")})
    model["mine"] = Mine(3, 4)
    model["cell"] = nn.LSTMCell(3, 4)
    for name, weight in (("parametrized", "weight_hh_l0"), ("cell", "weight_hh")):
        parametrize.register_parametrization(model[name], weight, nn.Identity())
    forward = model["patched"].forward
    model["patched"].forward = lambda *args: forward(*args)
    kept = {k: model[k] for k in ("parametrized", "patched", "mine", "cell")}
    with pytest.warns(UserWarning) as caught:
        lstm_ext.convert(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    text = str(caught[0].message)
    for part in ("mine (Mine)", "parametrized (Parametrized", "patched (LSTM)", "cell (Parametri"):
        assert part in text
    assert "being parametrized (convert before that, or remove_parametrizations): param" in text
    assert "plain" not in text
    assert all(model[k] is kept[k] for k in kept)
    assert type(model["plain"]) is lstm_ext.LSTM
    lone = Mine(3, 4)
    with pytest.warns(UserWarning, match=r"the model itself \(Mine\)"):
        assert lstm_ext.convert(lone) is lone


class Stack(nn.Module):
    """Two layers, and all the places besides where code keeps them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LSTM(3, 4), nn.LSTM(4, 4)
        self.layers = [self.first, {"last": self.second}]
        self.layers.append(self.layers)
        object.__setattr__(self, "top", self.second)


def test_other_places_of_a_module_get_the_new_one():
    model = Stack()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lstm_ext.convert(model)
    assert type(model.first) is type(model.second) is lstm_ext.LSTM
    first, others, _ = model.layers
    assert first is model.first and others["last"] is model.top is model.second


def test_other_places_that_stay_are_named():
    model = nn.Module()
    model.inner = Stack()
    old = model.inner.first
    model.pair, model.step = (old, 1), old.forward
    model.inner.hidden = [nn.LSTMCell(3, 4), nn.GRU(3, 4)]
    with pytest.warns(UserWarning, match="held besides the registered modules") as caught:
        lstm_ext.convert(model)
    text = str(caught[0].message)
    places = "pair.0, step (a method of what was replaced), inner.hidden.0 (LSTMCell, unreg"
    assert len(caught) == 1 and all(place in text for place in places.split(", "))
    assert model.pair[0] is old and type(model.inner.hidden[0]) is nn.LSTMCell
    assert "GRU" not in text and "layers" not in text


class Rude:
    """Raises at every question."""

    def __getattr__(self, name):
        raise KeyError(name)

    def __eq__(self, other):
        raise KeyError(other)

    def __repr__(self):
        raise KeyError("repr")

    __hash__ = object.__hash__


def test_values_that_answer_no_question():
    model, other, gone = Stack(), nn.Linear(2, 2), nn.Linear(2, 2)
    vars(model).update(parent=weakref.proxy(other), dead=weakref.proxy(gone))
    del gone
    model.rude = {Rude(): [Rude()], "ordered": OrderedDict(last=model.second)}
    model.deep = []
    for _ in range(3000):
        model.deep = [model.deep]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lstm_ext.convert(model)
    assert type(model.first) is lstm_ext.LSTM and model.rude["ordered"]["last"] is model.second
    while model.deep:  # freed by recursion elsewhere
        (model.deep,) = model.deep


def test_a_model_back_to_torch():
    model = here(Tagger().double()).eval()
    tokens, keys = here(torch.randint(7, (2, 5))), list(model.state_dict())
    expected, before = model(tokens), list(model.parameters())
    lstm_ext.convert(model).decoders["b"] = lstm_ext.LSTM(3, 4, peephole=True)
    model.held = [model.cell]
    with pytest.warns(UserWarning, match=r"^to_torch left alone, decoders\.b \(LSTM\): .*peephole"):
        assert lstm_ext.to_torch(model) is model
    assert type(model.encoder[0]) is type(model.again) is nn.LSTM
    assert model.again is model.decoders["a"] and model.held[0] is model.cell
    assert type(model.cell) is nn.LSTMCell and type(model.decoders["b"]) is lstm_ext.LSTM
    del model.decoders["b"]
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    assert_close(model(tokens), expected, **TOL)
    assert type(lstm_ext.to_torch(lstm_ext.LSTM(3, 4))) is nn.LSTM
    with pytest.warns(UserWarning, match="subclasses of an LSTM"):
        lstm_ext.to_torch(lstm_ext.quantize(nn.Sequential(nn.LSTM(3, 4))))
    with pytest.raises(TypeError, match="to_torch: expected a torch.nn.Module, got int"):
        lstm_ext.to_torch(3)


def test_where_torchs_names_are_set_to_the_packages(monkeypatch):
    old, cell = nn.LSTM(3, 4), nn.LSTMCell(3, 4)
    monkeypatch.setattr(nn, "LSTM", lstm_ext.LSTM)
    monkeypatch.setattr(nn, "LSTMCell", lstm_ext.LSTMCell)
    new = lstm_ext.convert(nn.ModuleList([old, cell]))
    assert [type(m) for m in new] == [lstm_ext.LSTM, lstm_ext.LSTMCell]
    assert [type(m.to_torch()) for m in new] == [type(old), type(cell)]
    assert type(lstm_ext.LSTM.from_torch(old)) is lstm_ext.LSTM
    quantized = lstm_ext.quantize(nn.ModuleList([old, cell]))
    assert [type(m).__name__ for m in quantized] == ["QuantizedLSTM", "QuantizedLSTMCell"]


def test_a_forward_that_is_the_class_own_is_none_that_was_replaced():
    """As it is left by who takes back a forward that he replaced (accelerate's hooks)."""
    module, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    module.forward = module.forward
    new = lstm_ext.convert(module)
    assert type(new) is lstm_ext.LSTM and "forward" not in vars(new)
    assert_close(new(x)[0], module(x)[0])
    other = nn.LSTM(3, 4)
    other.forward = module.forward
    wrapped = nn.LSTM(3, 4)

    class Wrapper:  # which says of itself that it is the method, as functools.wraps' do
        __self__, __func__ = wrapped, nn.LSTM.forward

        def __call__(self, *args):
            return None

    wrapped.forward = Wrapper()
    for module in (other, wrapped):
        with pytest.warns(UserWarning, match="a replaced forward"):
            assert lstm_ext.convert(module) is module


def test_hooks_come_along_and_their_handles_still_remove_them():
    theirs = here(nn.LSTM(3, 4))
    seen = []
    handles = [
        theirs.register_forward_pre_hook(lambda m, args: seen.append(("pre", m))),
        theirs.register_forward_hook(lambda m, args, out: seen.append(("post", m))),
        theirs.register_full_backward_hook(lambda m, gi, go: seen.append(("backward", m))),
        theirs.register_state_dict_post_hook(lambda m, *args: seen.append(("state", m))),
        theirs.register_load_state_dict_pre_hook(lambda m, *args: seen.append(("load", m))),
    ]
    model = nn.ModuleList([theirs])
    del theirs
    ours = lstm_ext.convert(model)[0]
    ours(leaf(torch.randn(5, 2, 3)))[0].sum().backward()
    ours.load_state_dict(ours.state_dict())
    assert seen == [(k, ours) for k in ("pre", "post", "backward", "state", "load")]
    for handle in handles[:-1]:
        handle.remove()
    seen.clear()
    ours(leaf(torch.randn(5, 2, 3)))[0].sum().backward()
    ours.load_state_dict(ours.state_dict())
    assert seen == [("load", ours)]


def test_weight_norm_by_hook_and_pruning_come_along():
    theirs = here(nn.LSTM(3, 4).double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(theirs, "weight_hh_l0")
    prune.random_unstructured(theirs, "weight_ih_l0", 0.5)
    ours = lstm_ext.convert(nn.ModuleList([theirs]))[0]
    x = here(torch.randn(5, 2, 3).double())
    assert_close(ours(x), theirs(x), **TOL)
    with torch.no_grad():
        theirs.weight_hh_l0_g.mul_(2)
        theirs.weight_ih_l0_orig.mul_(3)
    changed = ours(x)
    assert_close(changed, theirs(x), **TOL)
    assert_close(ours.to_torch()(x), changed, **TOL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_layers": 2, "bias": False, "batch_first": True, "dropout": 0.5},
        {"bidirectional": True, "proj_size": 2},
    ],
)
def test_there_and_back(kwargs, dtype):
    theirs = here(nn.LSTM(3, 4, dtype=dtype, **kwargs)).eval()
    theirs.note = "mine"
    ours = lstm_ext.LSTM.from_torch(theirs)
    back = ours.to_torch()
    assert type(back) is nn.LSTM
    for module in (ours, back):
        assert shares_parameters(module, theirs)
        assert repr(module) == repr(theirs)
        assert (module.training, module.note) == (False, "mine")
    assert vars(back).keys() == vars(theirs).keys()
    x = here(torch.randn(5, 2, 3, dtype=dtype))
    if dtype != torch.bfloat16:
        assert_close(back(x), ours(x), **tol(dtype))
    # The registration is each module's own, only the Parameters are shared.
    ours.weight_ih_l0 = nn.Parameter(torch.zeros_like(ours.weight_ih_l0))
    assert theirs.weight_ih_l0.any() and back.weight_ih_l0.any()
    assert back._flat_weights[0] is back.weight_ih_l0


@pytest.mark.parametrize("bias", [False, True])
def test_cell_there_and_back(bias):
    theirs = here(nn.LSTMCell(3, 4, bias).double()).eval()
    ours = lstm_ext.LSTMCell.from_torch(theirs)
    back = ours.to_torch()
    assert type(back) is nn.LSTMCell
    x = here(torch.randn(2, 3).double())
    for module in (ours, back):
        assert shares_parameters(module, theirs)
        assert repr(module) == repr(theirs)
        assert not module.training
        assert_close(module(x), theirs(x), **TOL)


def test_meta_device_comes_along():
    ours = lstm_ext.LSTM.from_torch(nn.LSTM(3, 4, device="meta"))
    assert all(p.is_meta for p in ours.parameters())
    assert all(p.is_meta for p in ours.to_torch().parameters())


def test_a_compiled_module_comes_back_uncompiled():
    """What it was compiled to is bound to the nn.LSTM."""
    theirs = here(nn.LSTM(3, 4).double())
    theirs.compile(backend="eager")
    model = lstm_ext.convert(nn.ModuleList([theirs]))
    theirs.forward = None
    x = here(torch.randn(5, 2, 3).double())
    assert_close(model[0](x), nn.LSTM.forward(theirs, x), **TOL)


@pytest.mark.parametrize("where", ["the model", "inside"])
def test_what_torch_compile_wraps_runs_as_the_new_module(monkeypatch, where):
    """The wrapper keeps the forward of what it was made of."""
    theirs = here(nn.LSTM(3, 4).double())
    x = here(torch.randn(5, 2, 3).double())
    expected = theirs(x)
    compiled = torch.compile(theirs, backend="eager")
    model = lstm_ext.convert(compiled if where == "the model" else nn.Sequential(compiled))
    monkeypatch.setattr(nn.LSTM, "forward", None)
    assert_close(model(x), expected, **TOL)
    zeros = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(zeros, assign=True)
    assert not model(x)[0].any()
    if where == "the model":
        assert not torch.compile(model, backend="eager")(x)[0].any()


@pytest.mark.parametrize("model", [None, nn.LSTM, {"lstm": 1}])
def test_convert_of_no_module_is_refused(model):
    got = type(model).__name__
    with pytest.raises(TypeError, match=f"convert: expected a torch.nn.Module, got {got}"):
        lstm_ext.convert(model)


class MyCell(lstm_ext.LSTMCell):
    pass


def test_what_cannot_be_moved_is_refused():
    lstm, cell = lstm_ext.LSTM, lstm_ext.LSTMCell
    with pytest.raises(ValueError, match="nn.LSTM has no return_cell_sequence; got True"):
        lstm(3, 4, return_cell_sequence=True).to_torch()
    for call, got in [
        (lambda: lstm.from_torch(nn.GRU(3, 4)), "got torch.nn.modules.rnn.GRU"),
        (lambda: lstm.from_torch(Mine(3, 4)), "got .*Mine"),
        (lambda: lstm.from_torch(lstm(3, 4)), "got lstm_ext.modules.LSTM"),
        (lambda: lstm.from_torch(None), "got builtins.NoneType"),
        (lambda: cell.from_torch(nn.LSTM(3, 4)), "got torch.nn.modules.rnn.LSTM"),
        (lambda: MyCell(3, 4).to_torch(), "got .*MyCell"),
    ]:
        with pytest.raises(TypeError, match=got):
            call()
    ours = lstm(3, 4)
    parametrize.register_parametrization(ours, "weight_hh_l0", nn.Identity())
    with pytest.raises(TypeError, match="ParametrizedLSTM"):
        ours.to_torch()
    theirs = nn.LSTM(3, 4)
    theirs.forward = lambda x: x
    with pytest.raises(TypeError, match="forward of this LSTM was replaced"):
        lstm.from_torch(theirs)


@pytest.mark.cpu_only(reason="torch's quantized LSTM is of the CPU")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantized_by_way_of_nn_lstm():
    """torch's own dynamic quantization knows nn.LSTM only."""
    module, x = lstm_ext.LSTM(8, 16), torch.randn(5, 2, 8)

    def quantized(module):
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(module), {nn.LSTM})[0]

    assert type(quantized(module)) is lstm_ext.LSTM
    made = quantized(module.to_torch())
    assert isinstance(made, torch.ao.nn.quantized.dynamic.LSTM)
    torch.testing.assert_close(made(x)[0], module(x)[0], rtol=0, atol=0.05)
