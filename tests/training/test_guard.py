"""Steps with a non-finite loss or gradient: skipped, logged, replayed, rolled back, and the end of the training."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tiny import Clips, Poisoned, SmoothClips, tiny_task, trainer, write_config
from torch import nn

from vidtwin.cli import main
from vidtwin.errors import UserError
from vidtwin.losses.discriminator import PatchDiscriminator2d
from vidtwin.storage import checkpoints
from vidtwin.training.callbacks.checkpoint import BestCheckpoint, LatestCheckpoint
from vidtwin.training.callbacks.guard import StepGuard, format_clips
from vidtwin.training.replay import read, replay


class Watcher(Callback):
    """State of the task before and after each batch."""

    def __init__(self) -> None:
        self.before: list[dict[str, torch.Tensor]] = []
        self.unchanged: list[bool] = []
        self.steps: list[int] = []
        self.names: list[list[str]] = []
        self.rejected: list[bool] = []

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        self.state = {name: value.clone() for name, value in task.state_dict().items()}
        self.names.append(list(batch["name"]))
        self.steps.append(trainer.global_step)

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        after = task.state_dict()
        self.unchanged.append(all(torch.equal(value, after[name]) for name, value in self.state.items()))
        self.rejected.append(bool(outputs))


class Explode(Callback):
    """From a step on, put a weight where the loss overflows; a rollback puts it back."""

    def __init__(self, at: int, times: int = 1) -> None:
        self.at, self.times = at, times

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        if trainer.global_step == self.at and self.times:
            self.times -= 1
            nn.init.constant_(task.autoencoder.last_layer, math.inf)


def saved(folder: Path, every: int = 2) -> LatestCheckpoint:
    return LatestCheckpoint(every_n_steps=every, keep=3, dirpath=str(folder / "checkpoints"))


def test_a_poisoned_batch_is_logged_and_skipped_without_any_change(tmp_path, capfd):
    watcher = Watcher()
    discriminator = PatchDiscriminator2d(channels=8, num_layers=1, norm="batch")
    task = tiny_task(gan_start=1, loss={"discriminator": discriminator, "lecam_weight": 0.1}, ema_decay=0.9)
    run = trainer(tmp_path, max_steps=6, callbacks=[watcher])
    run.fit(task, Poisoned())
    poisoned = ["clip3.avi" in names for names in watcher.names]
    assert watcher.rejected == poisoned
    assert sum(poisoned) >= 2
    assert watcher.steps[-1] == 5
    assert len(watcher.steps) == 6 + sum(poisoned)
    assert run.global_step == 6
    # Batch norm's and LeCAM's running means too; at step 0 the warm-up's rate is 0.
    assert [u for u, step in zip(watcher.unchanged, watcher.steps, strict=True) if step] == [
        p for p, step in zip(poisoned, watcher.steps, strict=True) if step
    ]
    assert all(value.isfinite().all() for value in task.state_dict().values())
    assert all(value.isfinite().all() for value in task.ema.average.values.values())
    assert task.ema.average.updates == 6
    assert [scheduler.last_epoch for scheduler in task.lr_schedulers()] == [6, 6]
    assert float(run.callback_metrics["train/skipped"]) == pytest.approx(sum(poisoned) / len(poisoned))
    lines = [line for line in capfd.readouterr().err.splitlines() if "skipped" in line]
    assert len(lines) == sum(poisoned)
    assert "loss: pixel is nan, nll is nan" in lines[0]
    assert "clip3.avi from frame 0 (its pixels are not finite)" in lines[0]


def test_an_infinite_gradient_of_a_finite_loss_is_skipped_too(tmp_path, capfd):
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.inf

    class SteepOnce(Callback):
        def on_train_batch_start(self, trainer, task, batch, batch_idx):
            forward = type(task.autoencoder).forward
            task.autoencoder.forward = lambda clip: forward(task.autoencoder, clip)
            if batch_idx == 1:

                def steep(clip):
                    reconstruction = forward(task.autoencoder, clip)
                    reconstruction.clip = Steep.apply(reconstruction.clip)
                    return reconstruction

                task.autoencoder.forward = steep

    watcher = Watcher()
    run = trainer(tmp_path, max_steps=3, callbacks=[SteepOnce(), watcher])
    run.fit(tiny_task(), Clips())
    assert watcher.rejected == [False, True, False, False]
    assert watcher.unchanged[1]
    assert "gradient of autoencoder." in capfd.readouterr().err


def test_a_constant_clip_trains(tmp_path):
    class Constant(Clips):
        def make_dataset(self, split):
            dataset = SmoothClips(self.count)
            dataset.clips = torch.full_like(dataset.clips, 0.5)
            return dataset

    watcher = Watcher()
    task = tiny_task(gan_start=1, loss={"lecam_weight": 0.1, "r1_weight": 1.0}, gradient_clip_norm=1.0)
    trainer(tmp_path, max_steps=8, callbacks=[watcher]).fit(task, Constant())
    assert not any(watcher.rejected)


def test_after_some_skipped_steps_in_a_row_the_last_checkpoint_comes_back(tmp_path, capfd):
    watcher, guard = Watcher(), StepGuard(patience=2, rate_factor=0.5)
    task = tiny_task(ema_decay=0.9, warmup_steps=1)
    run = trainer(tmp_path, max_steps=8, callbacks=[Explode(at=5), watcher, guard, saved(tmp_path)])
    run.fit(task, Clips())
    # Steps 5 and 5 fail; back to the checkpoint of step 4, with the next clips and half the rate.
    assert watcher.steps == [0, 1, 2, 3, 4, 5, 5, 4, 5, 6, 7]
    assert watcher.rejected == [False] * 5 + [True] * 2 + [False] * 4
    order = [tuple(names) for names in watcher.names]
    reference = Watcher()
    trainer(tmp_path / "reference", max_steps=11, callbacks=[reference]).fit(tiny_task(), Clips())
    assert order == [tuple(names) for names in reference.names]
    assert task.rate_scale == 0.5
    assert task.lr_schedulers().last_epoch == 8
    error = capfd.readouterr().err
    assert f"back to {tmp_path / 'checkpoints' / 'step-00000004.ckpt'} (step 4), learning rates times 0.5" in error
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert (last["global_step"], last["training"]["rate_scale"]) == (8, 0.5)


def test_the_weights_after_going_back_are_those_of_the_checkpoint(tmp_path):
    class AtReturn(Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            if outputs and trainer.global_step == 4:
                self.state = {name: value.clone() for name, value in task.state_dict().items()}
                self.ema = {name: value.clone() for name, value in task.ema.average.values.items()}
                self.moments = task.optimizers().state_dict()["state"][0]["exp_avg"].clone()
                self.rate = task.optimizers().param_groups[0]["lr"]

    class KeepFour(Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            if trainer.global_step == 4 and not hasattr(self, "state"):
                self.state = {name: value.clone() for name, value in task.state_dict().items()}
                self.ema = {name: value.clone() for name, value in task.ema.average.values.items()}
                self.moments = task.optimizers().state_dict()["state"][0]["exp_avg"].clone()
                self.rate = task.optimizers().param_groups[0]["lr"]

    back, four = AtReturn(), KeepFour()
    callbacks = [Explode(at=5), four, StepGuard(patience=1), back, saved(tmp_path)]
    trainer(tmp_path, max_steps=6, callbacks=callbacks).fit(tiny_task(ema_decay=0.9, warmup_steps=1), Clips())
    assert all(torch.equal(value, back.state[name]) for name, value in four.state.items())
    assert all(torch.equal(value, back.ema[name]) for name, value in four.ema.items())
    assert torch.equal(back.moments, four.moments)
    assert back.rate == four.rate > 0


def test_a_failure_after_a_rollback_goes_back_further_and_then_ends_with_the_reason(tmp_path):
    watcher = Watcher()
    guard = StepGuard(patience=2, rollbacks=2)
    callbacks = [Explode(at=5, times=99), watcher, guard, saved(tmp_path)]
    with pytest.raises(
        UserError, match=r"after going back 2 times: 2 steps in a row .* step 5, loss: .*clip\d\.avi"
    ) as e:
        trainer(tmp_path, max_steps=9, callbacks=callbacks).fit(tiny_task(), Clips())
    assert "nonfinite" in str(e.value)
    assert watcher.steps == [0, 1, 2, 3, 4, 5, 5, 4, 5, 5, 2, 3, 4, 5, 5]


def test_an_exploding_learning_rate_ends_with_the_reason_and_the_clips(tmp_path):
    # Without a checkpoint there is nothing to go back to.
    task = tiny_task(lr=1e30, warmup_steps=1)
    with pytest.raises(UserError, match=r"no checkpoint to go back to: 5 steps .*clip\d\.avi from frame 0"):
        trainer(tmp_path, max_steps=50).fit(task, Clips())


@pytest.mark.parametrize("arguments", [{"patience": 0}, {"rollbacks": -1}, {"rate_factor": 0.0}, {"rate_factor": 2.0}])
def test_options_that_cannot_work_are_refused(arguments):
    with pytest.raises(UserError, match=f"guard.{next(iter(arguments))}"):
        StepGuard(**arguments)


def test_a_dump_is_replayed_to_the_same_end(tmp_path, capfd):
    task = tiny_task(gan_start=1)
    run = trainer(tmp_path, max_steps=4, callbacks=[Explode(at=2), StepGuard(patience=1), saved(tmp_path)])
    run.fit(task, Clips())
    (path,) = (tmp_path / "nonfinite").glob("*.pt")
    assert f"vidtwin replay {path}" in capfd.readouterr().err
    report = replay(tiny_task(gan_start=1), read(str(path)))
    text = "\n".join(report)
    assert "the largest is inf in autoencoder.decoder.linear.weight" in text
    assert "weights: 1 not finite, first autoencoder.decoder.linear.weight" in text
    assert "first module with a non-finite output: autoencoder.decoder.linear" in text
    assert report[-1].startswith("reproduced: loss: pixel is ")
    assert any(line.startswith("clip clip") and ": from -" in line for line in report)


def test_a_replayed_step_draws_the_same_numbers(tmp_path):
    class Losses(Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            self.loss = float(trainer.callback_metrics["train/loss"])
            self.content = {
                "reason": "", "step": 0, "rank": 0, "batch": batch, "state_dict": task.state_dict(),
                "training": {"batches": task.batches, "seed": task.seed},
            }  # fmt: skip

    kept = Losses()  # at step 0 the warm-up's rate is 0: the weights are still those that gave the loss
    trainer(tmp_path, max_steps=1, callbacks=[kept]).fit(tiny_task(warmup_steps=0), Clips())
    task = tiny_task()
    kept.content["state_dict"] = tiny_task().state_dict()
    torch.rand(7)  # whatever state the global generator is in
    report = replay(task, kept.content)
    assert f"train/total = {kept.loss:.6g}" in report
    assert report[-1].startswith("not reproduced")


def test_a_poisoned_step_is_logged_and_replayed_from_the_command_line(tmp_path, capsys):
    config = write_config(tmp_path, "tiny.Poisoned")
    assert main(["fit", "--config", str(config)]) == 0
    dumps = sorted((tmp_path / "runs" / "tiny" / "version_0" / "nonfinite").iterdir())
    captured = capsys.readouterr()
    assert "clip3.avi from frame 0 (its pixels are not finite), clip" in captured.err
    assert f"to run it again: vidtwin replay {dumps[0]}" in captured.err
    assert main(["replay", str(dumps[0])]) == 0
    report = capsys.readouterr().out
    assert "clip clip3.avi: 12288 of 12288 numbers are not finite" in report
    assert "first module with a non-finite output: autoencoder.encoder.patch_embed" in report
    assert report.splitlines()[-1].startswith("reproduced: loss: pixel is nan")


def test_a_buffer_that_is_replaced_is_restored_too(tmp_path):
    class Codebook(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, clip):
            self.mean = 0.9 * self.mean + 0.1 * clip.detach().mean()
            return self.inner(clip)

    task = tiny_task()
    task.autoencoder.encoder = Codebook(task.autoencoder.encoder)
    trainer(tmp_path, max_steps=5).fit(task, Poisoned())
    assert task.skipped > 0
    assert task.autoencoder.encoder.mean.isfinite()


def test_a_dump_that_finds_no_room_does_not_end_the_training(tmp_path, monkeypatch, capfd):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vidtwin.training.callbacks.guard.dump", full)
    trainer(tmp_path, max_steps=4).fit(tiny_task(), Poisoned())
    assert "no dump was written: [Errno 28] No space left on device" in capfd.readouterr().err


def test_resuming_after_a_rollback_does_not_undo_it(tmp_path):
    best = BestCheckpoint(dirpath=str(tmp_path / "checkpoints"))
    callbacks = [Explode(at=5, times=99), StepGuard(patience=1, rollbacks=2, rate_factor=0.5), saved(tmp_path), best]
    with pytest.raises(UserError, match="after going back 2 times"):
        trainer(tmp_path, 9, callbacks=callbacks, val_check_interval=1).fit(tiny_task(), Clips())
    newest = checkpoints.newest(tmp_path / "checkpoints")
    held = checkpoints.read(newest)
    assert (newest.name, held["training"]["rate_scale"]) == ("step-00000004.ckpt", 0.25)
    assert held["callbacks"]["StepGuard"]["gone_back"] == 2


def test_replay_refuses_another_file(tmp_path, capsys):
    torch.save({"state_dict": {}}, tmp_path / "last.ckpt")
    assert main(["replay", str(tmp_path / "last.ckpt")]) == 2
    assert "Expected the dump of a skipped step" in capsys.readouterr().err


def test_the_number_of_dumps_is_limited(tmp_path):
    task = tiny_task()
    trainer(tmp_path, max_steps=12, callbacks=[StepGuard(dumps=2)]).fit(task, Poisoned())
    assert len(list((tmp_path / "nonfinite").iterdir())) == 2
    assert np.isfinite(task.skipped)
    assert task.skipped > 2


def test_the_clips_of_a_batch_of_codes_are_named():
    batch = {"codes": {"grid": torch.zeros(2, 4, dtype=torch.int64)}, "name": ["a", "b"], "start_frame": [0, 8]}
    assert format_clips(batch) == "a from frame 0, b from frame 8"
