"""Models as folders: config.json and model.safetensors, as on a model hub."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from dfm_fast import _checks
from dfm_fast.models._files import on_meta, read_json, read_weights

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class Pretrained(nn.Module):
    """A module that keeps the arguments of its constructor in `config`, and is saved with them."""

    config: dict[str, Any]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors to `folder`. Each is written under a temporary
        name and renamed, the weights first: a folder that was whole stays so."""
        from safetensors.torch import save

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # Tensors that share memory, or a part of a larger one, would be saved wrongly or twice.
        state = {name: v.detach().contiguous().cpu() for name, v in self.state_dict().items()}
        config = {"_class_name": type(self).__name__, **self.config}
        write_bytes(folder / WEIGHTS, save(state, metadata={"format": "pt"}))
        write_bytes(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        **changes: Any,
    ) -> Self:
        """The model that `save_pretrained` wrote, in eval mode.

        Args:
            folder: a local path.
            device, dtype: of its parameters; dtype None keeps the saved one.
            changes: arguments of the constructor that replace the saved ones.

        Raises:
            FileNotFoundError: no such file. ValueError: another class's folder, a damaged file,
                arguments that the class does not take, or weights of other names, shapes or kinds
                than the model's; named.
        """
        folder = Path(folder)
        config = read_json(folder / CONFIG)
        if (saved := config.pop("_class_name", cls.__name__)) != cls.__name__:
            raise ValueError(f"{cls.__name__}: {folder}: expected its own folder, got {saved}'s")
        state = read_weights(folder / WEIGHTS)
        model = on_meta(folder / CONFIG, lambda: cls(**{**config, **changes}), state)
        check_state(f"{cls.__name__}: {folder}", model, state)
        dtype = dtype or next(v.dtype for v in state.values() if v.is_floating_point())
        model = model.to(dtype).to_empty(device=device)
        model.load_state_dict(state)
        model.reset_buffers()
        return model.eval()

    def reset_buffers(self) -> None:
        """Fill the buffers that are not saved."""


def config_of(model: Any) -> Any:
    """Of a model of diffusers or transformers, which type checkers know as a module and no more."""
    return model.config


def check_state(op: str, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise one ValueError that names every key that is missing, unknown, of another shape, or no
    floating-point numbers where the model's are."""
    own = model.state_dict()
    wrong = [f"{name}: missing" for name in own.keys() - state.keys()]
    wrong += [f"{name}: not in the model" for name in state.keys() - own.keys()]
    wrong += [
        f"{name}: expected shape {list(own[name].shape)}, got {list(state[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    wrong += [
        f"{name}: expected {own[name].dtype}, got {state[name].dtype}"
        for name in own.keys() & state.keys()
        if own[name].is_floating_point() != (state[name].dtype in _checks.FLOATING)
    ]
    if wrong:
        raise ValueError(f"{op}: weights do not fit: " + "; ".join(sorted(wrong)))


def write_bytes(path: Path, data: bytes) -> None:
    """Under a temporary name in the same folder, then renamed: never half of a file."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
