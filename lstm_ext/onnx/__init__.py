"""ONNX: a model with lstm_ext modules in it as standard LSTM nodes, one a layer.

For the time of an export the modules' forward is one that computes a layer by the operator
``lstm_ext::onnx_lstm``, which is the ONNX LSTM in torch: the arguments, layouts and gate order of
the node, so that the translation has nothing to do. The weights are rearranged once, before.

Nodes have layout 0 and neither clip nor input_forget, as TensorRT's importer wants them. `onnx` and
`onnxscript` are imported by :func:`export` only.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from lstm_ext.cnn import CNNLSTM
from lstm_ext.lstm_cell import LSTMCell
from lstm_ext.modules import LSTM
from lstm_ext.onnx.exporter import NAME, Exporter
from lstm_ext.onnx.node import translations

__all__ = ["export"]

_BFLOAT16_OPSET = 22  # the first whose LSTM takes it


def export(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    path: str | os.PathLike[str] | None = None,
    *,
    dynamic_shapes: Any = None,
    **kwargs: Any,
) -> Any:
    """Write model, with every lstm_ext.LSTM and LSTMCell in it, as an ONNX file.

    Each layer of an LSTM, and each LSTMCell, becomes one standard LSTM node, with whatever of
    directions, biases, peepholes, initial states and ``lengths`` it has. A projection is not in
    ONNX's LSTM: it becomes a node of H unprojected units, R = W_hh W_hr (4H, H), and a product
    after it. Merging, transposing and the state of a sequence of no steps are plain nodes. What
    was exported holds no operator of another domain.

    Args:
        model: any module; in eval mode, where an LSTM in it has a dropout.
        args: example inputs, in order.
        path: the file; None: none is written.
        dynamic_shapes: which sizes may change, as :func:`torch.export.export` takes them; all
            others, T and B too, are those of args for good. Without steps or sequences (T or B 0)
            the runtime decides: ONNX Runtime gives zero states for T = 0 and crashes for B = 0.
        kwargs: of :func:`torch.onnx.export`; ``kwargs={"lengths": …}`` are inputs by name. Its
            opset_version is 22 or more with bfloat16.

    Returns:
        torch.onnx.ONNXProgram.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        TypeError: model is no nn.Module; dynamo=False.
        ValueError: what ONNX's LSTM cannot say: layer_norm, zoneout, return_cell_sequence,
            reset_mask, a PackedSequence, autocast, a dropout that is on, an initial state with a
            projection that loses precision in being inverted, bfloat16 in an older opset, weights
            that are given or changed while the model runs; a module that is no submodule of the
            model, or whose forward was replaced; a size that dynamic_shapes declares as a
            torch.export.Dim and the model fixes. And the modules' own errors.
        RuntimeError: (in another thread) a call of a module while it is exported.
    """
    _check_packages()
    if not isinstance(model, nn.Module):
        raise TypeError(f"export: expected a torch.nn.Module, got {type(model).__name__}")
    if not kwargs.pop("dynamo", True):
        raise TypeError("export: expected torch.onnx.export's dynamo=True, got dynamo=False")
    table = translations() | (kwargs.pop("custom_translation_table", None) or {})
    if isinstance(args, Tensor):
        args = (args,)
    if any(p.dtype == torch.bfloat16 for p in model.parameters()):
        if (kwargs.get("opset_version") or _BFLOAT16_OPSET) < _BFLOAT16_OPSET:
            got = kwargs["opset_version"]
            raise ValueError(f"export: bfloat16 needs opset_version={_BFLOAT16_OPSET}, got {got}")
        kwargs["opset_version"] = kwargs.get("opset_version") or _BFLOAT16_OPSET
    with _exportable(model) as refusals:
        try:
            program = torch.onnx.export(
                model,
                args,
                dynamo=True,
                dynamic_shapes=dynamic_shapes,
                custom_translation_table=table,
                **kwargs,
            )
        except Exception:
            if refusals:  # torch tells of it in pages
                raise refusals[0].with_traceback(None) from None
            raise
    _check_sizes(program, dynamic_shapes)
    if path is not None:
        program.save(
            path,
            include_initializers=kwargs.get("export_params", True),
            keep_initializers_as_inputs=kwargs.get("keep_initializers_as_inputs", False),
            external_data=kwargs.get("external_data", True),
        )
    return program


def _check_packages() -> None:
    for package in ("onnx", "onnxscript"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(
                f"lstm_ext.onnx.export needs {package}, which is not there: "
                "pip install onnx onnxscript",
                name=package,
            ) from error


def _check_sizes(program: Any, dynamic_shapes: Any) -> None:
    """Refuse a declared size that the model fixes: torch takes the declaration back silently."""
    declared = pytree.tree_leaves(dynamic_shapes, is_leaf=_is_of_one_input)
    inputs = program.model.graph.inputs
    if len(inputs) != len(declared):  # torch does not know then either which is whose
        return
    for input, sizes in zip(inputs, declared, strict=True):
        if not isinstance(sizes, (dict, list, tuple)):
            continue
        for k, size in sizes.items() if isinstance(sizes, dict) else enumerate(sizes):
            if isinstance(size, Dim) and isinstance(input.shape[k], int):
                raise ValueError(
                    f"export: dynamic_shapes declares size {k} of {input.name} as {size.__name__}, "
                    f"but the model fixes it, got {input.shape[k]}: an operation in it asks for "
                    "the number (which one, TORCH_LOGS=+dynamic says)"
                )


def _is_of_one_input(shapes: Any) -> bool:
    if not isinstance(shapes, (dict, list, tuple)):
        return False
    sizes = shapes.values() if isinstance(shapes, dict) else shapes
    return not any(isinstance(size, (dict, list, tuple)) for size in sizes)


# --- forward, while exporting ---------------------------------------------------------------------


_lock = threading.RLock()


@contextlib.contextmanager
def _exportable(model: nn.Module) -> Iterator[list[Exception]]:
    """Within it the model's lstm_ext modules compute by nodes; gives what they refused.

    Their classes' forward is replaced, which a subclass's own forward calls too; modules of other
    models, in other threads, run as ever.
    """
    exporter = Exporter(model)
    kinds = (
        (LSTM, Exporter.lstm),
        (LSTMCell, Exporter.cell),
        (CNNLSTM, Exporter.cnn),
    )
    with _lock, contextlib.ExitStack() as stack:
        stack.callback(exporter.detach)
        exporter.attach()
        # Before other hooks, which may change weights.
        stack.callback(model.register_forward_pre_hook(exporter.start, prepend=True).remove)
        for kind, traced in kinds:
            stack.callback(setattr, kind, "forward", kind.forward)
            kind.forward = _replaced(kind.forward, traced, exporter)
        yield exporter.refusals


def _replaced(original: Any, traced: Any, exporter: Exporter) -> Any:
    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Not by identity: torch.export runs a copy of a module that has two names.
        if getattr(self, NAME, None) is not None:
            return exporter.run(traced, self, *args, **kwargs)
        if isinstance(self, (LSTM, LSTMCell)):
            exporter.refuse_stranger(self)
        return original(self, *args, **kwargs)

    return forward
