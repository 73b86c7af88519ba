"""Render moving textures with numpy: data without a download, for demos and tests.

A scene is a coloured random field with the amplitude spectrum of natural images that pans and zooms slowly, and a few
textured sprites with soft edges that move in front of it. Their motion is the class. `Synthetic` renders clips on the
fly; `python -m vidtwin.datamodules.synthetic OUT` writes a small data set in UCF-101's layout.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vidtwin.data import SPLITS, ClipSettings
from vidtwin.errors import UserError
from vidtwin.storage.resumable import read_json
from vidtwin.video import write_video

from .clips import ClipDataset, Video
from .data_module import ClipDataModule

Array = NDArray[np.float32]
FILE_FPS = 25
_GENERATOR = 1  # to be raised if the same arguments give other pictures
_TEST_GROUPS = range(1, 8)


def _bounce(time: Array, v: Array) -> tuple[Array, Array, Array]:
    triangle = [1 - np.abs((v[k] + v[k + 2] * time) % 2 - 1) * 2 for k in (0, 1)]
    return 0.75 * triangle[0], 0.75 * triangle[1], np.ones_like(time)


def _drift(time: Array, v: Array) -> tuple[Array, Array, Array]:
    # Leaves at one edge and returns at the other.
    x = (v[0] + v[2] * time + 1.4) % 2.8 - 1.4
    return x, 0.8 * (v[1] - 1) + 0.1 * np.sin(time * v[3]), np.ones_like(time)


def _fall(time: Array, v: Array) -> tuple[Array, Array, Array]:
    phase = (v[0] + time * (0.5 + 0.3 * v[3])) % 1.0  # parabolas between two touches of the ground
    return 0.8 * np.sin(v[1] * 3 + v[2] * time), 0.7 - 1.4 * 4 * phase * (1 - phase), np.ones_like(time)


def _orbit(time: Array, v: Array) -> tuple[Array, Array, Array]:
    angle = 2 * np.pi * (v[0] + (0.3 + 0.3 * v[3]) * time * np.sign(v[2]))
    radius = 0.35 + 0.2 * v[1]
    return radius * np.cos(angle), radius * np.sin(angle), np.ones_like(time)


def _sway(time: Array, v: Array) -> tuple[Array, Array, Array]:
    return 0.7 * np.sin(2 * np.pi * (v[0] + 0.5 * v[2] * time)), 0.7 * (v[1] - 1) + 0.05 * time, np.ones_like(time)


def _zoom(time: Array, v: Array) -> tuple[Array, Array, Array]:
    scale = np.exp(0.6 * np.sin(2 * np.pi * (v[0] + (0.3 + 0.2 * v[3]) * time)))
    return 0.6 * (v[1] - 1) + 0.05 * time, 0.4 * np.sign(v[2]) * (v[3] - 0.5) + 0 * time, scale


Motion = Callable[[Array, Array], tuple[Array, Array, Array]]
# Time in seconds (T,) and four random numbers → x, y in [-1, 1] about the centre, and scale, (T,) each.
MOTIONS: dict[str, Motion] = {
    "Bounce": _bounce,
    "Drift": _drift,
    "Orbit": _orbit,
    "Zoom": _zoom,
    "Fall": _fall,
    "Sway": _sway,
}


def _field(random: np.random.Generator, side: int, slope: float, channels: int) -> Array:
    """Make a periodic random field (side, side, channels): amplitude 1 / f^slope, mean 0, deviation 1 per channel."""
    fy, fx = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]
    frequency = np.hypot(fy, fx)
    frequency[0, 0] = np.inf
    noise = random.standard_normal((channels, side, side), dtype=np.float32)
    field = np.fft.irfft2(np.fft.rfft2(noise) / np.maximum(frequency, 1.5 / side) ** slope, s=(side, side))
    field = (field - field.mean((1, 2), keepdims=True)) / field.std((1, 2), keepdims=True)
    return np.ascontiguousarray(field.transpose(1, 2, 0), dtype=np.float32)


def _texture(random: np.random.Generator, side: int, colour: Array, contrast: float, slope: float) -> Array:
    """Make a texture (side, side, 3) in 0…255 about a colour (3,) in 0…1; light varies most, hue a little."""
    light = _field(random, side, slope, 1)
    tint = _field(random, side, slope + 0.2, 3) * 0.35
    # A sigmoid, so that dark and bright scenes keep their texture instead of being clipped.
    return (255 / (1 + np.exp(-contrast * (light + tint)) * (1 / colour - 1))).astype(np.float32)


def _colour(random: np.random.Generator) -> Array:
    """Draw a mean colour (3,) in 0…1, from dark to bright and from grey to vivid."""
    hue, saturation, light = random.uniform(0, 2 * np.pi), random.uniform(0, 0.45), random.uniform(0.15, 0.85)
    wheel = np.cos(hue + np.array([0, 2, 4]) * np.pi / 3)
    return (light + saturation * wheel * (0.3 + light) * 0.6).clip(0.04, 0.96).astype(np.float32)


def _sample(texture: Array, rows: Array, columns: Array) -> Array:
    """Sample a periodic texture bilinearly on the grid rows × columns, one axis after the other to save time."""
    side = texture.shape[0]
    for axis, places in enumerate((rows, columns)):
        low = np.floor(places).astype(np.int64)
        weight = (places - low).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        first = np.take(texture, low % side, axis=axis)
        second = np.take(texture, (low + 1) % side, axis=axis)
        second -= first
        second *= weight
        second += first
        texture = second
    return texture


def render(
    random: np.random.Generator, motion: str, times: Sequence[float] | NDArray[np.floating], size: tuple[int, int]
) -> Iterator[NDArray[np.uint8]]:
    """Yield a random scene's frames, uint8 (H, W, 3), at times in seconds; `size` is (width, height)."""
    width, height = size
    time = np.asarray(times, dtype=np.float32)
    short = min(size)
    background_colour = _colour(random)
    texture = _texture(random, 1 << (max(size) - 1).bit_length(), background_colour, random.uniform(0.6, 1.1), 1.5)
    pan = random.uniform(-0.12, 0.12, 2) * short
    zoom = 1 + random.uniform(0.0, 0.15) * np.sin(random.uniform(0, 6) + 1.2 * time)
    sprites = [_Sprite(random, motion, time, size, background_colour) for _ in range(random.integers(2, 5))]
    rows = np.arange(height, dtype=np.float32) - (height - 1) / 2
    columns = np.arange(width, dtype=np.float32) - (width - 1) / 2
    for index, moment in enumerate(time):
        frame = _sample(texture, rows / zoom[index] + pan[1] * moment, columns / zoom[index] + pan[0] * moment)
        for sprite in sprites:
            sprite.draw(frame, index)
        yield (frame + 0.5).astype(np.uint8)


class _Sprite:
    """A textured blob with a soft edge, its path and its scale."""

    def __init__(
        self, random: np.random.Generator, motion: str, time: Array, size: tuple[int, int], background: Array
    ) -> None:
        colours = [_colour(random) for _ in range(4)]
        colour = max(colours, key=lambda c: float(np.abs(c - background).sum()))  # stands out from the background
        side = 64
        axis = np.linspace(-1, 1, side, dtype=np.float32)
        power, aspect = random.uniform(1.6, 5.0), random.uniform(0.6, 1.0)
        x, y = np.abs(axis[None]) / aspect, np.abs(axis[:, None])
        distance = (x**power + y**power) ** (1 / power)
        alpha = ((0.92 - distance) / 0.12).clip(0, 1)
        shade = 1.12 - 0.35 * np.hypot(axis[None] + 0.35, axis[:, None] + 0.35)  # lit from the upper left
        skin = (_texture(random, side, colour, random.uniform(0.6, 1.1), 1.8) * shade[..., None]).clip(0, 255)
        # Premultiplied by opacity, so that sampling leaves no fringe at the edge.
        self.patch = np.concatenate([skin * alpha[..., None], alpha[..., None]], axis=2).astype(np.float32)
        radius = random.uniform(0.12, 0.24) * min(size)
        numbers = random.uniform([0, 0, 0.35, 0], [2, 2, 1.0, 1]).astype(np.float32)
        numbers[2] *= random.choice([-1, 1])
        x_path, y_path, scale = MOTIONS[motion](time, numbers)
        self.x = (x_path + 1) / 2 * size[0]
        self.y = (y_path + 1) / 2 * size[1]
        self.radius = radius * scale

    def draw(self, frame: Array, index: int) -> None:
        """Blend the sprite into a frame (H, W, 3), in place."""
        x, y, radius = float(self.x[index]), float(self.y[index]), float(self.radius[index])
        top, bottom = max(0, int(y - radius)), min(frame.shape[0], int(y + radius) + 1)
        left, right = max(0, int(x - radius)), min(frame.shape[1], int(x + radius) + 1)
        if top >= bottom or left >= right:
            return
        scale, last = (self.patch.shape[0] - 1) / (2 * radius), self.patch.shape[0] - 1
        rows = ((np.arange(top, bottom) - y + radius) * scale).clip(0, last).astype(np.float32)
        columns = ((np.arange(left, right) - x + radius) * scale).clip(0, last).astype(np.float32)
        drawn = _sample(self.patch, rows, columns)
        window = frame[top:bottom, left:right]
        window *= 1 - drawn[..., 3:]
        window += drawn[..., :3]


class SyntheticClips(ClipDataset):
    """Rendered clips; training draws new scenes in every epoch."""

    def __init__(self, length: int, split: str, settings: ClipSettings, classes: list[str]) -> None:
        self.length, self.split, self.classes = length, split, classes
        assert settings.num_frames is not None  # `Synthetic` checks both
        assert settings.size is not None
        self.num_frames, self.size, self.seed = settings.num_frames, settings.size, settings.seed
        self.rates = [FILE_FPS if rate is None else rate for rate in settings.rates]
        self.training = settings.draws(split)

    def __len__(self) -> int:
        return self.length

    def identity(self, index: int) -> tuple[str, int]:
        return f"{self.classes[index % len(self.classes)]}/{self.split}_{index:05d}", 0

    def clip(self, epoch: int, index: int) -> dict[str, Any]:
        label = index % len(self.classes)
        scene = epoch if self.training else 0
        random = np.random.default_rng((self.seed, SPLITS.index(self.split), scene, index))
        rate = self.rates[0]
        if self.training and len(self.rates) > 1:  # from its own generator, so that it changes no scene
            rate = float(np.random.default_rng((self.seed, scene, index)).choice(self.rates))
        times = np.arange(self.num_frames) / rate
        frames = np.stack(list(render(random, self.classes[label], times, self.size[::-1])))
        name, start = self.identity(index)
        return {"clip": frames, "label": label, "name": name, "start_frame": start}


class Synthetic(ClipDataModule):
    """Clips of moving textures, rendered on the fly without files.

    Args:
        num_train: Training clips per epoch; each epoch renders new ones, or with `augment: false` those of the first.
        num_val: Validation clips, always the same.
        num_test: Test clips, always the same.
        num_classes: Number of kinds of motion, at most 6.
        **kwargs: Arguments of `ClipDataModule`.
    """

    def __init__(
        self, num_train: int = 256, num_val: int = 32, num_test: int = 32, num_classes: int = 4, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        of_files = {"eval_clips": "middle", "frame_steps": "timed", "resize": "area"}
        for key, usual in of_files.items():
            if (given := getattr(self.settings, key)) != usual:
                raise UserError(f"Expected data.{key}: {usual} for clips that are rendered, not read, got {given}.")
        for key in ("num_frames", "resolution"):
            if getattr(self.settings, key) is None:
                raise UserError(f"Expected data.{key} of clips that are rendered, not read, got null; give a number.")
        self.lengths = {"train": num_train, "val": num_val, "test": num_test}
        self.classes = _choose_motions(num_classes)

    def videos(self, split: str) -> list[Video]:
        raise UserError("Synthetic clips have no files.")

    def class_names(self) -> list[str]:
        return self.classes

    def make_dataset(self, split: str) -> SyntheticClips:
        return SyntheticClips(self.lengths[split], split, self.settings, self.classes)

    def cache_key(self, split: str) -> dict[str, Any]:
        return {"generator": _GENERATOR, "seed": self.settings.seed, "lengths": self.lengths, "classes": self.classes}

    def protocol(self) -> dict[str, Any]:
        rendered = {"crop": "none", "resize": "none", "colour": "rendered", "clip": "rendered", "generator": _GENERATOR}
        return {**super().protocol(), **rendered, "seed": self.settings.seed}


def _choose_motions(num_classes: int) -> list[str]:
    if not 1 <= num_classes <= len(MOTIONS):
        raise UserError(f"Expected 1 to {len(MOTIONS)} classes of motion, got {num_classes}.")
    return sorted(list(MOTIONS)[:num_classes])


def write_ucf_like(
    root: Path | str,
    classes: int = 4,
    groups: int = 25,
    clips: int = 3,
    size: tuple[int, int] = (160, 120),
    frames: int = 60,
    seed: int = 0,
) -> Path:
    """Write a data set in UCF-101's layout with its lists: .avi files of MPEG-4 with 25 frames per second.

    It appears under its name only when it is complete. One made with the same arguments is left as it is.

    Args:
        root: Folder that will hold `UCF-101` and `ucfTrainTestlist`.
        classes: Number of kinds of motion, at most 6.
        groups: Groups per class, 3 to 25, spread over g01 to g25: 1 to 7 are the test data, as in UCF-101.
        clips: Videos per group and class.
        size: Width and height in pixels.
        frames: Frames per video.
        seed: Seed of all content.

    Raises:
        UserError: `root` holds something else; nothing is overwritten.
    """
    root = Path(root)
    if not 3 <= groups <= 25:
        raise UserError(f"Expected 3 to 25 groups, got {groups}: UCF-101 has g01 to g25.")
    names = _choose_motions(classes)
    recipe = {
        "generator": _GENERATOR, "classes": classes, "groups": groups, "clips": clips, "size": list(size),
        "frames": frames, "seed": seed,
    }  # fmt: skip
    if root.exists() and any(root.iterdir()):
        found = root / "synthetic.json"
        made_with = read_json(found) or "something else"
        if made_with != recipe:
            raise UserError(f"{root}: expected data made with {recipe}, got {made_with}; delete or rename it.")
        return root
    partial = root.with_name(f".{root.name}.{os.getpid()}.partial")
    try:
        lists: dict[str, list[str]] = {"classInd": [], "trainlist01": [], "testlist01": []}
        of_class = [int(number) for number in np.linspace(1, 25, groups).round()]
        for label, name in enumerate(names):
            lists["classInd"].append(f"{label + 1} {name}")
            for group, clip in product(of_class, range(1, clips + 1)):
                random = np.random.default_rng((seed, label, group, clip))
                file = f"{name}/v_{name}_g{group:02d}_c{clip:02d}.avi"
                pictures = render(random, name, np.arange(frames) / FILE_FPS, size)
                write_video(partial / "UCF-101" / file, pictures, FILE_FPS, codec="mpeg4")
                if group in _TEST_GROUPS:
                    lists["testlist01"].append(file)  # without a label, like the official one
                else:
                    lists["trainlist01"].append(f"{file} {label + 1}")
        (partial / "ucfTrainTestlist").mkdir()
        for list_name, lines in lists.items():
            path = partial / "ucfTrainTestlist" / f"{list_name}.txt"
            path.write_bytes("".join(f"{line}\r\n" for line in lines).encode())
        (partial / "synthetic.json").write_text(json.dumps(recipe) + "\n")
        root.parent.mkdir(parents=True, exist_ok=True)
        if root.exists():
            root.rmdir()
        os.replace(partial, root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m vidtwin.datamodules.synthetic", description="Write a small UCF-101.")
    parser.add_argument("root", metavar="OUT", type=Path, help="folder that will hold UCF-101 and ucfTrainTestlist")
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--groups", type=int, default=25)
    parser.add_argument("--clips", type=int, default=3, help="videos per group and class")
    parser.add_argument("--size", type=int, nargs=2, default=(160, 120), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        root = write_ucf_like(**vars(args))
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{root}: {args.classes * args.groups * args.clips} videos in UCF-101's layout\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
