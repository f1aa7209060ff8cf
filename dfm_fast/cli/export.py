"""`dfm-fast export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dfm_fast.cli import _configs

if TYPE_CHECKING:
    from dfm_fast.models._pretrained import Pretrained
    from dfm_fast.models.exports import Exported

PROG, OP = "dfm-fast export", "export"
PARTS = ("unet", "decoder")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model",
        type=Path,
        help="a folder that save_pretrained wrote, a pipeline's, a training folder or a checkpoint",
    )
    add("--out", type=Path, required=True, help="a file in a folder that is there")
    add("--format", help="onnx or pt2; default: the ending of --out")
    add("--part", help="of a pipeline: unet (default) or decoder")
    add("--levels", type=int, help="of a DFM transformer: how many are active; default: all")
    add("--size", type=int, nargs="+", help="(frames) height width to fix; default: any, of images")
    add("--opset", type=int, help="of ONNX, 18 to 23; default: 20")
    add(
        "--weights",
        default="float32",
        help="float32 (default), or int8: a quarter of the file; needs torchao",
    )
    add("--no-check", action="store_true", help="do not run the file")


def run(args: argparse.Namespace) -> int:
    return _configs.reported(PROG, lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from dfm_fast.models import exports
    from dfm_fast.training.outputs import RunError

    opset = exports.OPSET if args.opset is None else args.opset
    format = exports.check_file(args.out, args.format, opset)
    weights = exports.check_weights(args.weights)
    model = _model(args.model, args.part, args.size)
    options = {"levels": args.levels, "size": args.size, "opset": opset, "weights": weights}
    try:
        made = exports.export_model(
            model, args.out, format=format, check=not args.no_check, **options
        )
    except exports.ParityError as error:
        raise RunError(str(error)) from error
    _tell(made, format, args.no_check)


def _tell(made: Exported, format: str, unchecked: bool) -> None:
    width = max(map(len, made.inputs))
    for name, sizes in made.inputs.items():
        print(f"{name:<{width}} [{', '.join(map(str, sizes))}]")
    if made.rounding is not None:
        print(f"int8 weights: at most {made.rounding:.1e} of the largest value from the model")
    if made.parity:
        error, plain = (max(getattr(p, key) for p in made.parity) for key in ("error", "plain"))
        print(f"run: {error:.1e} from the model in float64 (plain torch in float32: {plain:.1e})")
    elif not unchecked:
        print(f"not run: no runtime of {format} is installed (pip install onnxruntime)")
    print(made.file)


# --- What is exported -----------------------------------------------------------------------------


def _model(path: Path, part: str | None, size: list[int] | None) -> Pretrained:
    """float32. Raises FileNotFoundError where there is none."""
    import torch

    from dfm_fast import _checks
    from dfm_fast.models import SnapGenDecoder, SnapGenUNet, snapgen_folders
    from dfm_fast.training import loop, saved

    pipeline = snapgen_folders.pipeline_in(path)
    if pipeline is not None:
        part = _checks.choice(OP, "--part", "unet" if part is None else part, PARTS)
        path = pipeline / part
        if not path.is_dir():
            _checks.fail(OP, "--part", f"a part of {pipeline}", part)
    elif part is not None:
        _checks.fail(OP, "--part", f"none, as {path} is no pipeline", part)
    for folder in (path, path / loop.EXPORT):
        for kind in (SnapGenUNet, SnapGenDecoder):
            if saved.class_name(folder) == kind.__name__:
                return kind.from_pretrained(folder, dtype=torch.float32)
    recipe, model = saved.open_model(path)
    if len(recipe.shape) == 4 and (size is None or len(size) != 3):
        _checks.fail(OP, "--size", "frames, height and width, as samples are videos", size)
    return model.float()
