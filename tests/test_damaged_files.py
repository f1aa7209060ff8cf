"""What is read from files that others wrote: a right result, or an error that names the file. Never
code that runs, a hang, memory out of proportion to the file, or a folder changed by reading it.

`make fuzz` draws many more damages, and others every time.
"""

import contextlib
import io
import json
import os
import pickle
import resource
import signal
import tarfile
import warnings
import zipfile
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from damages import copied, damage_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from strategies import profile

from dfm_fast._library import INTERPRET
from dfm_fast.models import SnapGenPipeline
from dfm_fast.training import latents, recipes, saved, videos
from dfm_fast.training.checkpoints import Checkpoints, load
from dfm_fast.training.config import FlowConfig
from dfm_fast.training.datasets import DataConfig, open_dataset

pytestmark = [
    pytest.mark.skipif(INTERPRET, reason="no kernels in it"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
SECONDS, MEGABYTES = 10, 300  # for one file of some kilobytes; of a processor's time
MODEL = {
    "in_channels": [1, 1], "patch_sizes": [2, 4], "hidden_size": 16, "depth": 1, "num_heads": 2,
    "num_classes": 3, "input_size": [2, 2],
}  # fmt: skip
RECIPE = recipes.Recipe(
    MODEL, FlowConfig(sample_steps=(1, 1)), None, (1, 8, 8), 3, ("a", "b", "c"), "digits"
)


# --- What can be damaged: a folder, and what opens it ---------------------------------------------


def write_checkpoint(folder):
    model = RECIPE.build_model()
    state = {"model": model.state_dict(), "ema": model.state_dict(), "progress": {"step": 3}}
    Checkpoints(folder / "checkpoints").save(3, state, RECIPE)


def write_exported(folder):
    recipes.export(folder, RECIPE, RECIPE.build_model())


def write_pipeline(folder):
    from test_snapgen_pipeline import class_pipeline

    class_pipeline().save_pretrained(folder)


def write_latents(folder):
    x = torch.randn(5, 4, 3, 2)
    items = [(v, i % 3) for i, v in enumerate(x)]
    info = latents.LatentInfo(
        (4, 3, 2), 5, 3, "float32", ("a", "b", "c"), "AutoencoderKL", "f", (1.0,), (0.0,)
    )
    info.write(folder)
    latents.write_shard(latents.shard_path(folder, 0), items[:3], x[:3])
    latents.write_shard(latents.shard_path(folder, 1), items[3:], x[3:])


def picture(seed=0, size=12):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    return Image.fromarray(pixels)


def write_images(folder):
    (folder / "a").mkdir(parents=True)
    for i, kind in enumerate(("png", "jpg", "gif", "tif", "webp", "bmp", "ppm")):
        picture(i).save(folder / "a" / f"{i}.{kind}")


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def png(seed=0):
    buffer = io.BytesIO()
    picture(seed).save(buffer, "png")
    return buffer.getvalue()


def write_tars(folder):
    with tarfile.open(folder / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(3):
            add(tar, f"{i}.png", png(i))
            add(tar, f"{i}.cls" if i else f"{i}.json", b"1" if i else b'{"label": 2}')
        add(tar, "a" * 120 + ".png", png(4))  # a name that takes a header of its own


def write_videos(folder):
    clip = torch.linspace(-1, 1, 3 * 6 * 16 * 16).view(3, 6, 16, 16)
    videos.write_clip(folder / "a.mp4", clip)
    videos.write_clip(folder / "b.gif", clip)


def samples(name, **options):
    """What opens a dataset and reads all of it."""

    def read(folder):
        data = open_dataset(DataConfig(name, root=folder, **options))
        items = [data[i] for i in range(len(data))]
        assert all(x.shape == data.shape and x.dtype == torch.float32 for x, _ in items)
        assert all(0 <= label < max(1, data.num_classes) for _, label in items)

    return read


KINDS = {
    "checkpoint": (write_checkpoint, saved.open_model),
    "exported": (write_exported, saved.open_model),
    "pipeline": (write_pipeline, SnapGenPipeline.from_pretrained),
    "latents": (write_latents, samples("latents")),
    "images": (write_images, samples("images", size=8)),
    "webdataset": (write_tars, samples("webdataset", size=8)),
    "videos": (write_videos, samples("videos", size=8, frames=2)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One of each kind."""
    made = {}
    for name, (write, read) in KINDS.items():
        made[name] = tmp_path_factory.mktemp(name)
        write(made[name])
        read(made[name])
    return made


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB


class Late(BaseException):
    """Which nothing takes for a damage."""


@contextlib.contextmanager
def in_bounds():
    """A time limit; no more memory than `MEGABYTES`."""

    def late(*_):
        raise Late(f"not read in {SECONDS} s")

    before, old = peak(), signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
    assert peak() - before < MEGABYTES, f"{peak() - before:.0f} MB more"


def _error(read, folder):
    try:
        read(folder)
    except (ValueError, FileNotFoundError) as error:
        return str(error)


def check_read(read, folder):
    """Read, or refused by an error that names something in the folder; nothing else happens."""
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with in_bounds(), warnings.catch_warnings(action="ignore"):
        told = _error(read, folder)
    assert told is None or (str(folder) in told and len(told) > len(str(folder)) + 10), told
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("kind", KINDS)
@profile(10)
@given(data=st.data())
def test_damaged(kind, data, folders, tmp_path_factory):
    damage = data.draw(damage_of(folders[kind]))
    place = copied(folders[kind], tmp_path_factory.getbasetemp() / f"damaged-{kind}", damage)
    check_read(KINDS[kind][1], place)


# --- Files that somebody made with intent ---------------------------------------------------------


class Payload:
    """What a pickle runs: it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def refused(kind, folder, message, error=ValueError):
    with in_bounds(), pytest.raises(error, match=message) as caught:
        KINDS[kind][1](folder)
    assert str(folder) in str(caught.value)


def step(folder):
    return folder / "checkpoints" / "step-00000003"


def index_of(folder):
    with (step(folder) / ".metadata").open("rb") as file:
        return pickle.load(file)


def change_index(folder, change):
    """The index of a checkpoint, where `change` gives what replaces each part of its files."""
    index = index_of(folder)
    index.storage_data = {k: change(k, v) for k, v in index.storage_data.items()}
    (step(folder) / ".metadata").write_bytes(pickle.dumps(index))


def test_no_code_in_a_checkpoint_runs(tmp_path):
    made = tmp_path / "made"
    write_checkpoint(tmp_path)
    (step(tmp_path) / ".metadata").write_bytes(pickle.dumps(Payload(made)))
    refused("checkpoint", tmp_path, r"damaged checkpoint: UnpicklingError: posix\.mkdir is no part")
    assert not made.exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_no_code_in_the_values_of_a_checkpoint_runs(tmp_path):
    """Numbers and texts are pickles of their own."""
    made, path = tmp_path / "made", tmp_path / "step-00000001"
    dcp.save({"progress": {"step": Payload(made)}}, checkpoint_id=path)
    with pytest.raises(ValueError, match=f"{path}: damaged checkpoint: UnpicklingError: Weights"):
        load(path, {"progress": {"step": 0}})
    assert not made.exists()
    again = tmp_path / "step-00000002"
    values = {"step": 3, "flow": {"seed": 1, "counts": [1, 2.5], "name": None}}
    dcp.save({"progress": values}, checkpoint_id=again)
    state = {"progress": {"step": 0, "flow": {"seed": 0, "counts": [], "name": ""}}}
    assert load(again, state)["progress"] == values


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..", "x/../../secret"])
def test_a_checkpoint_reads_its_own_files_alone(name, tmp_path):
    write_checkpoint(tmp_path)
    change_index(tmp_path, lambda _, part: replace(part, relative_path=name))
    refused("checkpoint", tmp_path, "expected a file of the checkpoint, got")


def test_a_checkpoint_holds_what_its_index_claims(tmp_path):
    write_checkpoint(tmp_path)
    first = next(iter(index_of(tmp_path).storage_data.values()))
    change_index(tmp_path, lambda _, part: replace(part, length=1 << 50))
    refused("checkpoint", tmp_path, r"expected \d+ bytes or more, got \d+")
    # All parts at one place: a small file that would be many tensors.
    change_index(tmp_path, lambda _, part: replace(part, offset=0, length=first.length * 100))
    refused("checkpoint", tmp_path, r"expected \d+ bytes or more, got \d+")


def test_a_large_model_that_is_not_there(tmp_path):
    """Sizes in a recipe and an index, of terabytes: nothing of that size is made."""
    write_checkpoint(tmp_path)
    recipe = json.loads((step(tmp_path) / "recipe.json").read_text())
    recipe["model"] |= {"hidden_size": 1 << 20}
    (step(tmp_path) / "recipe.json").write_text(json.dumps(recipe))
    refused("checkpoint", tmp_path, "does not fit the model: ema.*expected shape")
    index = index_of(tmp_path)
    for value in index.state_dict_metadata.values():
        if hasattr(value, "size"):
            value.size = torch.Size((1 << 20,) * 2)
    (step(tmp_path) / ".metadata").write_bytes(pickle.dumps(index))
    refused("checkpoint", tmp_path, r"expected \d+ bytes, got \d+")


def test_a_compressed_tensor_is_not_unpacked(tmp_path):
    """torch reads compressed archives too: 32 MB in 32 kB."""
    write_checkpoint(tmp_path)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(32 << 20))
    data = buffer.getvalue()
    (step(tmp_path) / "bomb.distcp").write_bytes(data * len(index_of(tmp_path).storage_data))
    starts = iter(range(0, 1 << 60, len(data)))
    bomb = {"relative_path": "bomb.distcp", "length": len(data)}
    change_index(tmp_path, lambda _, part: replace(part, offset=next(starts), **bomb))
    refused("checkpoint", tmp_path, "expected at most .* bytes, got .* when unpacked")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 10**9}, "at most .* parameters"),
        ({"input_size": [10**5, 10**5]}, "expected buffers of at most"),
        ({"hidden_size": "16"}, "config.json"),
        ({"import_module": "os"}, "config.json: TypeError"),
        ({"_class_name": "SnapGenUNet"}, "expected its own folder, got SnapGenUNet's"),
    ],
)
def test_a_configuration_of_another_model(changes, message, tmp_path):
    write_exported(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    refused("exported", tmp_path, message)


def test_weights_of_another_kind(tmp_path):
    from safetensors.torch import load_file, save_file

    write_exported(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({k: v.long() for k, v in state.items()}, tmp_path / "model.safetensors")
    refused("exported", tmp_path, r"patch_bias: expected torch\.float32, got torch\.int64")


@pytest.mark.parametrize("name", ["../unet", "/tmp", "unet/../../x", "os"])
def test_a_pipeline_has_known_parts_alone(name, tmp_path):
    write_pipeline(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["components"][name] = "SnapGenUNet"
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    refused("pipeline", tmp_path, f"components in .*: expected some of .*, got {name}")


def test_latents_of_a_number_that_nobody_has(tmp_path):
    write_latents(tmp_path)
    info = json.loads((tmp_path / "latents.json").read_text())
    (tmp_path / "latents.json").write_text(json.dumps({**info, "samples": 10**18}))
    refused("latents", tmp_path, "without shard-00002", FileNotFoundError)


def test_a_tar_that_leads_back_to_itself(tmp_path):
    """A negative size: the next header is this one."""
    info = tarfile.TarInfo("0.png")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (-512 % (1 << 96)).to_bytes(12)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "0.tar").write_bytes(bytes(header) + bytes(1024))
    refused("webdataset", tmp_path, "unreadable")


def test_a_label_of_gigabytes(tmp_path):
    """A sparse file: what is not stored would be read as zeros."""
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "0.png", png())
        info = tarfile.TarInfo("0.cls")
        info.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 34)}
        info.size = 1
        tar.addfile(info, io.BytesIO(b"1"))
    check_read(KINDS["webdataset"][1], tmp_path)


def test_a_picture_of_gigabytes(tmp_path):
    """A header of 60000 x 60000 pixels, and nothing else."""
    chunk = b"IHDR" + (60000).to_bytes(4) * 2 + bytes((8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4)
    data += (0).to_bytes(4) + b"IDAT" + zlib.crc32(b"IDAT").to_bytes(4)
    (tmp_path / "0.png").write_bytes(data)
    refused("images", tmp_path, r"0\.png: unreadable \(DecompressionBombError")
