"""Data: what comes out of pictures, videos and shards, and what is said of bad ones."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from helpers import run_python
from PIL import Image

from dfm_fast._library import INTERPRET
from dfm_fast.training import datasets, images, videos
from dfm_fast.training.datasets import DataConfig, open_dataset

pytestmark = pytest.mark.skipif(INTERPRET, reason="no kernels in it")


def pixels(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path, array, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **kwargs)
    return path


def opened(root, **kwargs):
    return open_dataset(DataConfig("images", root=root, **{"size": 8, **kwargs}))


# --- Embedded -------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn_in_two_fixed_parts():
    from sklearn.datasets import load_digits

    train, test = (open_dataset(DataConfig("digits", size=8), s) for s in ("train", "test"))
    assert (len(train), len(test), train.num_classes) == (1437, 360, 10)
    both = torch.cat((train.x, test.x)).view(-1, 64)
    expected = torch.tensor(load_digits().data, dtype=torch.float32) / 8 - 1
    assert torch.equal(rows(both), rows(expected))  # every digit once, at its values
    for data in (train, test):  # every class in both, by its share
        counts = data.labels.bincount(minlength=10)
        assert (counts / len(data) - 0.1).abs().max() < 0.01
    x, label = open_dataset(DataConfig("digits"))[0]
    assert x.shape == (1, 16, 16)
    assert isinstance(label, int)
    assert torch.equal(open_dataset(DataConfig("digits"))[0][0], x)


def rows(x):
    return x[np.lexsort(x.numpy().T)]


def test_digits_without_labels():
    data = open_dataset(DataConfig("digits", labels=False))
    assert data.num_classes == 0
    assert {data[i][1] for i in range(30)} == {0}


@pytest.mark.parametrize(("size", "stride"), [(64, 4), (48, 7), (32, 16)])
def test_crops_of_photographs_share_no_pixel_between_splits(size, stride):
    seen = []
    for split in ("train", "test"):
        data = open_dataset(DataConfig("photos", size=size, crop_stride=stride), split)
        masks = [torch.zeros(p.shape[1:], dtype=torch.bool) for p in data.pictures]
        for picture, top, left in data.places.tolist():
            masks[picture][top : top + size, left : left + size] = True
        seen.append(masks)
    for train, test in zip(*seen, strict=True):
        assert not (train & test).any()
        assert train.float().mean() > 0.4
        assert test.float().mean() > 0.1


def test_crops_are_the_photographs_pixels():
    data = open_dataset(DataConfig("photos"))
    assert len(data) > 10_000
    x, label = data[1234]
    picture, top, left = data.places[1234].tolist()
    crop = data.pictures[picture][:, top : top + 64, left : left + 64]
    assert label == 0
    assert torch.equal(((x + 1) * 127.5).round().byte(), crop)


# --- Pictures -------------------------------------------------------------------------------------


def test_modes(tmp_path):
    """Whatever the mode, the same picture comes out."""
    grey = pixels(8, 8, 0)
    rgb = np.stack([grey] * 3, -1)
    alpha = np.full((8, 8, 1), 255, np.uint8)
    palette = Image.fromarray(grey)
    palette = palette.convert("P")
    files = {
        "grey": save(tmp_path / "grey.png", grey),
        "rgb": save(tmp_path / "rgb.png", rgb),
        "rgba": save(tmp_path / "rgba.png", np.concatenate((rgb, alpha), -1)),
        "grey_alpha": save(tmp_path / "la.png", np.concatenate((grey[..., None], alpha), -1)),
        "16-bit": save(tmp_path / "16.png", grey.astype(np.uint16) * 257),
        "cmyk": tmp_path / "cmyk.tif",
        "palette": tmp_path / "p.png",
    }
    palette.save(files["palette"])
    Image.fromarray(rgb).convert("CMYK").save(files["cmyk"])
    expected = torch.tensor(rgb).permute(2, 0, 1) / 127.5 - 1
    for name, path in files.items():
        x = images.read_picture(path, 8)
        assert (x - expected).abs().max() < 1e-6, name


def test_sixteen_bits_are_kept(tmp_path):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) + 30000
    x = images.read_picture(save(tmp_path / "a.png", values), 8)
    expected = torch.tensor(values.astype(np.float64)) / 32767.5 - 1
    assert (x.double() - expected).abs().max() < 1e-6


def test_transparent_pixels_are_white(tmp_path):
    array = np.zeros((8, 8, 4), np.uint8)
    array[:4, :, 3] = 255
    x = images.read_picture(save(tmp_path / "a.png", array), 8)
    assert (x[:, :4] == -1).all()
    assert (x[:, 4:] == 1).all()
    palette = Image.fromarray(np.zeros((8, 8), np.uint8)).convert("P")
    palette.save(tmp_path / "p.png", transparency=0)
    assert (images.read_picture(tmp_path / "p.png", 8) == 1).all()


def test_centre_crop_and_antialiased_resize(tmp_path):
    array = np.zeros((64, 200, 3), np.uint8)
    array[:, 68:132:2] = 255  # the middle square: columns of one pixel, black and white
    x = images.read_picture(save(tmp_path / "a.png", array), 8)
    assert x[:, :, 1:-1].abs().max() < 0.02  # grey: without antialiasing all black or all white


def test_orientation_is_applied(tmp_path):
    array = np.zeros((8, 8, 3), np.uint8)
    array[:4] = 255
    exif = Image.Exif()
    exif[274] = 6  # to be turned right by a quarter
    x = images.read_picture(save(tmp_path / "a.png", array, exif=exif), 8)
    assert (x[:, :, 4:] == 1).all()
    assert (x[:, :, :4] == -1).all()


# --- Folders --------------------------------------------------------------------------------------


def test_folder_of_classes(tmp_path):
    for i, name in enumerate(("dog", "cat", "cat")):
        save(tmp_path / "train" / name / f"{i}.png", pixels(8, 8, seed=i))
    save(tmp_path / "test" / "dog" / "3.jpg", pixels(9, 30))
    data = opened(tmp_path / "train")
    assert data.class_names == ("cat", "dog")
    assert [data[i][1] for i in range(3)] == [0, 0, 1]
    assert data.shape == data[0][0].shape == (3, 8, 8)
    assert opened(tmp_path / "train", labels=False).num_classes == 0
    config = DataConfig("images", root=tmp_path / "train", test_root=tmp_path / "test", size=8)
    test = open_dataset(config, "test")
    assert test.num_classes == 2  # the training data's, so that a label means the same
    assert test[0][1] == 1
    with pytest.raises(ValueError, match="open_dataset: test_root: expected a path"):
        open_dataset(DataConfig("images", root=tmp_path / "train"), "test")


def test_flat_folder_is_unconditional(tmp_path):
    save(tmp_path / "a.png", pixels(8, 8))
    data = opened(tmp_path)
    assert (len(data), data.num_classes, data[0][1]) == (1, 0, 0)


def test_linked_class_folders_are_read(tmp_path):
    """Into their depths, and a folder that leads back into itself only once."""
    save(tmp_path / "elsewhere" / "deep" / "0.png", pixels(8, 8))
    save(tmp_path / "data" / "b" / "1.png", pixels(8, 8, seed=1))
    for name in "ac":
        (tmp_path / "data" / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "b" / "back").symlink_to(tmp_path / "data")
    data = opened(tmp_path / "data")
    assert data.class_names == ("a", "b", "c")
    found = [(str(path.relative_to(tmp_path / "data")), label) for path, label in data.files]
    assert found == [("a/deep/0.png", 0), ("b/1.png", 1), ("c/deep/0.png", 2)]


def test_hidden_folders_are_no_data(tmp_path):
    for name in ("a", "b", ".cache", "b/.ipynb_checkpoints"):
        save(tmp_path / name / "0.png", pixels(8, 8))
    data = opened(tmp_path)
    assert (len(data), data.class_names) == (2, ("a", "b"))
    assert [data[i][1] for i in range(2)] == [0, 1]


def test_a_stray_picture_takes_the_labels_with_a_warning(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / name / "0.png", pixels(8, 8))
    save(tmp_path / "stray.png", pixels(8, 8))
    with pytest.warns(UserWarning, match=r"1 files lie in .* itself \(stray.png .*no labels"):
        assert opened(tmp_path).num_classes == 0
    assert opened(tmp_path, labels=False).num_classes == 0  # as asked for


def bad_folder(root):
    good = save(root / "0.png", pixels(40, 40))
    save(root / "1_small.png", pixels(7, 40))
    (root / "2_text.jpg").write_text("not a picture")
    (root / "3_empty.png").touch()
    (root / "4_cut.png").write_bytes(good.read_bytes()[:2000])  # its header is fine
    save(root / "5.png", pixels(40, 40, seed=5))
    return root


def test_bad_files_are_skipped_counted_and_named(tmp_path):
    with pytest.warns(UserWarning, match="3 of 6 files skipped: .*1_small.png: 40 x 7 is smaller"):
        data = opened(bad_folder(tmp_path))
    assert len(data) == 3
    assert [name.rsplit("/")[-1] for name, _ in data.skipped] == [
        "1_small.png",
        "2_text.jpg",
        "3_empty.png",
    ]
    with pytest.warns(UserWarning, match=r"4_cut.png: unreadable \(OSError"):
        x, _ = data[1]
    assert torch.equal(x, data[2][0])  # the next one stands in
    assert torch.equal(x, data[1][0])  # and is read with no further warning
    assert len(data.skipped) == 4
    with pytest.raises(IndexError):
        data[3]


def test_strict(tmp_path):
    bad_folder(tmp_path)
    with pytest.raises(ValueError, match=r"expected files that can be read .* got 3 of 6: "):
        opened(tmp_path, strict=True)
    for name in ("1_small.png", "2_text.jpg", "3_empty.png"):
        (tmp_path / name).unlink()
    data = opened(tmp_path, strict=True)
    with pytest.raises(ValueError, match=r"4_cut.png"):
        data[1]


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a folder, got .*nowhere"):
        opened(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"root: expected files \(.jpg.*got none in"):
        opened(tmp_path)
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match=r"1 of 1: .*a.png"):
        opened(tmp_path)
    with pytest.raises(ValueError, match="root: expected a path for images"):
        opened(None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "faces"}, "name: expected one of digits, photos"),
        ({"size": -1}, "size: expected at least 0"),
        ({"name": "photos", "size": 1000}, "size: expected crops that fit"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(ValueError, match=f"open_dataset: {message}"):
        open_dataset(DataConfig(**change))
    with pytest.raises(ValueError, match="split: expected one of train, test"):
        open_dataset(DataConfig(), "validation")
    with pytest.raises(ValueError, match="size: expected crops small enough for a test region"):
        open_dataset(DataConfig("photos", size=400), "test")


def test_a_missing_library_is_named():
    code = """
import sys; sys.modules["sklearn"] = None
from dfm_fast.training.datasets import DataConfig, open_dataset
open_dataset(DataConfig())
"""
    result = run_python("-c", code)
    assert "ImportError: open_dataset: digits: expected scikit-learn, got none" in result.stderr


# --- Videos ---------------------------------------------------------------------------------------


def ramp(frames, height=16, width=24):
    """Grey [3, T, H, W] that tells the number of its frame."""
    level = torch.linspace(-1, 1, frames).view(1, -1, 1, 1)
    return level.expand(3, frames, height, width)


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_clips_come_back(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    videos.write_clip(path, ramp(20))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    config = DataConfig("videos", root=tmp_path, size=16, frames=4, frame_stride=2)
    data = open_dataset(config)
    assert data.shape == (3, 4, 16, 16)
    assert len(data) == 2  # spans of 7 of its 20 frames
    for i in range(2):
        expected = ramp(20)[:, 7 * i : 7 * i + 7 : 2, :, :16]
        assert (data[i][0] - expected).abs().max() < 0.02


def test_odd_sides_and_one_channel(tmp_path):
    videos.write_clip(tmp_path / "a.mp4", ramp(5, 15, 17)[:1])
    data = open_dataset(DataConfig("videos", root=tmp_path, size=16, frames=5))
    assert (data[0][0] - ramp(5, 16, 16)).abs().max() < 0.02


def test_bad_videos(tmp_path):
    (tmp_path / "walk").mkdir()
    videos.write_clip(tmp_path / "walk" / "a.mp4", ramp(8))
    videos.write_clip(tmp_path / "walk" / "b.mp4", ramp(3))
    (tmp_path / "walk" / "c.mp4").write_text("not a video")
    config = DataConfig("videos", root=tmp_path, size=16, frames=4)
    with pytest.warns(UserWarning, match=r"2 of 3 .*b.mp4: 3 frames, a clip needs 4; .*c.mp4: "):
        data = open_dataset(config)
    assert (len(data), data.class_names) == (2, ("walk",))
    with pytest.raises(ValueError, match=r"clip: expected \[C, T, H, W\]"):
        videos.write_clip(tmp_path / "d.mp4", torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match="suffix: expected one of"):
        videos.write_clip(tmp_path / "d.avi", ramp(3))


# --- WebDataset -----------------------------------------------------------------------------------


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def png(seed):
    data = io.BytesIO()
    Image.fromarray(pixels(8, 8, seed=seed)).save(data, "PNG")
    return data.getvalue()


def test_webdataset(tmp_path):
    import webdataset

    pattern = str(tmp_path / "%03d.tar")
    with webdataset.ShardWriter(pattern, maxcount=2, verbose=0) as writer:
        for i in range(5):
            writer.write({"__key__": f"a/{i}", "png": png(i), "cls": i % 3})
    for root in (tmp_path, tmp_path / "{000..002}.tar"):
        data = open_dataset(DataConfig("webdataset", root=root, size=8))
        assert (len(data), data.num_classes) == (5, 3)
        for i in (4, 0, 2):
            x, label = data[i]
            assert label == i % 3
            values = ((x + 1) * 127.5).round().permute(1, 2, 0).numpy()
            assert (values == pixels(8, 8, seed=i)).all()


def test_webdataset_with_bad_samples(tmp_path):
    files = {
        "0.png": png(0),
        "0.json": json.dumps({"label": 1}).encode(),
        "1.txt": b"no picture",
        "2.png": png(2),
        "2.cls": b"two",
        "3.png": png(3)[:100],
        "3.cls": b"0",
    }
    write_tar(tmp_path / "0.tar", files)
    (tmp_path / "1.tar").write_text("not a tar")
    config = DataConfig("webdataset", root=tmp_path, size=8)
    with pytest.warns(UserWarning, match="3 of 5 files skipped: .*no picture.*label.*1.tar: unrea"):
        data = open_dataset(config)
    assert (len(data), data.num_classes) == (2, 2)
    with pytest.warns(UserWarning, match="0.tar: 3: unreadable"):
        assert data[1][1] == 1
    with pytest.raises(FileNotFoundError, match="expected tar files, got"):
        open_dataset(DataConfig("webdataset", root=tmp_path / "{0..3}.tar"))


# --- Captions -------------------------------------------------------------------------------------


def test_captions_beside_pictures(tmp_path):
    """One text is one class; subfolders are none."""
    texts = {"b/0": "a red  fox\n", "b/1": "snow", "2": "a red fox"}
    for name, text in texts.items():
        save(tmp_path / f"{name}.png", pixels(8, 8))
        (tmp_path / f"{name}.txt").write_text(text)
    data = opened(tmp_path, captions=True)
    assert data.class_names == ("a red fox", "snow")
    assert [data[i][1] for i in range(3)] == [0, 0, 1]
    assert opened(tmp_path, labels=False).class_names == ()


def test_pictures_without_captions_are_named(tmp_path):
    for name, text in (("a", b"snow"), ("b", None), ("c", b" \n"), ("d", b"\xff")):
        save(tmp_path / f"{name}.png", pixels(8, 8))
        if text is not None:
            (tmp_path / f"{name}.txt").write_bytes(text)
    named = r"3 of 4.*b\.png: no caption: b\.txt.*c\.png: caption: .*empty.*d\.png: .*UTF-8"
    with pytest.warns(UserWarning, match=named):
        data = opened(tmp_path, captions=True)
    assert (len(data), data.class_names) == (1, ("snow",))
    with pytest.raises(ValueError, match=named):
        opened(tmp_path, captions=True, strict=True)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"root: expected files .*4 of 4: .*a\.png: no caption"):
        opened(tmp_path, captions=True)
    for changes in ({"name": "digits"}, {"name": "images", "labels": False}):
        with pytest.raises(ValueError, match="captions: expected False"):
            open_dataset(DataConfig(root=tmp_path, captions=True, **changes))


def test_captions_in_shards(tmp_path):
    """Of a text, or of JSON; labels are not looked at."""
    words = {"caption": "the fox", "label": "none"}
    others = {"0.txt": b"snow", "0.cls": b"x", "1.json": json.dumps(words).encode()}
    others |= {"2.json": b"[]", "3.cls": b"1"}
    files = {**{f"{i}.png": png(i) for i in range(4)}, **others}
    write_tar(tmp_path / "0.tar", dict(sorted(files.items())))
    named = r'2 of 4 files.*: 2: caption: .*"caption".*: 3: no caption among'
    with pytest.warns(UserWarning, match=named):
        data = open_dataset(DataConfig("webdataset", root=tmp_path, size=8, captions=True))
    assert data.class_names == ("snow", "the fox")
    assert [data[i][1] for i in range(2)] == [0, 1]


def test_data_can_be_sent_to_the_workers_of_a_loader(tmp_path):
    save(tmp_path / "a.png", pixels(8, 8))
    loader = torch.utils.data.DataLoader(opened(tmp_path), num_workers=1)
    ((x, label),) = list(loader)
    assert x.shape == (1, 3, 8, 8)
    assert label.tolist() == [0]


def test_every_name_has_an_opener():
    from typing import get_args

    assert set(get_args(datasets.Name)) == set(datasets._OPENERS)
