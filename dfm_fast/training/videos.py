"""A folder of videos as clips, by PyAV; clips as MP4 or GIF files."""

from __future__ import annotations

import bisect
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dfm_fast import _checks
from dfm_fast.training.datasets import (
    DataConfig,
    Dataset,
    Item,
    files_by_class,
    report_skipped,
    require,
)
from dfm_fast.training.images import (
    Substituting,
    Unusable,
    squared,
    to_pixels,
    too_small,
    unreadable,
)

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif")


@dataclass(frozen=True)
class Video:
    path: Path
    label: int
    times: tuple[int, ...]  # of the frames, ascending, in the stream's time base


def opened(config: DataConfig, split: str) -> Dataset:
    """The videos below the split's folder."""
    require("av", "av", config.name)
    require("PIL", "pillow", config.name)
    files, names = files_by_class(config, split, SUFFIXES)
    size, span = config.size or 256, (config.frames - 1) * config.frame_stride + 1

    def probe(file: tuple[Path, int]) -> Video | str:
        try:
            return Video(*file, _times(file[0], size, span))
        except Unusable as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(probe, files))
    videos = [video for video in found if isinstance(video, Video)]
    skipped = [
        (str(f[0]), r) for f, r in zip(files, found, strict=True) if not isinstance(r, Video)
    ]
    report_skipped(config, skipped, len(videos))
    data = Clips(videos, names, (config.frames, config.frame_stride, size), config.strict)
    data.skipped = skipped
    return data


class Clips(Substituting):
    """Clips one after the other through every video; x is [3, T, H, W]."""

    def __init__(
        self,
        videos: Sequence[Video],
        class_names: Sequence[str],
        geometry: tuple[int, int, int],  # frames, stride, size
        strict: bool,
    ) -> None:
        super().__init__(class_names, strict)
        self.videos = videos
        self.frames, self.stride, size = geometry
        self.shape = (3, self.frames, size, size)
        span = (self.frames - 1) * self.stride + 1
        counts = [len(video.times) // span for video in videos]
        self.span, self.ends = span, np.cumsum(counts).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    def place(self, index: int) -> tuple[Video, int]:
        """(video, its first frame) of a clip."""
        v = bisect.bisect_right(self.ends, index)
        return self.videos[v], (index - (self.ends[v - 1] if v else 0)) * self.span

    def name(self, index: int) -> str:
        video, start = self.place(index)
        return f"{video.path} (frame {start})"

    def read(self, index: int) -> Item:
        video, start = self.place(index)
        times = video.times[start : start + self.span : self.stride]
        return torch.stack(list(_frames(video.path, times, self.shape[-1])), 1), video.label


# --- Reading --------------------------------------------------------------------------------------


def _times(path: Path, size: int, frames: int) -> tuple[int, ...]:
    """Times of all frames, from the packets: nothing is decoded."""
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            sides = stream.codec_context.width, stream.codec_context.height
            times = sorted(p.pts for p in container.demux(stream) if p.pts is not None)
    except Exception as error:  # of FFmpeg, and of PyAV where a stream is not what it says
        raise unreadable(error) from error
    if reason := too_small(sides, size):
        raise Unusable(reason)
    if len(times) < frames:
        raise Unusable(f"{len(times)} frames, a clip needs {frames}")
    return tuple(times)


def _frames(path: Path, times: Sequence[int], size: int) -> Iterator[Tensor]:
    """[3, size, size] at each of the times, from the key frame before the first of them on."""
    import av

    wanted = list(times)
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            container.seek(wanted[0], stream=stream)
            for frame in container.decode(stream):
                # A time that no decoded frame has is taken over by the next frame.
                while wanted and frame.pts is not None and frame.pts >= wanted[0]:
                    yield squared(frame.to_image(), size)
                    wanted.pop(0)
                if not wanted:
                    return
    except Exception as error:
        raise unreadable(error) from error
    raise Unusable(f"{len(wanted)} frames missing at its end")


# --- Writing --------------------------------------------------------------------------------------


def write_clip(path: str | os.PathLike[str], clip: Tensor, *, fps: int = 8) -> None:
    """A clip as a file, under a temporary name until it is whole.

    Args:
        path: ends in .mp4 (H.264; odd sides get a repeated row or column) or .gif.
        clip: [C, T, H, W] in [-1, 1], C 1 or 3.
        fps: frames per second.
    """
    if clip.ndim != 4 or clip.shape[0] not in (1, 3):
        _checks.fail("write_clip", "clip", "[C, T, H, W] with C 1 or 3", list(clip.shape))
    write_frames(path, to_pixels(clip.movedim(1, 0)), fps=fps)


def write_frames(path: str | os.PathLike[str], frames: np.ndarray, *, fps: int = 8) -> None:
    """`write_clip` of pixels, uint8 [T, H, W, 3]."""
    path = Path(path)
    _checks.choice("write_clip", "path's suffix", path.suffix, (".mp4", ".gif"))
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    try:
        (_write_mp4 if path.suffix == ".mp4" else _write_gif)(name, frames, fps)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _write_mp4(name: str, frames: np.ndarray, fps: int) -> None:
    av = require("av", "av", "write_clip")
    height, width = frames.shape[1:3]
    # Colour has half the resolution: sides are even.
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), "edge")
    with av.open(name, "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "16"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def _write_gif(name: str, frames: np.ndarray, fps: int) -> None:
    require("PIL", "pillow", "write_clip")
    from PIL import Image

    first, *rest = (Image.fromarray(pixels) for pixels in frames)
    first.save(name, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
