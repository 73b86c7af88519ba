"""`vidtwin decode` as its user calls it, on latents of a model of averages that needs no training."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from sweeping import Coded, checkpoint

from vidtwin.cli import main
from vidtwin.clips import as_clip
from vidtwin.errors import UserError
from vidtwin.storage.checkpoints import load_autoencoder
from vidtwin.video import VideoWriter, iter_frames, survey, timed_frames, write_video
from vidtwin.video.convert import to_uint8

LENGTH = 8
QUIET = ("--accelerator", "cpu", "--progress", "false")


def smooth(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames of a colour ramp that grows lighter."""
    y, x = np.mgrid[:height, :width].astype(float)
    return np.stack([np.stack([60 + y + 5 * k, 40 + x + 5 * k, 80 + y * 0], -1) for k in range(count)]).astype(np.uint8)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with the latents of two videos, of 20 and 3 frames, in five shards of one window."""
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "pool.ckpt", scale=1.0, frames=LENGTH)
    write_video("videos/run/long.mp4", smooth(20), Fraction(30000, 1001))
    write_video("videos/short.avi", smooth(3, 36, 40), 10, codec="mpeg4")
    assert encode() == 0
    return tmp_path


def encode(*words: str, videos: str = "videos", ckpt: str = "pool.ckpt") -> int:
    return main(["encode", videos, "--out", "latents", "--ckpt_path", ckpt, "--clips_per_shard", "1", *QUIET, *words])


def decode(*words: str) -> int:
    return main(["decode", "latents", "--out", "decoded", *QUIET, *words])


def read(path: str | Path) -> np.ndarray:
    return np.stack(list(iter_frames(path)))


def reconstructed(path: str, ckpt: str = "pool.ckpt") -> np.ndarray:
    """The model applied to windows of 8 frames, without any of the commands' code."""
    frames = read(path)
    padded = np.concatenate([frames, np.repeat(frames[-1:], -len(frames) % LENGTH, 0)])
    clip = as_clip(list(padded.reshape(-1, LENGTH, *frames.shape[1:])), 4)
    with torch.no_grad():
        made = load_autoencoder(ckpt)(clip).clip
    return np.concatenate([to_uint8(each) for each in made])[: len(frames), : frames.shape[1], : frames.shape[2]]


@pytest.fixture
def written(monkeypatch) -> dict[str, list[np.ndarray]]:
    """The frames of each output, before they go through a codec."""
    frames: dict[str, list[np.ndarray]] = {}

    class Recorder(VideoWriter):
        def write(self, picture: np.ndarray, time: Fraction | None = None) -> None:
            frames.setdefault(self.path.as_posix(), []).append(picture)
            super().write(picture, time)

    monkeypatch.setattr("vidtwin.apply.latent_reader.VideoWriter", Recorder)
    return frames


@pytest.mark.parametrize(("words", "apart"), [((), 0), (("--posterior", "moments"), 0), (("--dtype", "float16"), 1)])
def test_videos_come_back_as_the_model_reconstructs_them(here, written, capsys, words, apart):
    assert encode("--overwrite", *words) == 0
    assert decode() == 0
    for given, made in (("videos/run/long.mp4", "run/long.mp4"), ("videos/short.avi", "short.mp4")):
        before, after = survey(given), survey(f"decoded/{made}")
        assert (after.num_frames, after.fps) == (before.num_frames, before.fps)
        assert (after.width, after.height) == (before.width, before.height)
        frames = np.stack(written[f"decoded/{made}"])
        assert np.abs(frames.astype(int) - reconstructed(given)).max() <= apart
        assert np.abs(frames.astype(int) - read(f"decoded/{made}")).mean() < 3
    assert "2 videos, 23 frames -> decoded" in capsys.readouterr().out


def test_codes_give_the_clip_that_the_model_reconstructs(here, written):
    checkpoint(here / "coded.ckpt", model=Coded(frames=LENGTH))
    assert encode("--overwrite", ckpt="coded.ckpt") == 0
    assert decode() == 0
    assert np.array_equal(np.stack(written["decoded/short.mp4"]), reconstructed("videos/short.avi", "coded.ckpt"))


def test_times_of_a_variable_rate_come_back(here):
    times = [Fraction(k * k, 100) for k in range(11)]
    with VideoWriter("vfr.mp4", 25, timed=True) as writer:
        for frame, time in zip(smooth(11), times, strict=True):
            writer.write(frame, time)
    assert encode("--overwrite", videos="vfr.mp4") == 0
    assert decode() == 0
    found = [float(time) for time, _ in timed_frames("decoded/vfr.mp4")]
    assert found == pytest.approx([float(time) for time in times], abs=1e-3)


def test_outputs_that_exist_are_kept_unless_asked(here, capsys):
    assert decode() == 0
    changed = Path("decoded/short.mp4").stat().st_mtime_ns
    assert decode() == 2
    assert "--overwrite replaces them" in capsys.readouterr().err
    assert Path("decoded/short.mp4").stat().st_mtime_ns == changed
    assert decode("--overwrite") == 0
    assert Path("decoded/short.mp4").stat().st_mtime_ns > changed


def test_a_source_is_never_replaced(here, capsys):
    assert main(["decode", "latents", "--out", "videos", "--overwrite", *QUIET]) == 2
    assert "videos/run/long.mp4, which would be replaced" in capsys.readouterr().err


def test_latents_of_another_model_are_refused_by_name(here, capsys):
    checkpoint(here / "coded.ckpt", model=Coded(frames=LENGTH))
    assert decode("--ckpt_path", "coded.ckpt") == 2
    said = capsys.readouterr().err
    assert "Expected the latents of Coded " in said
    assert "latents holds those of Pool " in said
    assert "give the weights that encoded, pool.ckpt" in said
    checkpoint(here / "other.ckpt", pool=8, frames=LENGTH)
    assert decode("--ckpt_path", "other.ckpt") == 2
    assert not Path("decoded").exists()


def test_the_same_weights_in_another_place_serve(here, capsys):
    Path("pool.ckpt").rename("moved.ckpt")
    assert decode() == 2
    assert (
        "Expected the weights that latents names at pool.ckpt, got none; give --ckpt_path." in capsys.readouterr().err
    )
    assert decode("--ckpt_path", "moved.ckpt") == 0


def test_windows_before_a_damaged_shard_are_decoded(here, capsys):
    path = Path("latents/shard-00001.safetensors")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert decode() == 1
    said = capsys.readouterr().err
    assert "run/long: latents/shard-00001.safetensors: expected a whole shard, got one whose content is damaged" in said
    assert "the 8 frames before are decoded" in said
    assert survey("decoded/run/long.mp4").num_frames == 8
    assert survey("decoded/short.mp4").num_frames == 3


def test_a_truncated_shard_is_named_and_its_video_skipped(here, capsys):
    path = Path("latents/shard-00000.safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    assert decode() == 1
    assert (
        "run/long: latents/shard-00000.safetensors: expected a whole shard, got one that is cut off"
        in capsys.readouterr().err
    )
    assert not Path("decoded/run/long.mp4").exists()


def test_an_incomplete_folder_gives_what_is_there(here, capsys):
    manifest = Path("latents/manifest.json")
    manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
    Path("latents/shard-00003.safetensors").unlink()
    assert decode() == 1
    said = capsys.readouterr().err
    assert "latents is not complete; decoding the shards that exist" in said
    assert "short: latents/shard-00003.safetensors: expected a shard, got no such file; encode again; skipped" in said
    assert survey("decoded/run/long.mp4").num_frames == 20


def test_without_a_whole_shard_nothing_is_produced(here, capsys):
    for path in Path("latents").glob("shard-*"):
        path.unlink()
    assert decode() == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["absent"], "Expected a folder of latents with absent/manifest.json, got none; write it by `vidtwin encode`."),
        (["latents", "--batch_size", "0"], "Expected --batch_size of at least 1, got 0."),
        (["latents", "--use_ema", "--ckpt_path", "pool.ckpt"], "Expected a checkpoint with averaged weights"),
    ],
)
def test_what_can_not_be_is_one_line(here, capsys, words, expected):
    assert main(["decode", *words, "--out", "decoded", *QUIET]) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1


def test_latents_that_are_missing_are_refused_before_torch_is_imported(tmp_path):
    code = "import sys\nfrom vidtwin.cli import main\n"
    code += "print(main(['decode', 'absent', '--out', 'decoded']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == ["2", "False"]
    assert "Expected a folder of latents with absent/manifest.json, got none" in done.stderr


def test_latents_of_another_version_are_refused(here, capsys):
    manifest = Path("latents/manifest.json")
    manifest.write_text(manifest.read_text().replace('"schema_version": 1', '"schema_version": 7'))
    assert decode() == 2
    assert "Expected latents of schema version 1, got 7" in capsys.readouterr().err


def test_the_page_on_latents_can_be_followed(tmp_path, monkeypatch):
    """Each command of docs/latents.md, and its program on a model of one number."""
    page = (Path(__file__).parents[2] / "docs" / "latents.md").read_text()
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "last.ckpt", scale=1.0, frames=LENGTH)
    for number in range(12):
        write_video(f"videos/class{number % 2}/v{number}.mp4", smooth(9), 25)
    commands = [line.split()[1:] for line in page.splitlines() if line.startswith("    vidtwin ")]
    assert [command[0] for command in commands] == ["encode", "decode"]
    for command in commands:
        assert main([*command, *QUIET]) == 0
    assert len(list(Path("decoded").rglob("*.mp4"))) == 12

    class Model(lightning.LightningModule):
        labels: set[int] = set()  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

        def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
            assert batch["latents"]["grid"].shape == (4, 3, LENGTH, 8, 12)
            self.labels.update(batch["label"].tolist())
            return (self.scale * batch["latents"]["grid"]).square().mean()

        def validation_step(self, batch: dict[str, Any], index: int) -> None:
            pass

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    program = page.partition("```python\n")[2].partition("```")[0]
    quiet = "accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=10"
    program = program.replace("max_steps=100", quiet).replace("batch_size=4", "batch_size=4, num_workers=0")
    exec(program, {"model": Model()})
    assert Model.labels == {0, 1}


def test_a_full_disk_ends_the_command_which_skip_existing_resumes(here, capsys, monkeypatch):
    write = VideoWriter.write

    def full(self, *given):
        if self.path.name == "long.mp4":
            raise UserError("can't be written") from OSError(28, "No space left on device")
        write(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(VideoWriter, "write", full)
        assert decode() == 2
    assert "finished videos are kept; free space and continue" in capsys.readouterr().err
    assert not list(Path("decoded").rglob("*.mp4"))
    assert decode() == 0
    Path("decoded/run/long.mp4").unlink()
    before = Path("decoded/short.mp4").stat().st_mtime_ns
    assert decode("--skip_existing") == 0
    assert "1 of 2 outputs exist in decoded and were skipped" in capsys.readouterr().err
    assert len(read("decoded/run/long.mp4")) == 20
    assert Path("decoded/short.mp4").stat().st_mtime_ns == before
    assert decode("--skip_existing", "--overwrite") == 2


def test_weights_with_another_decoder_decode_the_latents_that_they_would_encode(here, written, capsys):
    """As after a training of the decoder alone."""
    checkpoint(here / "later.ckpt", scale=0.5, frames=LENGTH)
    assert decode("--ckpt_path", "later.ckpt") == 0
    assert "later.ckpt decodes latents of pool.ckpt, which encodes alike" in capsys.readouterr().out
    np.testing.assert_array_equal(
        np.stack(written["decoded/run/long.mp4"]), reconstructed("videos/run/long.mp4", "later.ckpt")
    )
    checkpoint(here / "pool.ckpt", scale=0.7, frames=LENGTH)  # not those that encoded
    assert decode("--ckpt_path", "later.ckpt", "--overwrite") == 2
    assert "give the weights that encoded, pool.ckpt" in capsys.readouterr().err
