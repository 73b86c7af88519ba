"""Interface of the data: batches of clips, the settings that choose them, and the methods of data modules."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, Protocol, TypedDict

from torch import Tensor
from torch.utils.data import DataLoader

from vidtwin.errors import UserError

SPLITS = ("train", "val", "test")
_CONSTANT = 1e-10  # of a channel's mean square: a variance below is a rounding error
Skip = tuple[str, str] | tuple[str, str, bool]  # name, reason; False if the video is intact and ends before the clip


class Clip(TypedDict, total=False):
    """One clip of a dataset; an unreadable one has `skipped` alone."""

    clip: Tensor  # uint8 (T, H, W, 3)
    label: int  # -1 if there is no class
    name: str
    start_frame: int  # frame of the file that is shown first
    padded: int  # frames at the end that repeat the one before
    skipped: list[Skip]  # videos that could not be read on the way to this clip


class Batch(TypedDict):
    """Clips on the device, identified by their names and start frames."""

    clip: Tensor  # float32 (B, 3, T, H, W) in [-1, 1]
    label: Tensor  # int64 (B,)
    name: list[str]
    start_frame: Tensor  # int64 (B,)
    padded: NotRequired[Tensor]  # int64 (B,)
    indices: NotRequired[list[int]]  # from a chunk loader: the dataset's indices of these clips


@dataclass(frozen=True)
class ClipSettings:
    """Choice of the clips of a video. All settings are options of each data module of clips (`--data.num_frames`).

    Args:
        num_frames: Frames per clip, T; null, in evaluation alone: each video is one clip, whatever `eval_clips`, `tail`
            and `short_videos` say.
        resolution: Side of the square picture in pixels; [height, width]; or null, in evaluation alone: the whole
            picture at its own size, with square pixels.
        fps: Frames per second of the clip; null takes every frame of the video. From a list, training draws a rate for
            each clip among those that the video has, and evaluation takes the first. A video of a lower rate repeats
            frames in training and is refused in evaluation.
        seed: Seed of all random choices: order, start, crop, mirroring.
        horizontal_flip: Mirror half of the training clips, if `augment`.
        augment: Draw start, crop and mirroring of the training clips at random, differently in each epoch; "windows"
            draws the start alone, among the multiples of `num_frames`: with `fps: null` the windows of `vidtwin
            encode`; false takes the clip in the middle of each video, to overfit on purpose.
        short_videos: Treatment of a video that ends before the clip does: "skip", or "loop", which starts it again.
        eval_clips: Clips that evaluation takes of a video: the one in the "middle", the "first" one, or "all", one
            after the other from the first frame on; two clips of a video differ in `start_frame`.
        tail: Treatment of the frames left over at a video's end by "all": "drop" leaves them out, "pad" repeats the
            last one until their clip is full, also for a video shorter than a clip, whatever `short_videos` says.
        frame_steps: Frames that evaluation takes at `fps`: "timed", those shown at the times k / fps, or "whole", every
            n-th frame of the file, n being the video's rate / fps rounded, and at least 1. So no video is refused for
            its rate: 30 of 25 frames a second are all frames (VidTok, VidTwin).
        resize: Filter: "area" (swscale) of the cropped picture, or "bilinear", antialiased as torchvision's, of the
            picture that is then cropped. It chooses the conversion of colours too, also of pictures at their own size.
    """

    num_frames: int | None = 16
    resolution: int | list[int] | None = 224
    fps: float | list[float] | None = 8.0
    seed: int = 0
    horizontal_flip: bool = True
    augment: bool | Literal["windows"] = True
    short_videos: Literal["skip", "loop"] = "skip"
    eval_clips: Literal["middle", "first", "all"] = "middle"
    tail: Literal["drop", "pad"] = "drop"
    frame_steps: Literal["timed", "whole"] = "timed"
    resize: Literal["area", "bilinear"] = "area"

    def __post_init__(self) -> None:
        if self.num_frames is not None and self.num_frames < 1:
            raise UserError(f"Expected data.num_frames of at least 1, or null for whole videos, got {self.num_frames}.")
        if self.resolution is not None:
            sides = self.resolution if isinstance(self.resolution, Sequence) else [self.resolution] * 2
            if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
                raise UserError(
                    "Expected data.resolution to be a side of at least 1, [height, width], or null for the videos' own "
                    f"size, got {self.resolution}."
                )
            # Equal sides are a square, under whatever name: its clips, hashes and caches are the same.
            object.__setattr__(self, "resolution", sides[0] if sides[0] == sides[1] else list(sides))
        rates, fps = self.rates, self.fps
        if not rates or any(rate is not None and rate <= 0 for rate in rates) or (None in rates and len(rates) > 1):
            raise UserError(f"Expected data.fps above 0, a list of such rates, or null for every frame, got {fps}.")
        choices = {
            "augment": (True, False, "windows"),
            "short_videos": ("skip", "loop"),
            "eval_clips": ("middle", "first", "all"),
            "tail": ("drop", "pad"),
            "frame_steps": ("timed", "whole"),
            "resize": ("area", "bilinear"),
        }
        for key, allowed in choices.items():
            value = getattr(self, key)
            if value not in allowed:
                names = [str(each).lower() for each in allowed]
                listed = f"{', '.join(names[:-1])} or {names[-1]}"
                raise UserError(f"Expected data.{key} to be {listed}, got {value!r}.")
        if self.tail == "pad" and self.eval_clips != "all":
            raise UserError(
                f"Expected data.eval_clips: all with data.tail: pad, got {self.eval_clips}, which has no tail."
            )

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels; None: those of each video."""
        if self.resolution is None:
            return None
        height, width = (self.resolution,) * 2 if isinstance(self.resolution, int) else self.resolution
        return height, width

    @property
    def varies(self) -> bool:
        """True if clips differ in length or size, so that no two of them make a batch."""
        return self.num_frames is None or self.resolution is None

    def check(self, split: str) -> None:
        """Raise `UserError` if a split can't have such clips."""
        if split == "train" and self.varies:
            key = "num_frames" if self.num_frames is None else "resolution"
            raise UserError(
                f"Expected data.{key} of training clips, which come in batches, got null; only evaluation takes it."
            )

    @property
    def rates(self) -> list[float | None]:
        """`fps` as a list."""
        return list(self.fps) if isinstance(self.fps, Sequence) else [self.fps]

    def draws(self, split: str) -> bool:
        """Return whether each epoch of a split draws other clips."""
        return split == "train" and bool(self.augment)

    def takes_all(self, split: str) -> bool:
        """Return whether a split has all clips of each video."""
        return split != "train" and self.eval_clips == "all" and self.num_frames is not None

    def takes_first(self, split: str) -> bool:
        """Return whether a split has the first clip of each video."""
        return split != "train" and self.eval_clips == "first" and self.num_frames is not None

    def takes_whole(self, split: str) -> bool:
        """Return whether a split has each video as one clip."""
        return split != "train" and self.num_frames is None

    def steps_whole(self, split: str) -> bool:
        """Return whether a split has every n-th frame of a file instead of those at given times."""
        return split != "train" and self.frame_steps == "whole" and self.rates[0] is not None

    def pads(self, split: str) -> bool:
        """Return whether a split fills up the last clip of each video."""
        return self.takes_all(split) and self.tail == "pad"

    def short_rule(self, split: str) -> str:
        """Return how a split treats a video shorter than a clip: "skip", "loop", "pad", or "none" if none can be."""
        if self.takes_whole(split):
            return "none"
        return "pad" if self.pads(split) else self.short_videos


class NamedClips(Protocol):
    """Evaluation clips, identified without decoding them."""

    def __len__(self) -> int: ...

    def identity(self, index: int) -> tuple[str, int]:
        """Return a clip's video name and start frame."""
        ...

    def shape(self, index: int) -> tuple[int, int, int]:
        """Return a clip's frames, height and width; its video may end a few frames before."""
        ...


class ClipSource(ABC):
    """Interface of data modules whose evaluation clips are fixed and identified by name.

    Training only needs a `LightningDataModule` whose batches are `Batch`es. Sweeps, results, the cache and the exchange
    of unreadable videos between ranks need this interface.

    Attributes:
        settings: Settings of the clips.
        eval_batch_size: Clips per batch and device in evaluation.
        skipped: Split → name → reason of the videos that could not be used; grows as clips are read.
    """

    settings: ClipSettings
    eval_batch_size: int
    skipped: dict[str, dict[str, str]]

    @property
    def num_frames(self) -> int | None:
        """Frames per clip; None: those of each video."""
        return self.settings.num_frames

    @property
    def resolution(self) -> int | list[int] | None:
        """Side of the square picture in pixels, or [height, width]; None: the size of each video."""
        return self.settings.resolution

    @property
    def eval_fps(self) -> float | None:
        """Frames per second of evaluation clips; None: those of each video."""
        return self.settings.rates[0]

    @property
    def eval_clips(self) -> Literal["middle", "first", "all"]:
        """Clips that evaluation takes of a video."""
        return self.settings.eval_clips

    @abstractmethod
    def dataset(self, split: str) -> NamedClips:
        """Return the clips of a split, created on first use; `UserError` if the data are unusable."""

    @abstractmethod
    def chunk_loader(
        self, split: str, chunks: Sequence[Sequence[int]], device_type: str = "cpu", processes: int = 1
    ) -> DataLoader[Any]:
        """Load given evaluation clips without a trainer: one batch per list of indices, in their order."""

    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """Describe the test clips: equal descriptions mean equal clips."""

    def class_names(self) -> list[str]:
        """Return the names of the labels of training clips, by label; none for clips without classes."""
        return []

    def digests(self, split: str = "test") -> dict[str, str]:
        """Return the SHA-256 of the content of each video of a split, by name; none for clips that are not of files."""
        return {}

    @abstractmethod
    def share_skipped(self, gather: Callable[[Any], list[Any]]) -> None:
        """Merge `skipped` of all ranks, at a point that all of them reach.

        Args:
            gather: A value of this rank → those of all ranks, in their order.

        Raises:
            UserError: On all ranks, if too many videos are broken.
        """

    @abstractmethod
    def write_cache(
        self,
        out: Any,
        splits: Sequence[str] = SPLITS,
        epochs: int = 1,
        format: Literal["clips", "videos"] = "clips",
        verify: bool = False,
    ) -> Sequence[Any]:
        """Write the clips, or the video files, of some splits as shards → one printable summary per split."""


def is_varying(variance: Tensor, mean_square: Tensor) -> Tensor:
    """Return whether each channel of latents varies by more than rounding errors, so that its scale may divide it.

    Args:
        variance: Variance of each channel.
        mean_square: Mean of its squares, of the same shape.
    """
    return variance > _CONSTANT * mean_square


@dataclass(frozen=True)
class LatentDescription:
    """Description of latents on disk.

    Attributes:
        folder: Where they are.
        model: The autoencoder that encoded: class_path, weights_sha256; checkpoint, config and use_ema as the user gave
            them.
        shapes: Shape for one clip of each continuous latent, without batch axis.
        codes: Shape of the codes of each quantized latent.
        statistics: Mean and standard deviation of each channel of each continuous latent, as the data have them.
        classes: Names of the labels; empty without.
        num_frames: Frames of a clip.
        size: Height and width of the pictures.
        fps: Frames per second of the clips.
        num_clips: Number of training clips.
    """

    folder: str
    model: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    codes: dict[str, tuple[int, ...]]
    statistics: dict[str, tuple[list[float], list[float]]]
    classes: list[str]
    num_frames: int
    size: tuple[int, int]
    fps: float
    num_clips: int


class LatentSource(ABC):
    """Interface of data modules of latents, whose batches are {"latents", "codes", "label", "name", …}."""

    @abstractmethod
    def describe_latents(self) -> LatentDescription:
        """Describe the latents of the training; `UserError` if they are unusable."""

    @abstractmethod
    def denormalize(self, latents: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn the latents of a batch into those that the autoencoder decodes."""
