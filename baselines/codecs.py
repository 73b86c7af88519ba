"""Codecs as rows of a table: x264, x265, SVT-AV1, JPEG of each frame, a smaller picture, a 3-D DCT.

Each encodes a clip to bytes and decodes it from these bytes alone; the bytes are its latent, and their number its size:
of a video codec the packets of the elementary stream, without a container. They have no weights, and nothing to train.

A codec codes 8-bit pictures: clips are rounded first.
"""

import io
import itertools
import math
import os
import struct
from abc import abstractmethod
from fractions import Fraction
from typing import Any, ClassVar, Literal, NoReturn, cast

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.bitstream import BitStreamFilterContext
from av.video.frame import VideoFrame
from einops import rearrange
from PIL import Image
from torch import Tensor

from vidtwin import entropy
from vidtwin.autoencoder import Coding, TemporalSpec, VideoAutoencoder
from vidtwin.errors import UserError
from vidtwin.posteriors import Encoding, Latents, Stream
from vidtwin.video.convert import from_uint8, round_to_uint8
from vidtwin.video.picture import FilterChain, Frames

_MATRIX = "matrix=bt601"
_FLAGS = "flags=bicubic+accurate_rnd"


class Codec(VideoAutoencoder):
    """Base of codecs: clips to bytes and back, one by one."""

    latent_names = ("stream",)
    codes_bytes = True

    def _encode(self, clip: Tensor) -> Encoding:
        pictures = rearrange(round_to_uint8(clip), "b c t h w -> b t h w c").to("cpu", torch.uint8).numpy()
        coded = [self.compress(frames) for frames in pictures]
        stream = Stream.pack(coded, [self.count(frames, code) for frames, code in zip(pictures, coded, strict=True)])
        return Encoding(stream=Stream(stream.value.to(clip.device), stream.numbers))

    def _decode(self, latents: Latents) -> Tensor:
        value = latents["stream"]
        clips = [torch.from_numpy(self.decompress(coded)) for coded in Stream.unpack(value)]
        return from_uint8(rearrange(torch.stack(clips), "b t h w c -> b c t h w").to(value.device))

    @abstractmethod
    def compress(self, frames: Frames) -> bytes:
        """Encode frames, uint8 (T, H, W, 3)."""

    @abstractmethod
    def decompress(self, coded: bytes) -> Frames:
        """Decode frames, uint8 (T, H, W, 3), from their bytes."""

    def count(self, frames: Frames, coded: bytes) -> int:
        """Count the numbers that the bytes stand for; those of a codec without a transform of its own are bytes."""
        return len(coded)

    def _latent_shapes(self, clip_shape: tuple[int, int, int, int]) -> NoReturn:
        name = type(self).__name__
        raise UserError(
            f"The size of {name}'s streams depends on the clips; measure it by `vidtwin test` without --meta."
        )

    @property
    def last_layer(self) -> NoReturn:
        raise UserError(f"{type(self).__name__} has nothing to train; run `vidtwin test` with it.")


class _VideoCodec(Codec):
    """A video codec of FFmpeg by PyAV, in one thread.

    Colours are converted to BT.601 of limited range and back by swscale, with its bicubic filter and exact rounding.

    Args:
        crf: Constant rate factor: the quality, less is better.
        preset: The encoder's preset: how much it tries.
        gop: Most frames from one keyframe to the next.
        pixel_format: Planes: yuv420p has a quarter of the chroma, yuv444p all of it.
        fps: Frames per second that the encoder is given.
    """

    encoder: ClassVar[str]
    decoder: ClassVar[str]
    label: ClassVar[str]
    container: ClassVar[str]  # a raw stream: it makes the encoder, and is not written
    best, worst = 1, 51
    formats: ClassVar[tuple[str, ...]] = ("yuv420p", "yuv444p")
    presets: ClassVar[tuple[str, ...]] = (
        *("ultrafast", "superfast", "veryfast", "faster", "fast"),
        *("medium", "slow", "slower", "veryslow", "placebo"),
    )
    filter: ClassVar[str | None] = None

    def __init__(
        self,
        crf: int = 30,
        preset: str = "medium",
        gop: int = 250,
        pixel_format: str = "yuv420p",
        fps: float = 8.0,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("preset", preset, self.presets),
            ("pixel_format", pixel_format, self.formats),
        ):
            if value not in known:
                raise UserError(f"Expected {name} of {self.label} to be one of {', '.join(known)}, got {value!r}.")
        if not self.best <= crf <= self.worst:
            raise UserError(f"Expected crf of {self.label} from {self.best} to {self.worst}, got {crf}.")
        if gop < 1:
            raise UserError(f"Expected gop of at least 1, got {gop}.")
        if not 0 < fps < math.inf:
            raise UserError(f"Expected fps above 0, got {fps}.")
        for name, mode in ((self.encoder, "w"), (self.decoder, "r")):
            try:
                av.Codec(name, cast(Literal["r", "w"], mode))
            except (av.codec.codec.UnknownCodecError, ValueError) as error:
                raise UserError(
                    f"Expected {name} in PyAV's FFmpeg for {self.label}, got a build without it; pip install a wheel "
                    "of av, which has it."
                ) from error
        self.crf, self.preset, self.gop, self.pixel_format = crf, preset, gop, pixel_format
        self.rate = Fraction(fps).limit_denominator(1001)
        self.spatial_multiple = 2 if pixel_format.startswith("yuv420") else 1
        run = f"{self.encoder}, preset {preset}"
        planes = f"GOP {gop}, {pixel_format}"
        others = {f"GOP {gop}": gop != 250, pixel_format: pixel_format != "yuv420p", f"{fps:g} fps": fps != 8}
        parts = [
            f"{self.label} {'preset ' if preset.isdigit() else ''}{preset}",
            *(text for text, chosen in others.items() if chosen),
        ]
        curve = ", ".join(parts)
        self.coding = Coding(curve, f"{run}, CRF {crf}, {planes}, {fps:g} fps")

    def options(self, height: int, width: int) -> dict[str, str]:
        """Return the options of the encoder for pictures of this size."""
        return {"preset": self.preset, "crf": str(self.crf), "g": str(self.gop)}

    def packets(self, frames: Frames) -> list[bytes]:
        """Encode frames, uint8 (T, H, W, 3), to the packets of an elementary stream."""
        os.environ.setdefault("SVT_LOG", "1")  # which SVT-AV1 reads: errors alone
        scale = f"out_color_{_MATRIX}:out_range=tv:{_FLAGS}+full_chroma_inp"
        convert = FilterChain("clip", ("scale", scale), ("format", self.pixel_format))
        height, width = frames.shape[1:3]
        try:
            with av.open(io.BytesIO(), "w", format=self.container) as container:
                options = self.options(height, width)
                stream: Any = container.add_stream(self.encoder, rate=self.rate, options=options)
                stream.height, stream.width = height, width
                stream.pix_fmt, stream.codec_context.thread_count = self.pixel_format, 1
                found = []
                for place, picture in enumerate(frames):
                    frame = convert(VideoFrame.from_ndarray(picture, format="rgb24"))
                    frame.pts, frame.time_base = place, 1 / self.rate
                    found += stream.encode(frame)
                found += stream.encode(None)
                if self.filter is not None:
                    unwanted = BitStreamFilterContext(self.filter, stream)
                    found = [kept for packet in found for kept in unwanted.filter(packet)]
        except (av.error.FFmpegError, ValueError) as error:
            raise UserError(
                f"Expected frames that {self.encoder} takes, got {width} x {height} pixels ({error})."
            ) from error
        return [bytes(packet) for packet in found]

    def compress(self, frames: Frames) -> bytes:
        return b"".join(self.packets(frames))

    def decompress(self, coded: bytes) -> Frames:
        context: Any = av.CodecContext.create(self.decoder, "r")
        context.thread_count = 1
        packets = [*context.parse(coded), *context.parse(b"")]
        frames = [frame for packet in [*packets, None] for frame in context.decode(packet)]
        scale = f"in_color_{_MATRIX}:in_range=tv:{_FLAGS}+full_chroma_int"
        convert = FilterChain("clip", ("scale", scale), ("format", "rgb24"))
        return np.stack([convert(frame).to_ndarray() for frame in frames])


class X264(_VideoCodec):
    """H.264 by x264. The text with x264's settings, which it writes into each stream (SEI), is left out.

    See `_VideoCodec` for the arguments.
    """

    encoder, decoder, label, container = "libx264", "h264", "x264", "h264"
    filter = "filter_units=remove_types=6"

    def options(self, height: int, width: int) -> dict[str, str]:
        # x264's assembly gives small pictures other bytes from run to run, even in one thread; its C code does not.
        small = {"x264-params": "asm=0"} if height * width <= 256 * 256 else {}
        return super().options(height, width) | small


class X265(_VideoCodec):
    """H.265 by x265, without the text with x265's settings. See `_VideoCodec` for the arguments."""

    encoder, decoder, label, container = "libx265", "hevc", "x265", "hevc"

    def options(self, height: int, width: int) -> dict[str, str]:
        # A picture of a single block of the largest size has other bytes in each run, even in one thread.
        if min(height, width) <= 16:
            raise UserError(f"Expected frames of more than 16 pixels a side for x265, got {width} x {height}.")
        block = next((size for size in (64, 32) if size < min(height, width)), 16)
        quiet = f"info=0:log-level=none:pools=none:frame-threads=1:ctu={block}"
        return super().options(height, width) | {"x265-params": quiet}


class SVTAV1(_VideoCodec):
    """AV1 by SVT-AV1; the presets are 0 (slowest) to 13. See `_VideoCodec` for the arguments."""

    encoder, decoder, label, container = "libsvtav1", "libdav1d", "SVT-AV1", "obu"
    worst = 63
    formats = ("yuv420p",)
    presets = tuple(map(str, range(14)))

    def __init__(
        self, crf: int = 35, preset: str = "6", gop: int = 250, pixel_format: str = "yuv420p", fps: float = 8.0
    ) -> None:
        super().__init__(crf, str(preset), gop, pixel_format, fps)

    def options(self, height: int, width: int) -> dict[str, str]:
        return super().options(height, width) | {"svtav1-params": "lp=1"}


class JPEG(Codec):
    """Each frame as a JPEG by Pillow, with the tables, which all frames share, once a clip.

    Args:
        quality: From 1 to 95.
        subsampling: Chroma: 4:2:0, 4:2:2 or 4:4:4.
    """

    _START, _END = b"\xff\xd8", b"\xff\xd9"

    def __init__(self, quality: int = 50, subsampling: Literal["4:2:0", "4:2:2", "4:4:4"] = "4:2:0") -> None:
        super().__init__()
        if not 1 <= quality <= 95:
            raise UserError(f"Expected quality of JPEG from 1 to 95, got {quality}.")
        if subsampling not in ("4:2:0", "4:2:2", "4:4:4"):
            raise UserError(f"Expected subsampling of 4:2:0, 4:2:2 or 4:4:4, got {subsampling!r}.")
        self.quality, self.subsampling = quality, subsampling
        curve = "JPEG" if subsampling == "4:2:0" else f"JPEG {subsampling}"
        self.coding = Coding(curve, f"JPEG of each frame, quality {quality}, {subsampling}, tables once a clip")

    def compress(self, frames: Frames) -> bytes:
        tables = self._write(frames[0], 1)
        return b"".join([tables, *(self._write(picture, 2) for picture in frames)])

    def decompress(self, coded: bytes) -> Frames:
        end = len(self._START)
        while coded[end : end + 2] != self._END:  # tables may hold the bytes of an end marker, as at quality 6
            end += 2 + int.from_bytes(coded[end + 2 : end + 4], "big")
        # In the coded data a byte of 255 is followed by 0: an end marker is one.
        pictures = [part + self._END for part in coded[end + 2 :].split(self._END)[:-1]]
        files = [coded[:end] + picture.removeprefix(self._START) for picture in pictures]
        return np.stack([np.array(Image.open(io.BytesIO(file))) for file in files])

    def _write(self, picture: Frames, kind: int) -> bytes:
        """Write a frame's tables (1) or the rest of it (2)."""
        file = io.BytesIO()
        Image.fromarray(picture).save(
            file, format="JPEG", quality=self.quality, subsampling=self.subsampling, streamtype=kind
        )
        return file.getvalue()


class Resize(Codec):
    """Smaller pictures without loss: shrunk by an area filter, WebP's lossless code of all, enlarged by a bicubic one.

    Args:
        factor: By which both sides shrink; 3 / factor² numbers a pixel are left.
    """

    _LONGEST = 16383  # rows of a WebP picture

    def __init__(self, factor: int = 8) -> None:
        super().__init__()
        if factor < 1:
            raise UserError(f"Expected factor of at least 1, got {factor}.")
        self.factor = self.spatial_multiple = factor
        self.coding = Coding("resize", f"sides / {factor}, area and bicubic, lossless WebP", numbers=True)

    def compress(self, frames: Frames) -> bytes:
        clip = torch.from_numpy(frames).permute(0, 3, 1, 2).double()
        small = F.avg_pool2d(clip, self.factor).round().to(torch.uint8).permute(0, 2, 3, 1)
        height = small.shape[1]
        files = []
        for part in small.split(self._LONGEST // height):
            file = io.BytesIO()
            picture = part.reshape(-1, *part.shape[2:]).contiguous().numpy()
            Image.fromarray(picture).save(file, format="WEBP", lossless=True, quality=100, method=6)
            files.append(file.getvalue())
        return struct.pack("<H", height) + b"".join(files)

    def decompress(self, coded: bytes) -> Frames:
        (height,) = struct.unpack("<H", coded[:2])
        parts, place = [], 2
        while place < len(coded):
            end = place + 8 + struct.unpack("<I", coded[place + 4 : place + 8])[0]  # RIFF's own length
            picture = np.array(Image.open(io.BytesIO(coded[place:end])).convert("RGB"))
            parts.append(picture.reshape(-1, height, *picture.shape[1:]))
            place = end
        small = torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2).float()
        size = [side * self.factor for side in small.shape[2:]]
        large = F.interpolate(small, size, mode="bicubic").round().clamp(0, 255)
        return large.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()

    def count(self, frames: Frames, coded: bytes) -> int:
        return frames.size // self.factor**2


class DCT3D(Codec):
    """A 3-D DCT of blocks of Y'CbCr (BT.601, full range), of which the lowest frequencies are kept.

    The kept coefficients are rounded to multiples of one step and coded by a range coder, each frequency with a Laplace
    distribution whose scale, one byte, is sent with the clip. Needs the extra `rates`.

    Args:
        kept: Coefficients kept of a block, of all three planes together; their rate is kept / (3 · T · H · W) of the
            block.
        step: Of the quantizer, in levels of 8 bits.
        block: Frames, height and width of a block.
    """

    _HEAD = struct.Struct("<4H")  # blocks along each axis, and frequencies up to the last one that is not all zeros

    def __init__(self, kept: int = 16, step: float = 16.0, block: tuple[int, int, int] = (8, 8, 8)) -> None:
        super().__init__()
        frames, height, width = self.block = tuple(block)
        size = 3 * math.prod(self.block)
        if min(self.block) < 1 or not 1 <= kept <= size:
            raise UserError(f"Expected kept from 1 to {size} of a block of {self.block}, got {kept}.")
        if not 0 < step < math.inf:
            raise UserError(f"Expected step above 0, got {step}.")
        entropy.load()
        self.kept, self.step = kept, step
        self.temporal = TemporalSpec(multiple=frames, minimum=frames, pad="last")
        self.spatial_multiple = math.lcm(height, width)
        self.order = self._list_lowest()
        # A coefficient is at most the norm of a block, whose values are at most 128 from the middle.
        self.limit = math.ceil(128 * math.sqrt(math.prod(self.block)) / step) + 1
        name = " x ".join(map(str, self.block))
        self.coding = Coding(
            ("3-D DCT" if self.block == (8, 8, 8) else f"3-D DCT of {name}")
            + ("" if kept == size else f", {kept:,} of {size:,} kept"),
            f"3-D DCT of {name} Y'CbCr, {kept:,} of {size:,} kept, step {step:g}, Laplace range coder",
            numbers=kept < size,
        )

    def transform(self, values: Tensor) -> Tensor:
        """Compute the orthonormal DCT-II of blocks, (..., frames, height, width) in double precision."""
        for axis, size in zip((-3, -2, -1), self.block, strict=True):
            values = (_cosines(size) @ values.movedim(axis, -2)).movedim(-2, axis)
        return values

    def invert(self, values: Tensor) -> Tensor:
        """Compute the inverse of `transform`."""
        for axis, size in zip((-3, -2, -1), self.block, strict=True):
            values = (_cosines(size).T @ values.movedim(axis, -2)).movedim(-2, axis)
        return values

    def compress(self, frames: Frames) -> bytes:
        t, h, w = self.block
        clip = torch.from_numpy(frames).double() @ _YCBCR.T
        clip[..., 0] -= 128
        blocks = rearrange(clip, "(n t) (i h) (j w) c -> (n i j) c t h w", t=t, h=h, w=w)
        kept = self.transform(blocks).flatten(1)[:, self.order]
        symbols = (kept / self.step).round().to(torch.int32).T.numpy()  # (kept, blocks)
        # The scale of a Laplace distribution is the mean of the absolute values; an eighth of an octave a step.
        means = np.abs(symbols).mean(1)
        codes = np.where(means > 0, np.clip(np.round(8 * np.log2(np.maximum(means, 2**-12))) + 100, 1, 255), 0)
        codes = codes.astype(np.uint8)
        parts = [(row, self._model(code)) for row, code in zip(symbols, codes, strict=True) if code]
        sides = [side // step for side, step in zip(frames.shape, self.block, strict=False)]
        sent = int(codes.nonzero()[0].max(initial=-1)) + 1
        return self._HEAD.pack(*sides, sent) + codes[:sent].tobytes() + entropy.encode(parts)

    def decompress(self, coded: bytes) -> Frames:
        start = self._HEAD.size
        n, i, j, sent = self._HEAD.unpack(coded[:start])
        codes = np.frombuffer(coded[start : start + sent], np.uint8)
        blocks = n * i * j
        parts = [(blocks, self._model(code)) for code in codes if code]
        symbols = np.zeros((self.kept, blocks), np.int32)
        if parts:
            symbols[codes.nonzero()] = np.stack(entropy.decode(coded[start + sent :], parts))
        t, h, w = self.block
        values = torch.zeros(blocks, 3 * t * h * w, dtype=torch.float64)
        values[:, self.order] = torch.from_numpy(symbols.T.astype(np.float64)) * self.step
        shaped = self.invert(values.reshape(blocks, 3, t, h, w))
        clip = rearrange(shaped, "(n i j) c t h w -> (n t) (i h) (j w) c", n=n, i=i, j=j)
        clip[..., 0] += 128
        pixels = clip @ torch.linalg.inv(_YCBCR).T
        return pixels.round().clamp(0, 255).to(torch.uint8).numpy()

    def count(self, frames: Frames, coded: bytes) -> int:
        size = 3 * math.prod(self.block)
        return frames.size * self.kept // size if self.kept < size else len(coded)

    def _model(self, code: int) -> entropy.Model:
        return entropy.laplace(self.limit, 2.0 ** ((int(code) - 100) / 8))

    def _list_lowest(self) -> list[int]:
        """List the places of the kept coefficients in (plane, frame, row, column): the lowest frequencies.

        Those of Cb and Cr count twice as high, since chroma is coarser.
        """
        places = list(itertools.product(range(3), *map(range, self.block)))

        def frequency(place: tuple[int, ...]) -> float:
            plane, *steps = place
            return math.hypot(*(k / size for k, size in zip(steps, self.block, strict=True))) * (2 if plane else 1)

        order = sorted(range(len(places)), key=lambda number: (frequency(places[number]), number))
        return order[: self.kept]


_YCBCR = torch.tensor(  # ITU-T T.871, of JPEG
    [[0.299, 0.587, 0.114], [-0.168735892, -0.331264108, 0.5], [0.5, -0.418687589, -0.081312411]], dtype=torch.float64
)


def _cosines(size: int) -> Tensor:
    """Make the matrix of the orthonormal DCT-II of `size` values."""
    step = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (step + 0.5) * step[:, None]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix
