"""Models as one graph of standard operators, for runtimes that know nothing of this library.

"pt2" is `torch.export`'s file, which any torch loads. "onnx" has operators of ONNX's own domain
alone. What stands for our operators: `ops/_decompositions.py`; weights of 8 bits: `_int8.py`. What
is written is looked at first: computed with in its runtime, held to the model in float64.
"""

from __future__ import annotations

import itertools
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from dfm_fast import _checks
from dfm_fast.models import _int8
from dfm_fast.models._exportable import OP, Examples, Exportable, exportable, quiet
from dfm_fast.models._pretrained import Pretrained
from dfm_fast.ops._decompositions import FORMS, ONNX_FORMS, StandardForms

FORMATS = ("onnx", "pt2")
WEIGHTS = ("float32", "int8")
OPSETS = range(18, 24)
OPSET = 20
# Beyond it weights are a file of their own: a protobuf message ends at 2^31 bytes.
LARGEST = 2**31 - 2**26
Run = Callable[[Examples], Sequence[Tensor]]


class ParityError(RuntimeError):
    """A file that does not compute what the model does."""


@dataclass(frozen=True)
class Parity:
    """How far an output is from the model in float64, relative to its largest value."""

    output: str
    shape: tuple[int, ...]
    error: float
    plain: float  # the error of the network in plain torch, in float32


@dataclass(frozen=True)
class Exported:
    file: Path
    inputs: dict[str, list[int | str]]  # names and sizes, those that are free by name
    outputs: tuple[str, ...]
    parity: tuple[Parity, ...]  # none where nothing could run the file
    rounding: float | None  # of int8: how far from the model, relative to an output's largest value


def export_model(
    model: Pretrained,
    file: str | os.PathLike[str],
    *,
    format: str | None = None,
    levels: int | None = None,
    size: Sequence[int] | None = None,
    opset: int = OPSET,
    weights: str = "float32",
    check: bool = True,
) -> Exported:
    """Write a SnapGenUNet, SnapGenDecoder or DFMTransformer as one file.

    Inputs are those of the model's forward: x, t, text, mask (and ids); latents; levels, t (and y),
    the levels a list of those that are active. The batch, the number of the text's tokens and the
    sides of maps are free, but for fixed `size`s.

    Args:
        model: in eval mode, float32, on the CPU.
        file: in a folder that is there. Weights beyond 2 GiB go to `file`.data beside it.
        format: "onnx" or "pt2"; None is what the file's ending says.
        levels: of a DFMTransformer, how many are active: a stage of the sampler. None: all.
        size: ((frames,) height, width) of the UNet's x, the decoder's latents or the DFM's finest
            level; None: any. Frames are always given.
        opset: of ONNX's domain.
        weights: "float32", or "int8": a quarter of the file. Those of linear layers and
            convolutions, but depthwise ones, are rounded by torchao, with a scale per output
            channel; a runtime computes in float32. The file is then held to the model with
            rounded weights, and this one to the given one: see `Exported.rounding`.
        check: run the file where its runtime is installed, and raise where it is not the model.

    Raises:
        TypeError, ValueError: arguments. ImportError: no onnx, no torchao. ParityError: the file's
            results are further from the model in float64 than twice plain torch's in float32 and
            one rounding; or 8 bits move an output by more than 5 % of its largest value.
    """
    file = Path(file)
    format = check_file(file, format, opset)
    check_weights(weights)
    given, rounding = exportable(model, levels, size), None
    traced = given.model
    if weights == "int8":
        traced = _int8.narrow(_twin(given.model))
        rounded = replace(given, model=_int8.rounded(_twin(given.model)))
        rounding, given = _rounding(given, rounded), rounded
        if check:
            _raise_if_rounded_off(rounding)
    program = _traced(given, traced, FORMS if format == "pt2" else FORMS | ONNX_FORMS)
    # In a folder of its own and renamed: never half of a file, nor one that is wrong.
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as made:
        written = Path(made) / file.name
        if format == "pt2":
            torch.export.save(program, written)
        else:
            _write_onnx(program, given, written, opset)
        run = _runner(written, format) if check else None
        parity = () if run is None else tuple(_parities(given, run))
        if run is not None and _is_off(parity):
            # Of few values plain torch's error may be small by chance: others are asked for.
            parity += tuple(_parities(given, run, seeds=(1, 2, 3)))
        _raise_if_off(parity)
        for part in sorted(Path(made).iterdir(), reverse=True):  # .data first
            os.replace(part, file.parent / part.name)
    return Exported(file, _sizes(program, given), given.outputs, parity, rounding)


# --- Arguments ------------------------------------------------------------------------------------


def check_file(file: Path, format: str | None, opset: Any) -> str:
    """The format; raises as `export_model`, before there is anything to write."""
    if format is None:
        format = file.suffix.removeprefix(".")
        if format not in FORMATS:
            _checks.fail(OP, "out", "a file that ends in .onnx or .pt2, or a format", file)
    _checks.choice(OP, "format", format, FORMATS)
    if not file.parent.is_dir():
        _checks.fail(OP, "out", "a file in a folder that is there", file)
    if file.is_dir():
        _checks.fail(OP, "out", "a file", f"{file}, a folder")
    if format == "onnx":
        if _checks.integer(OP, "opset", opset, OPSETS[0]) > OPSETS[-1]:
            _checks.fail(OP, "opset", f"at most {OPSETS[-1]}", opset)
        if missing := [n for n in ("onnx", "onnxscript") if find_spec(n) is None]:
            raise ImportError(
                f"{OP}: format: expected {' and '.join(missing)} to write ONNX, got none: "
                "pip install 'dfm_fast[export]'"
            )
    return format


def check_weights(weights: Any) -> str:
    """Raises as `export_model`."""
    if _checks.choice(OP, "weights", weights, WEIGHTS) == "int8":
        _int8.check_installed()
    return weights


# --- The graph ------------------------------------------------------------------------------------


def _traced(
    given: Exportable, model: nn.Module, forms: dict[Any, Callable[..., Any]]
) -> ExportedProgram:
    """`model` as `given` has it: without an operator of ours, nor what nobody reads."""
    module, examples = given.wrap(model).eval(), given.examples(2, given.grids[0])
    with torch.no_grad(), StandardForms(forms):
        program = torch.export.export(
            module, (), kwargs=examples, dynamic_shapes=given.dynamic, strict=False
        )
    program.graph.eliminate_dead_code()
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    program.graph_module.recompile()
    for name, v in program.state_dict.items():
        if v.untyped_storage().nbytes() > v.nbytes:  # a part of a larger one would be saved whole
            program.state_dict[name] = nn.Parameter(v.detach().clone(), requires_grad=False)
    ours = sorted({str(n.target) for n in program.graph.nodes if "dfm_fast" in str(n.target)})
    if ours:
        raise RuntimeError(f"{OP}: operators without a standard form: {', '.join(ours)}")
    return program


def _sizes(program: ExportedProgram, given: Exportable) -> dict[str, list[int | str]]:
    """Of the inputs by name, free ones in the names of `given`."""
    names = _symbols(program, given)
    return {
        n.name: [n if isinstance(n, int) else _renamed(str(n), names) for n in n.meta["val"].shape]
        for n in _inputs(program)
    }


def _inputs(program: ExportedProgram) -> list[torch.fx.Node]:
    names = program.graph_signature.user_inputs
    return [node for node in program.graph.nodes if node.name in names]


def _symbols(program: ExportedProgram, given: Exportable) -> dict[str, str]:
    """What the trace calls free sizes -> their names in `given`."""
    names: dict[str, str] = {}
    dims = pytree.tree_leaves(given.dynamic, is_leaf=lambda d: isinstance(d, dict) and 0 in d)
    for node, free in zip(_inputs(program), dims, strict=True):
        for axis, dim in free.items():
            (symbol,) = node.meta["val"].shape[axis].node.expr.free_symbols
            names[str(symbol)] = getattr(dim, "root", dim).__name__
    return names


def _renamed(size: str, names: dict[str, str]) -> str:
    return re.sub(r"[a-z]\w*", lambda match: names.get(match[0], match[0]), size)


# --- ONNX -----------------------------------------------------------------------------------------


def _write_onnx(program: ExportedProgram, given: Exportable, file: Path, opset: int) -> None:
    # Of packages that no model here needs, of what it leaves.
    with quiet("torch.onnx", "onnxscript"):
        made = torch.onnx.export(
            program, output_names=given.outputs, opset_version=opset, dynamo=True,
            verbose=False, optimize=False,
        )  # fmt: skip
        assert made is not None  # as dynamo=True
        _int8.to_dequantize_linear(made.model.graph)
        _simplify(made.model)
    _rename_sizes(made.model, _symbols(program, given))
    values = (value.const_value for value in made.model.graph.initializers.values())
    size = sum(value.nbytes for value in values if value is not None)
    made.save(file, external_data=size > LARGEST)


def _simplify(model: Any) -> None:
    """Constants folded, equal parts computed once. (The exporter's own optimiser also tries every
    node on a list of patterns, none of them here, and takes most of the time of an export.)"""
    import onnx_ir.passes.common as passes
    from onnxscript.optimizer import fold_constants_ir

    fold_constants_ir(model, onnx_shape_inference=True)
    for step in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
    ):
        step(model)


def _rename_sizes(model: Any, names: dict[str, str]) -> None:
    """Of all values; and what the exporter notes for its own debugging is left out."""
    import onnx_ir

    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    for value in values:
        sizes = () if value.shape is None else [getattr(n, "value", n) for n in value.shape]
        if any(isinstance(n, str) for n in sizes):
            sizes = [_renamed(n, names) if isinstance(n, str) else n for n in sizes]
            value.shape = onnx_ir.Shape(sizes)
    for node in model.graph:
        node.metadata_props.clear()


# --- What was written -----------------------------------------------------------------------------


def _runner(file: Path, format: str) -> Run | None:
    """Computes with the file; None where its runtime is not installed."""
    if format == "pt2":
        module = torch.export.load(file).module()
        return lambda examples: pytree.tree_leaves(module(**examples))
    import onnx

    onnx.checker.check_model(file)
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(examples: Examples) -> list[Tensor]:
        values = (value.numpy() for value in pytree.tree_leaves(examples))
        return [
            torch.from_numpy(y) for y in session.run(None, dict(zip(names, values, strict=True)))
        ]

    return run


@torch.no_grad()
def _parities(given: Exportable, run: Run, seeds: Sequence[int] = (0,)) -> Iterator[Parity]:
    """With the sizes of the trace, and with others."""
    wide = given.wrap(_twin(given.model, torch.float64))
    sizes = (2, given.grids[0]), (1, given.grids[-1])
    for seed, size in itertools.product(seeds, sizes):
        examples = given.examples(*size, seed)
        exact = pytree.tree_leaves(wide(**pytree.tree_map(_to_double, examples)))
        plain = pytree.tree_leaves(given.plain(given.model, **examples))
        for name, *values in zip(given.outputs, run(examples), plain, exact, strict=True):
            yield _parity(name, *values)


def _parity(name: str, got: Tensor, plain: Tensor, exact: Tensor) -> Parity:
    scale = exact.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    errors = (((y.double() - exact).abs().max() / scale).item() for y in (got, plain))
    return Parity(name, tuple(got.shape), *errors)


def _twin(model: Pretrained, dtype: torch.dtype = torch.float32) -> Pretrained:
    """With weights of its own."""
    with torch.device("meta"):
        twin = type(model)(**model.config)
    twin = twin.to(dtype).to_empty(device="cpu").eval()
    twin.load_state_dict(model.state_dict())
    twin.reset_buffers()
    return twin


@torch.no_grad()
def _rounding(given: Exportable, rounded: Exportable) -> float:
    """The largest of all outputs'."""
    examples = given.examples(2, given.grids[0])
    exact, found = (pytree.tree_leaves(g.wrap(g.model)(**examples)) for g in (given, rounded))
    pairs = zip(given.outputs, found, found, exact, strict=True)
    return max(_parity(*pair).error for pair in pairs)


def _raise_if_rounded_off(rounding: float) -> None:
    if not rounding <= _int8.BUDGET:
        raise ParityError(
            f"{OP}: weights: expected int8 to move no output by more than {_int8.BUDGET:.0%} of "
            f"its largest value, got {rounding:.1%}; nothing is written"
        )


def _to_double(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


def budget(parity: Sequence[Parity]) -> float:
    """What an error may be: twice that of plain torch, and one rounding. All outputs are judged as
    one: of a small one the largest of a few roundings says little."""
    return 2 * max(p.plain for p in parity) + torch.finfo(torch.float32).eps / 2


def _is_off(parity: Sequence[Parity]) -> bool:
    return not all(p.error <= budget(parity) for p in parity)


def _raise_if_off(parity: Sequence[Parity]) -> None:
    for p in parity:
        if not p.error <= budget(parity):
            raise ParityError(
                f"{OP}: {p.output} {list(p.shape)}: expected within {budget(parity):.1e} of the "
                f"model, got {p.error:.1e}; nothing is written"
            )
