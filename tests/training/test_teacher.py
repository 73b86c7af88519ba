"""A student learns a teacher's latents: by the terms computed by hand, and to the bit after an interruption."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tiny import Clips, Poisoned, SmoothClips, tiny_model, tiny_task, trainer, write_config
from torch.optim.lr_scheduler import ConstantLR

from vidtwin.cli import main
from vidtwin.datamodules.folder import VideoFolder
from vidtwin.errors import UserError
from vidtwin.models.vidtwin import VidTwin
from vidtwin.posteriors import DiagonalGaussian, Encoding
from vidtwin.storage import checkpoints
from vidtwin.training.callbacks.checkpoint import LatestCheckpoint
from vidtwin.training.sharding import Placement
from vidtwin.training.teacher import Teacher
from vidtwin.training.trainer import VideoTrainer

CLIPS = torch.stack([torch.from_numpy(SmoothClips(3).clip(0, i)["clip"]) for i in range(3)])
CLIPS = CLIPS.permute(0, 4, 1, 2, 3) / 127.5 - 1
BATCH = {"clip": CLIPS}
HALF = {"hidden_size": 16}  # of the teacher's width, with its latents


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Weights of a teacher, of other initial values than the students'."""
    folder = tmp_path_factory.mktemp("teacher") / "weights"
    torch.manual_seed(1)
    tiny_model().save_pretrained(folder)
    return folder


def taught(teacher: Teacher | None, **options: Any) -> Any:
    """Return the task of a student at a constant rate, so that an interrupted training has the rates of a whole one."""
    return tiny_task(model=HALF, ema_decay=0.9, scheduler=lambda o: ConstantLR(o, 1.0), teacher=teacher, **options)


def distil(weights: Path, loss: dict[str, Any] | None = None, **options: Any) -> Any:
    return taught(Teacher(str(weights), **options), loss=loss)


def run(
    folder: Path, task: Any, steps: int, data: Any = None, ckpt_path: Path | None = None, **more: Any
) -> VideoTrainer:
    saved = LatestCheckpoint(every_n_steps=99, dirpath=str(folder))
    fit = trainer(folder, steps, callbacks=[saved, *more.pop("callbacks", [])], **{"limit_val_batches": 0} | more)
    fit.fit(task, datamodule=data or Clips(), ckpt_path=ckpt_path)
    return fit


@pytest.mark.parametrize("reduction", ["mean", "released"])
def test_the_terms_are_those_computed_by_hand(weights, reduction):
    task = distil(weights, {"reduction": reduction, "pixel": "l2"}, latent_weight=0.3, decode_weight=0.7)
    task.teacher.setup(task.autoencoder, None)
    student, teacher = task.autoencoder.eval(), checkpoints.load_autoencoder(weights)
    ((clip, latents),) = task.split(BATCH)
    (_, terms), *_ = task.losses(clip, 0, latents=latents)

    theirs = teacher.encode(CLIPS).mode()
    torch.testing.assert_close(latents, theirs)
    errors = []
    for name, z in student.encode(CLIPS).mode().items():
        per_channel = [
            ((z - theirs[name])[:, c] ** 2).mean() / theirs[name][:, c].var(unbiased=False) for c in range(z.shape[1])
        ]
        errors.append(sum(per_channel) / z.shape[1])
    match = sum(errors) / len(errors)
    scale = 1 if reduction == "mean" else 3 * 32 * 32
    decode = scale * ((student.decode(theirs) - CLIPS) ** 2).mean()
    own = task.loss.generator_loss(student(CLIPS), CLIPS, None, 0)["total"]
    torch.testing.assert_close(terms["latent_match"], match.detach(), rtol=1e-4, atol=0)
    torch.testing.assert_close(terms["teacher_decode"], decode.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(terms["total"], own + 0.3 * scale * match + 0.7 * decode, rtol=1e-4, atol=0)
    assert len(errors) == 2


def test_a_channel_that_never_changes_is_compared_as_it_is():
    teacher = Teacher("anywhere")
    values = torch.tensor([[1.5, 4.0], [1.5, 8.0]])
    teacher.register_buffer("moments_z", torch.zeros(3, 2, dtype=torch.float64))
    teacher.measure([{"z": values[:1]}, {"z": values[1:]}])
    encoding = Encoding(z=DiagonalGaussian(values + torch.tensor([0.5, 2.0]), torch.zeros(2, 2)))
    assert float(teacher.latent_match(encoding, {"z": values})) == pytest.approx((0.5**2 + 2.0**2 / 4.0) / 2)


def test_the_statistics_of_latents_on_two_batches_in_parts_are_those_of_all_clips(weights):
    task = distil(weights)
    task.accumulation = 2
    task.teacher.setup(task.autoencoder, None)
    for part in (CLIPS[:2], CLIPS[1:]):
        task.split({"clip": part})
    z = checkpoints.load_autoencoder(weights).encode(torch.cat([CLIPS[:2], CLIPS[1:]])).mode()["structure"].double()
    count, total, squares = task.teacher.moments_structure
    torch.testing.assert_close(total / count, z.mean((0, *range(2, z.ndim))))
    torch.testing.assert_close(squares / count, z.square().mean((0, *range(2, z.ndim))))


class Frozen(Callback):
    """Record whether the teacher is in training mode or has gradients."""

    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_end(self, trainer: Any, task: Any, *_: Any) -> None:
        self.steps += 1
        model = task.teacher._source.model
        assert not any(module.training for module in model.modules())
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
        assert not set(model.parameters()) & {*task.parameters()}


def test_an_interrupted_distillation_ends_with_the_same_bits_and_without_its_teachers_weights(weights, tmp_path):
    whole, frozen = distil(weights), Frozen()
    before = {name: value.clone() for name, value in whole.autoencoder.state_dict().items()}
    run(tmp_path / "whole", whole, 5, callbacks=[frozen])
    assert frozen.steps == 5
    run(tmp_path / "parts", distil(weights), 2)
    second = distil(weights)
    run(tmp_path / "parts", second, 5, ckpt_path=tmp_path / "parts" / "last.ckpt")
    ours, theirs = (checkpoints.read(tmp_path / name / "last.ckpt") for name in ("parts", "whole"))
    for key in ("state_dict", "ema"):
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)
    assert set(theirs["state_dict"]) == {f"autoencoder.{n}" for n in before} | {
        "teacher.moments_structure",
        "teacher.moments_dynamics",
    }
    assert set(theirs["ema"]["values"]) == {name for name, _ in whole.autoencoder.named_parameters()}
    hashed = json.loads((weights / "config.json").read_text())["weights_sha256"]
    assert theirs["teacher"] == {"path": str(weights), "weights_sha256": hashed, "only_decoder": False}


def test_a_run_resumes_with_its_own_teacher_alone(weights, tmp_path):
    run(tmp_path, distil(weights), 1)
    torch.manual_seed(2)
    tiny_model().save_pretrained(tmp_path / "other")
    with pytest.raises(
        UserError, match=rf"model\.teacher {re.escape(str(tmp_path / 'other'))} \(.{{8}}\), got one with .*weights \("
    ):
        run(tmp_path, distil(tmp_path / "other"), 2, ckpt_path=tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"model\.teacher none, got one with .*--init_from"):
        run(tmp_path, taught(None), 2, ckpt_path=tmp_path / "last.ckpt")
    shutil.copytree(weights, tmp_path / "moved")
    run(tmp_path, distil(tmp_path / "moved"), 2, ckpt_path=tmp_path / "last.ckpt")  # the same weights elsewhere


def test_other_latents_than_the_teachers_are_refused_before_a_step(weights, tmp_path):
    task = tiny_task(model={"structure_downsamples": 0}, teacher=Teacher(str(weights)))
    with pytest.raises(
        UserError, match=r"structure \(.*\) of VidTwin of .*weights for a clip of \(3, 4, 32, 32\), got structure \("
    ):
        run(tmp_path, task, 1)
    assert task.batches == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "got neither"),
        ({"path": "a", "latents": "b"}, "got both"),
        ({"path": "a", "latent_weight": -1.0}, "latent_weight of at least 0"),
        ({"path": "a", "latent_weight": 0.0, "decode_weight": 0.0}, "teaches nothing"),
        ({"latents": "a", "use_ema": True}, "no --model.teacher.use_ema"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Teacher(**options)


def test_a_small_decoder_is_trained_on_the_teachers_latents_without_the_students_encoder(
    weights, tmp_path, monkeypatch, capsys
):
    task = distil(weights, only_decoder=True)
    plain = VidTwin.forward
    monkeypatch.setattr(VidTwin, "forward", None)
    before = {name: p.detach().clone() for name, p in task.autoencoder.named_parameters()}
    fit = run(tmp_path, task, 3, limit_val_batches=1.0)
    moved = {
        name.partition(".")[0] for name, p in task.autoencoder.named_parameters() if not torch.equal(p, before[name])
    }
    assert "decoder" in moved
    assert "encoder" not in moved
    clips = torch.stack([torch.from_numpy(SmoothClips(6).clip(0, i)["clip"]) for i in range(6)])
    clips = clips.permute(0, 4, 1, 2, 3) / 127.5 - 1  # those of validation
    with torch.no_grad():
        decoded = task.autoencoder.eval().decode(checkpoints.load_autoencoder(weights).encode(clips).mode())
    assert float(fit.callback_metrics["val/pixel"]) == pytest.approx(float((decoded - clips).abs().mean()), rel=1e-4)

    monkeypatch.setattr(VidTwin, "forward", plain)
    last = tmp_path / "last.ckpt"
    config = write_config(tmp_path)
    capsys.readouterr()
    assert main(["convert", str(last), str(tmp_path / "converted")]) == 0
    small = [f"--model.autoencoder.init_args.{name}={value}" for name, value in HALF.items()]
    for path in (last, tmp_path / "converted"):
        argv = ["test", "--config", str(config), "--ckpt_path", str(path), "--results_dir", str(tmp_path / "results")]
        assert main([*argv, *small]) == 2
        assert "Expected weights of an encoder and a decoder, got a decoder alone" in capsys.readouterr().err
    checkpoints.load_autoencoder(last)
    assert "its encoder was not trained" in capsys.readouterr().err


def test_weights_of_a_teacher_are_read_by_one_rank_before_the_others(weights, tmp_path, monkeypatch):
    task, ready = distil(weights), []
    setup = type(task).setup

    def watch(task, stage):
        ready.append(dict(task.teacher.identity))
        setup(task, stage)

    monkeypatch.setattr(type(task), "setup", watch)
    run(tmp_path, task, 1)
    assert ready[0]["weights_sha256"]  # known after prepare_data, which one rank of a machine runs first


def test_a_small_encoder_is_trained_by_its_latents_alone(weights, tmp_path):
    task = taught(
        Teacher(str(weights), decode_weight=0.0), loss={"pixel_weight": 0.0, "kl_weight": 0.0}, freeze=["decoder"]
    )
    before = {name: p.detach().clone() for name, p in task.autoencoder.named_parameters()}
    run(tmp_path, task, 2)
    moved = {
        name.partition(".")[0] for name, p in task.autoencoder.named_parameters() if not torch.equal(p, before[name])
    }
    assert "encoder" in moved
    assert "decoder" not in moved


def test_a_clip_without_finite_pixels_is_skipped_not_measured_and_can_be_run_again(weights, tmp_path):
    task = distil(weights)
    run(tmp_path, task, 4, Poisoned())
    assert task.skipped
    assert task.teacher.moments_structure.isfinite().all()
    assert all(p.isfinite().all() for p in task.parameters())
    dump = next(tmp_path.rglob("nonfinite/*.pt"))
    lines = trainer(tmp_path).replay(distil(weights), str(dump))
    assert any(line.startswith("train/latent_match = nan") for line in lines)
    assert lines[-1].startswith("reproduced: ")


def test_sharded_weights_are_refused(weights, tmp_path, monkeypatch):
    class Sharded(Placement):
        pass

    monkeypatch.setattr("vidtwin.training.base.placement_of", lambda trainer: Sharded())
    with pytest.raises(UserError, match=r"for model\.teacher, got sharded ones; train by ddp"):
        run(tmp_path, distil(weights), 1)


# Latents on disk.


@pytest.fixture(scope="module")
def stored(weights, shared, tmp_path_factory) -> tuple[Path, Path]:
    """A folder of two real videos, and their latents by the teacher."""
    folder = tmp_path_factory.mktemp("stored")
    for name in ("bikes.mp4", "carphone_pristine.mp4"):
        (folder / "videos").mkdir(exist_ok=True)
        (folder / "videos" / name).symlink_to(shared / "data" / "clips" / name)
    words = ["encode", str(folder / "videos"), "--out", str(folder / "latents"), "--ckpt_path", str(weights)]
    assert main([*words, "--accelerator", "cpu"]) == 0
    return folder / "videos", folder / "latents"


def windows(videos: Path, **options: Any) -> VideoFolder:
    given = {"num_frames": 4, "resolution": 32, "fps": None, "augment": "windows", "batch_size": 2, "num_workers": 0}
    return VideoFolder(str(videos), val_fraction=0.0, test_fraction=0.0, **given | options)


def on_disk(latents: Path, **options: Any) -> Any:
    return taught(Teacher(latents=str(latents), **options))


class Compared(Callback):
    """Compare latents on disk with those that the teacher computes, and count different start frames."""

    def __init__(self, weights: Path) -> None:
        self.model = checkpoints.load_autoencoder(weights)
        self.starts: set[int] = set()

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, *_: Any) -> None:
        self.starts |= set(batch["start_frame"].tolist())
        (latents,) = task.teacher.latents(batch)
        with torch.no_grad():
            for name, z in self.model.encode(batch["clip"]).mode().items():
                torch.testing.assert_close(latents[name], z, rtol=1e-4, atol=1e-5)


def test_latents_on_disk_are_those_of_the_clips_and_their_decoder_decodes_them(weights, stored, tmp_path):
    videos, latents = stored
    compared = Compared(weights)
    task = on_disk(latents, only_decoder=True)
    run(tmp_path, task, 4, windows(videos), callbacks=[compared])
    assert len(compared.starts) > 2
    assert not any(start % 4 for start in compared.starts)
    words = ["decode", str(latents), "--out", str(tmp_path / "out"), "--accelerator", "cpu", "--ckpt_path"]
    assert main([*words, str(tmp_path / "last.ckpt")]) == 0
    assert (tmp_path / "out" / "bikes.mp4").exists()


def test_a_run_changes_between_a_teacher_and_its_latents(weights, stored, tmp_path):
    videos, latents = stored
    run(tmp_path, distil(weights), 1, windows(videos))
    run(tmp_path, on_disk(latents), 2, windows(videos), ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 8.0}, r"got data\.fps=8\.0; set --data\.fps null"),
        ({"augment": True}, r"got data\.augment=true; set --data\.augment windows"),
        ({"augment": False}, r"got data\.augment=false; set"),
        ({"resize": "bilinear"}, r"set --data\.resize area"),
    ],
)
def test_clips_that_are_no_windows_are_refused_before_a_step(stored, tmp_path, options, message):
    videos, latents = stored
    with pytest.raises(UserError, match=message):
        run(tmp_path, on_disk(latents), 1, windows(videos, **options))


def test_clips_without_latents_are_refused_by_name(stored):
    _, latents = stored
    task = on_disk(latents)
    task.teacher.setup(task.autoencoder, None)
    batch = {"clip": CLIPS[:1], "name": ["bikes.mp4"], "start_frame": torch.tensor([4])}
    assert set(task.teacher.latents(batch)[0]) == {"structure", "dynamics"}
    with pytest.raises(UserError, match=r"latents of 4 frames of bikes\.mp4 from frame 5 on in .*got none"):
        task.teacher.latents(batch | {"start_frame": torch.tensor([5])})
    with pytest.raises(UserError, match=r"latents of 3 frames of bikes\.mp4 from frame 4 on"):
        task.teacher.latents(batch | {"padded": torch.tensor([1])})
    with pytest.raises(UserError, match="from frame 4000000 on"):
        task.teacher.latents(batch | {"start_frame": torch.tensor([4_000_000])})
    with pytest.raises(UserError, match=r"latents of other\.mp4 in .*got none of that video"):
        task.teacher.latents(batch | {"name": ["other.mp4"]})


def test_the_stage_is_a_second_config(weights, tmp_path):
    overlay = Path(__file__).resolve().parents[2] / "configs" / "stages" / "distil.yaml"
    words = ["fit", "--config", str(write_config(tmp_path)), "--config", str(overlay), "--trainer.max_steps=2"]
    words += ["--model.autoencoder.hidden_size=16", "--trainer.log_every_n_steps=1"]
    assert main([*words, f"--model.teacher.path={weights}"]) == 0
    (file,) = tmp_path.rglob("metrics.csv")
    assert {"train/latent_match", "train/teacher_decode"} <= set(file.read_text().splitlines()[0].split(","))
