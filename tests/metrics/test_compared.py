"""What is compared: floats, 8-bit values, or what is read back from a file."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from vidtwin.errors import UserError
from vidtwin.metrics.compared import as_compared
from vidtwin.video.writing import encode, write_and_read


def pictures(number: int = 14, height: int = 48, width: int = 64, noise: float = 8.0) -> np.ndarray:
    """Moving waves with some noise, uint8 (T, H, W, 3)."""
    rng = np.random.default_rng(0)
    t, y, x, c = np.ogrid[:number, :height, :width, :3]
    waves = 128 + 90 * np.sin((x + 2 * t) / 6 + y / 9 + c)
    return (waves + rng.normal(0, noise, (number, height, width, 3))).clip(0, 255).astype(np.uint8)


def written(path: Path, frames: np.ndarray, encoder: str, fps: int, options: dict[str, str]) -> np.ndarray:
    """Through a file on disk, with FFmpeg's own names for the settings."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv420p", interpolation="BICUBIC")))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def blurred(frames: np.ndarray) -> np.ndarray:
    """Means over 3x3 pixels, cut to 8 bits."""
    height, width = frames.shape[1:3]
    padded = np.pad(frames.astype(np.int64), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    return (sum(padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)) // 9).astype(np.uint8)


# Of opencv-python-headless 5.0.0 (FFmpeg 8.1), by standard deviation of the noise: bytes of `pictures` and of
# `blurred` as files, and the mean of the frames' PSNR between what is read of the two. Each was written and read by
#
#   writer = cv2.VideoWriter("a.mp4", cv2.VideoWriter_fourcc(*"mp4v"), 24.0, (64, 48))
#   for picture in frames: writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
#   writer.release()
#   capture = cv2.VideoCapture("a.mp4"); found, picture = capture.read(); cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
OPENCV = {0.0: (2968, 2940, 39.037919), 1.0: (2984, 2951, 38.850673), 8.0: (8129, 3533, 33.579179)}


@pytest.mark.parametrize("noise", OPENCV)
def test_mp4v_has_the_size_and_the_pictures_of_opencvs_file(noise: float) -> None:
    frames = pictures(noise=noise)
    *sizes, psnr = OPENCV[noise]
    for clip, size in zip((frames, blurred(frames)), sizes, strict=True):
        assert len(encode(clip, "mp4v", 24)) == pytest.approx(size, rel=0.01)
    x, y = (write_and_read(clip, "mp4v", 24) / 255 for clip in (frames, blurred(frames)))
    errors = np.square(x - y).mean((1, 2, 3))
    assert np.mean(20 * np.log10(1 / np.sqrt(errors))) == pytest.approx(psnr, abs=0.02)


@pytest.mark.parametrize(("size", "quantizer"), [((48, 64), 20), ((482, 640), 28)])
def test_h264_is_mediapys_quantizer(tmp_path: Path, size: tuple[int, int], quantizer: int) -> None:
    frames = pictures(3, *size)
    expected = written(tmp_path / "a.mp4", frames, "libx264", 8, {"qp": str(quantizer)})
    np.testing.assert_array_equal(write_and_read(frames, "h264", 8.0), expected)


@pytest.mark.parametrize("codec", ["mp4v", "h264"])
def test_a_file_keeps_the_frames_their_order_and_most_of_their_colours(codec: str) -> None:
    frames = pictures()
    back = write_and_read(frames, codec, 29.97)
    assert back.dtype == np.uint8
    errors = np.abs(back.astype(float) - frames).mean((1, 2, 3))
    assert (errors < 12).all()
    assert (np.abs(back[1:].astype(float) - frames[:-1]).mean((1, 2, 3)) > errors[1:]).all()


def test_odd_sizes_are_written_in_full_colour_or_refused() -> None:
    frames = pictures(2, 49, 63)
    assert write_and_read(frames, "h264", 8).shape == frames.shape
    with pytest.raises(UserError, match=r"even height and width for codec=mp4v, got \(49, 63\)"):
        write_and_read(frames, "mp4v", 8)
    with pytest.raises(UserError, match="mp4v or h264, got 'vp9'"):
        write_and_read(frames, "vp9", 8)


def clips() -> Tensor:
    torch.manual_seed(0)
    return torch.rand(2, 3, 4, 16, 16) * 2.4 - 1.2


def test_floats_are_clamped_and_8_bit_values_are_the_nearest() -> None:
    clamped = clips().clamp(-1, 1)
    assert torch.equal(as_compared(clips(), "floats", 8.0), clamped)
    steps = np.rint((clamped.numpy().astype(np.float64) + 1) * 127.5)
    torch.testing.assert_close(as_compared(clips(), "8-bit", 8.0), torch.from_numpy(steps / 127.5 - 1).float())


def test_a_file_of_each_clip_holds_its_8_bit_values() -> None:
    prepared = as_compared(clips(), "h264", 8.0)
    for clip, result in zip(clips(), prepared, strict=True):
        frames = ((clip.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
        back = torch.from_numpy(write_and_read(frames, "h264", 8.0)).permute(3, 0, 1, 2)
        torch.testing.assert_close(result, back / 127.5 - 1)


def test_another_way_to_compare_is_named() -> None:
    with pytest.raises(UserError, match="floats, 8-bit, mp4v, h264, got 'png'"):
        as_compared(clips(), "png", 8.0)  # type: ignore[arg-type]
