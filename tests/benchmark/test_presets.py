"""A preset's numbers are those that its peer's steps give, by PyAV, torchvision, scikit-image and numpy alone.

The autoencoder is a mean over 2x2 pixels, so that no more than the evaluation is compared.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from skimage.metrics import structural_similarity
from torchvision.transforms import v2

from vidtwin.benchmark import rows
from vidtwin.benchmark.protocol import PEER, PRESETS, ProtocolSettings, protocol_hash
from vidtwin.datamodules.folder import VideoFolder
from vidtwin.metrics import Measures
from vidtwin.video import write_video

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "protocols"
SIDE = 48
Numbers = tuple[list[float], list[float]]  # PSNR and SSIM of what a mean is over


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos of 25 frames a second: a wide one to be resized, and squares as large as the clips."""
    folder = tmp_path_factory.mktemp("videos")
    for name, frames, height, width in (("wide/a.mp4", 40, 72, 100), ("square/a.mp4", 20, SIDE, SIDE)):
        t, y, x, c = np.ogrid[:frames, :height, :width, :3]
        waves = 128 + 60 * np.sin((x + 2 * t) / 5 + y / 9 + c / 3) + 30 * np.sin(x * y / 40 - t / 3)
        noise = np.random.default_rng(0).normal(0, 4, waves.shape)
        write_video(folder / name, (waves + noise).clip(0, 255).astype(np.uint8), 25)
    return folder


def decoded(source: Any) -> np.ndarray:
    with av.open(source) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def resized(frames: np.ndarray) -> torch.Tensor:
    """The peers' reading: shorter side, centre square, (T, 3, H, W) in [0, 1]."""
    transform = v2.Compose([v2.Resize(SIDE, antialias=True), v2.CenterCrop((SIDE, SIDE))])
    return transform(torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255)


def pooled(frames: torch.Tensor) -> torch.Tensor:
    """The autoencoder: (..., H, W) → means over 2x2 pixels, repeated."""
    *_, height, width = frames.shape
    means = frames.reshape(*frames.shape[:-2], height // 2, 2, width // 2, 2).mean((-3, -1))
    return means.repeat_interleave(2, -2).repeat_interleave(2, -1)


def written(frames: np.ndarray, encoder: str, layout: str, options: dict[str, str]) -> np.ndarray:
    """Write and read frames by FFmpeg's own names."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(encoder, rate=24, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.thread_count = 1
        for picture in frames[..., ::-1] if layout == "bgr24" else frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format=layout)
            container.mux(stream.encode(frame.reformat(format="yuv420p", interpolation="BICUBIC")))
        container.mux(stream.encode(None))
    return decoded(io.BytesIO(file.getvalue()))


def of_pairs(target: Any, found: Any, epsilon: float) -> Numbers:
    """PSNR and Gaussian SSIM of each frame, (T, H, W, 3) in [0, 1]."""
    target, found = np.asarray(target), np.asarray(found)
    gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    psnr = -10 * np.log10(np.square(target - found).mean((1, 2, 3)) + epsilon)
    pairs = zip(target, found, strict=True)
    return list(psnr), [structural_similarity(y, x, data_range=1.0, channel_axis=-1, **gaussian) for y, x in pairs]


def of_vidtok(path: Path, length: int, fps: float) -> Numbers:
    """Every round(rate / fps)-th frame in clips, the last frame repeated; a number a clip."""
    frames = decoded(path / "wide" / "a.mp4")
    shown = list(range(0, len(frames), round(25 / fps)))
    found: Numbers = ([], [])
    for start in range(0, len(shown), length):
        indices = shown[start : start + length]
        indices += [indices[-1]] * (length - len(indices))
        clip = resized(frames[indices])
        for values, numbers in zip(
            found, of_pairs(*(z.permute(0, 2, 3, 1) for z in (clip, pooled(clip))), 1e-8), strict=True
        ):
            values.append(float(np.mean(numbers)))
    return found


def of_wfvae(path: Path, length: int) -> Numbers:
    """The first frames in bf16, both sides cut to 8 bits and written by OpenCV."""
    clip = resized(decoded(path / "wide" / "a.mp4")[:length]).to(torch.bfloat16)
    bits = str(int(1.5 * 24 * SIDE * SIDE))
    options = {"b": bits, "bt": bits, "g": "12", "qmin": "3"}
    sides = [
        written((255 * z.float().permute(0, 2, 3, 1).numpy()).astype(np.uint8), "mpeg4", "bgr24", options) / 255
        for z in (clip, pooled(clip))
    ]
    psnr, ssim = of_pairs(*sides, 0.0)
    return [float(np.mean(psnr))], [float(np.mean(ssim))]


def of_tokenbench(path: Path) -> Numbers:
    """Whole videos in 8 bits, at their own sizes, beside mediapy's files of their reconstructions; a number a video."""
    found: Numbers = ([], [])
    for name in ("square/a.mp4", "wide/a.mp4"):
        target = decoded(path / name)
        clip = pooled(torch.from_numpy(target).permute(0, 3, 1, 2).double()).permute(0, 2, 3, 1).numpy()
        read = written((clip + 0.5).astype(np.uint8), "libx264", "rgb24", {"qp": "20", "preset": "medium"})
        error = np.square(target.astype(np.float64) - read).mean()
        found[0].append(float(20 * np.log10(255 / (np.sqrt(error) + 1.2e-7))))
        pairs = zip(target, read, strict=True)
        ssim = [structural_similarity(y, x, data_range=255, channel_axis=-1) for y, x in pairs]
        found[1].append(float(np.mean(ssim)))
    return found


SQUARES = {"resolution": SIDE}
PEERS: dict[str, tuple[Callable[[Path], Numbers], str, dict[str, int]]] = {
    "vidtwin": (lambda path: of_vidtok(path, 16, 25), "wide", SQUARES),
    "vidtok": (lambda path: of_vidtok(path, 17, 30), "wide", SQUARES),
    "wfvae": (lambda path: of_wfvae(path, 33), "wide", SQUARES),
    "tokenbench": (of_tokenbench, ".", {}),
}


def data_of(preset: str, root: Path, **others: Any) -> VideoFolder:
    """The clips of the preset's config, squares smaller."""
    config = yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text())
    assert config["protocol"] == {"preset": preset}
    arguments = config["data"]["init_args"] | {"num_workers": 0} | others
    return VideoFolder(str(root), val_fraction=0, test_fraction=1, **arguments)


def test_every_preset_has_a_peer_and_a_config() -> None:
    assert PEERS.keys() == PRESETS.keys() == {path.stem for path in CONFIGS.glob("*.yaml")}


@pytest.mark.parametrize("preset", PEERS)
def test_a_preset_computes_what_its_peer_computes(preset: str, videos: Path) -> None:
    compute, folder, others = PEERS[preset]
    data = data_of(preset, videos / folder, **others)
    protocol = ProtocolSettings(preset=preset).resolve(data.protocol(), "32-true")
    measures = Measures(protocol["compared"], protocol["psnr"], protocol["psnr_epsilon"], protocol["ssim"], fps=24)
    measures.setup(data.num_frames or 20, SIDE, SIDE)
    clips: list[dict[str, Any]] = []
    for batch in data.chunk_loader("test", [[index] for index in range(len(data.dataset("test")))]):
        clip = data.on_after_batch_transfer(batch, 0)["clip"]
        values = {name: value.item() for name, value in measures(pooled(clip), clip).items()}
        clips.append({"name": batch["name"][0], "num_frames": clip.shape[2], **values})
    expected = compute(videos)
    assert len(clips) == len(expected[0])
    found = rows.means(clips, protocol)
    assert found["psnr"]["mean"] == pytest.approx(np.mean(expected[0]), abs=0.02)
    assert found["ssim"]["mean"] == pytest.approx(np.mean(expected[1]), abs=1e-3)


@pytest.mark.parametrize("preset", PEERS)
def test_clips_of_a_presets_config_depart_by_what_no_setting_changes_alone(preset: str, videos: Path) -> None:
    _, folder, others = PEERS[preset]
    described = data_of(preset, videos / folder, **others).protocol()
    described |= {"resolution": PRESETS[preset]["data"]["resolution"]} if others else {}
    precision = PRESETS[preset]["peer"]["precision"]
    departs = ProtocolSettings(preset=preset).resolve(described, precision)["departs"]
    of_clips = (
        "a file is of a whole video",
        "rFVD is of whole videos",
    )  # what tokenbench says of clips that are shorter
    remarks = [remark.text for remark in PRESETS[preset]["remarks"] if not remark.text.startswith(of_clips)]
    assert departs == [PEER + text for text in remarks]


def test_squares_of_one_length_depart_from_whole_videos_as_before_there_were_any(videos: Path) -> None:
    clips = data_of("tokenbench", videos / "wide", num_frames=16, resolution=SIDE, resize="area").protocol()
    resolved = ProtocolSettings(preset="tokenbench").resolve(clips, "32-true")
    assert [line for line in resolved["departs"] if not line.startswith(PEER)] == [
        "num_frames 16 for all of a video",
        f"resolution {SIDE} for native",
        "crop largest centre square for none",
    ]
    # Of commit 9c5185c: folders of that version are still of this protocol.
    resolved["data"] |= {"videos_sha256": None}
    assert protocol_hash(resolved) == "1e7f15053692df6b"
