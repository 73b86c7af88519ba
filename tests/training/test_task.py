"""The training loop: one step is one batch, two players, checkpoints that resume."""

import csv
import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from tiny import Clips, Poisoned, baseline_task, tiny_model, tiny_task, trainer
from torch.optim import LBFGS
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from vidtwin.errors import UserError
from vidtwin.losses.autoencoder import AutoencoderLoss
from vidtwin.posteriors import Encoding
from vidtwin.training.callbacks.checkpoint import BestCheckpoint, LatestCheckpoint
from vidtwin.training.checks import check_training
from vidtwin.training.teacher import Teacher
from vidtwin.video.convert import to_clip


class Watcher(Callback):
    """Counts batches and keeps the discriminator's weights before each."""

    def __init__(self) -> None:
        self.batches = 0
        self.steps: list[int] = []
        self.weights: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        self.batches += 1
        self.steps.append(trainer.global_step)
        if task.loss.discriminator is not None:
            self.weights.append(next(task.loss.discriminator.parameters()).detach().clone())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Seven steps with a GAN from step 3 on: folder, watcher, trainer and task."""
    folder = tmp_path_factory.mktemp("trained")
    watcher = Watcher()
    saved = LatestCheckpoint(every_n_steps=5, dirpath=str(folder / "checkpoints"))
    run = trainer(folder, callbacks=[watcher, saved, BestCheckpoint(dirpath=str(folder / "checkpoints"))])
    task = tiny_task(gan_start=3)
    run.fit(task, Clips())
    return folder, watcher, run, task


def test_one_step_is_one_batch_with_two_optimizers(trained):
    _, watcher, run, task = trained
    assert run.global_step == watcher.batches == 7
    assert watcher.steps == [0, 1, 2, 3, 4, 5, 6]
    assert [s.last_epoch for s in task.lr_schedulers()] == [7, 7]


def test_the_discriminator_first_moves_in_the_batch_that_starts_the_gan(trained):
    _, watcher, _, _ = trained
    moved = [not torch.equal(a, b) for a, b in zip(watcher.weights, watcher.weights[1:], strict=False)]
    assert moved == [False, False, False, True, True, True]


def test_the_last_and_the_best_checkpoint_stay(trained):
    folder, _, _, task = trained
    kept = ["best.ckpt", "last.ckpt", "step-00000005.ckpt", "step-00000007.ckpt"]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == kept
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 7  # not a multiple of 5: written when training ended
    assert last["model_spec"]["init_args"]["hidden_size"] == 32
    assert torch.equal(last["state_dict"]["autoencoder.decoder.linear.weight"], task.autoencoder.last_layer)


def test_the_best_checkpoint_is_found_by_that_word(trained):
    folder, _, run, _ = trained
    (means,) = run.validate(tiny_task(), datamodule=Clips(), ckpt_path="best", verbose=False)
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    score = next(state["best_model_score"] for name, state in best["callbacks"].items() if name.startswith("Best"))
    assert means["val/psnr"] == pytest.approx(float(score), abs=1e-4)


def test_a_resumed_run_counts_and_schedules_on(trained, tmp_path):
    folder, *_ = trained
    watcher = Watcher()
    run = trainer(tmp_path, max_steps=10, callbacks=[watcher])
    task = tiny_task(gan_start=3)
    run.fit(task, Clips(), ckpt_path=folder / "checkpoints" / "last.ckpt")
    assert watcher.steps == [7, 8, 9]
    # The cosine now ends at step 10: at 9 it is in its last eighth, not at the 0 where the first run's ended.
    rates = [float(run.callback_metrics["lr/generator"]), float(task.optimizers()[0].param_groups[0]["lr"])]
    assert rates == pytest.approx([1e-3 * 0.5 * (1 + math.cos(math.pi * 7 / 8)), 0.0])


def test_validation_takes_the_autoencoder_alone_from_a_checkpoint_with_a_gan(trained, tmp_path):
    folder, _, _, original = trained
    task = tiny_task()
    last = folder / "checkpoints" / "last.ckpt"
    trainer(tmp_path).validate(task, datamodule=Clips(), ckpt_path=last, verbose=False)
    assert torch.equal(task.autoencoder.last_layer, original.autoencoder.last_layer)


def test_a_checkpoint_of_another_size_is_named_tensor_by_tensor(trained, tmp_path):
    folder, *_ = trained
    task = tiny_task(gan_start=3)
    task.autoencoder = tiny_model(hidden_size=48)
    with pytest.raises(UserError, match=r"another model or size: .* is \(.*\), expected \("):
        trainer(tmp_path).fit(task, Clips(), ckpt_path=folder / "checkpoints" / "last.ckpt")


def test_a_checkpoint_of_another_discriminator_is_named_too(trained, tmp_path):
    folder, *_ = trained
    with pytest.raises(UserError, match=r"unexpected loss\.discriminator\..*--init_from starts a new training"):
        trainer(tmp_path).fit(tiny_task(), Clips(), ckpt_path=folder / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize(
    ("arguments", "task_arguments", "message"),
    [
        ({}, {"warmup_steps": 7}, "warmup_steps=7 and 7 steps"),
        ({}, {"gan_start": 7}, "adversarial_start=7 and trainer.max_steps=7"),
        ({"max_steps": -1, "max_epochs": 1}, {}, "max_steps above 0, got -1"),
        ({"accumulate_grad_batches": 2}, {}, "--model.accumulation 2 splits each batch"),
        ({"gradient_clip_val": 1.0}, {}, "got 1.0 and None; --model.gradient_clip_norm NORM"),
        ({"gradient_clip_algorithm": "value"}, {}, "--model.gradient_clip_norm NORM"),
        ({}, {"scheduler": lambda o: ReduceLROnPlateau(o)}, "counts steps, got ReduceLROnPlateau"),
        ({}, {"scheduler": lambda o: OneCycleLR(o, 1.0, 6)}, "max_steps=7 steps at least, got 6"),
        ({}, {"optimizer": lambda p: LBFGS(p)}, "by one gradient, got LBFGS"),
        ({"val_check_interval": 4}, {}, "at most the 3 batches of an epoch, got 4; .* null counts batches"),
        ({"callbacks": [LearningRateFinder()]}, {}, r"got LearningRateFinder, .* --model\.optimizer\.lr"),
        ({"callbacks": [BatchSizeFinder()]}, {}, r"got BatchSizeFinder, .* --data\.batch_size"),
        ({"callbacks": [StochasticWeightAveraging(1e-3)]}, {}, r"--model\.ema_decay"),
        ({"callbacks": [GradientAccumulationScheduler({0: 2})]}, {}, r"--model\.accumulation"),
    ],
)
def test_invalid_settings_are_refused_before_the_first_step(tmp_path, arguments, task_arguments, message):
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, **arguments).fit(tiny_task(**task_arguments), Clips())


def test_training_without_checkpoints_names_the_options_that_save_fewer(tmp_path):
    with pytest.raises(UserError, match=r"got false: .* --latest_checkpoint\.every_n_steps N"):
        trainer(tmp_path, enable_checkpointing=False, callbacks=[LatestCheckpoint()])
    assert trainer(tmp_path, enable_checkpointing=False).checkpoint_callback is None


def test_a_training_without_validation_needs_no_clips_for_it(tmp_path):
    class TrainingAlone(Clips):
        def make_dataset(self, split):
            if split == "val":
                raise UserError("Expected videos in split val, got none.")
            return super().make_dataset(split)

    saved = [each(dirpath=str(tmp_path / "checkpoints")) for each in (LatestCheckpoint, BestCheckpoint)]
    run = trainer(tmp_path, max_steps=3, limit_val_batches=0, num_sanity_val_steps=-1, callbacks=saved)
    run.fit(tiny_task(), TrainingAlone())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["last.ckpt", "step-00000003.ckpt"]
    with pytest.raises(UserError, match="videos in split val"):
        trainer(tmp_path / "b").fit(tiny_task(), TrainingAlone())


@pytest.mark.parametrize("player", ["optimizer", "discriminator_optimizer"])
def test_another_optimizer_than_the_checkpoints_is_refused(trained, tmp_path, player):
    folder, *_ = trained
    task = tiny_task(gan_start=3, **{player: lambda p: torch.optim.SGD(p, lr=0.1)})
    with pytest.raises(UserError, match="with SGD, got one with another class"):
        trainer(tmp_path).fit(task, Clips(), ckpt_path=folder / "checkpoints" / "last.ckpt")


def test_fp16_is_refused():
    # Lightning itself turns 16-mixed into bf16-mixed on CPU, so no run here can show it.
    task = tiny_task()
    for precision in ("16-mixed", "bf16-true", "64-true"):
        trainer = SimpleNamespace(precision=precision, max_steps=7)
        with pytest.raises(UserError, match=rf"Expected trainer\.precision bf16-mixed .* got {precision}"):
            check_training(task.autoencoder, task.loss, trainer)


def test_missing_lpips_weights_stop_training_but_not_validation(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDTWIN_OFFLINE", "1")
    absent = str(tmp_path / "vgg16.pth")
    task = tiny_task()
    task.loss = AutoencoderLoss(perceptual_backbone=absent)
    with pytest.raises(UserError, match=r"vgg16\.pth.*perceptual_weight 0"):
        trainer(tmp_path).fit(task, Clips())
    trainer(tmp_path).validate(task, datamodule=Clips(), verbose=False)


def test_gradient_clipping_bounds_each_players_gradient(tmp_path):
    norms: list[float] = []

    class Norms(Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            norms.append(float(trainer.callback_metrics["train/gradient_norm"]))

    free, clipped = [], []
    for limit, kept in ((None, free), (1e-6, clipped)):
        task = tiny_task(gradient_clip_norm=limit)
        before = task.autoencoder.last_layer.detach().clone()
        task.optimizer = lambda p: torch.optim.SGD(p, lr=1.0)
        trainer(tmp_path, max_steps=3, callbacks=[Norms()]).fit(task, Clips())
        kept.append(float((task.autoencoder.last_layer.detach() - before).norm()))
    assert min(norms) > 1e-6  # what is logged is the norm before the clip
    assert clipped[0] <= 2e-6 * 1.01  # two steps with a rate above 0 (the first of the warm-up has none)
    assert free[0] > 100 * clipped[0]


def test_the_parts_of_an_accumulated_batch_add_up_to_its_gradient(tmp_path, monkeypatch):
    monkeypatch.setattr(Encoding, "sample", Encoding.mode)

    def trained_with(parts):
        task = tiny_task(
            gan_start=0,
            accumulation=parts,
            model={"qformer_dropout": 0.0},
            loss={"adaptive_weight": False},
            optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
            scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0),
            discriminator_optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
            discriminator_scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0),
        )
        run = trainer(tmp_path, max_steps=3)
        run.fit(task, Clips(count=10, batch_size=5))
        assert run.global_step == 3
        return task.state_dict(), {name: float(value) for name, value in run.callback_metrics.items()}

    whole, whole_logged = trained_with(1)
    for parts in (2, 5):  # of 5 clips: 3 and 2, which weigh as much as they are
        state, logged = trained_with(parts)
        torch.testing.assert_close(state, whole, rtol=1e-4, atol=1e-5)
        assert logged["train/pixel"] == pytest.approx(whole_logged["train/pixel"], rel=1e-5)
        assert logged["discriminator/loss"] == pytest.approx(whole_logged["discriminator/loss"], rel=1e-5)


def test_an_accumulated_batch_is_one_step(tmp_path):
    watcher = Watcher()
    task = tiny_task(gan_start=3, accumulation=2, ema_decay=0.9)
    saved = LatestCheckpoint(every_n_steps=3, keep=9, dirpath=str(tmp_path / "checkpoints"))
    trainer(tmp_path, callbacks=[watcher, saved]).fit(task, Clips())
    assert watcher.steps == [0, 1, 2, 3, 4, 5, 6]
    moved = [not torch.equal(a, b) for a, b in zip(watcher.weights, watcher.weights[1:], strict=False)]
    assert moved == [False, False, False, True, True, True]
    assert [s.last_epoch for s in task.lr_schedulers()] == [7, 7]
    assert task.ema.average.updates == 7
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert kept == ["step-00000003.ckpt", "step-00000006.ckpt", "step-00000007.ckpt"]


def test_more_parts_than_clips_are_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"at least model\.accumulation=3 clips in a batch, got 2; raise data\.batch_size"
    ):
        trainer(tmp_path).fit(tiny_task(accumulation=3), Clips())
    with pytest.raises(UserError, match=r"model\.accumulation of at least 1, got 0"):
        tiny_task(accumulation=0)


def test_the_curves_count_steps_not_batches(tmp_path):
    logger = CSVLogger(tmp_path, name="run", version="")
    run = trainer(tmp_path, max_steps=6, logger=logger, log_every_n_steps=1)
    run.fit(tiny_task(gan_start=3), Poisoned())
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == [0, 1, 2, 3, 4, 5]
    assert [int(row["step"]) for row in rows if row["discriminator/loss"]] == [3, 4, 5]
    shares = [float(row["train/skipped"]) for row in rows if row["train/skipped"]]
    assert shares[-1] > 0
    assert len(shares) > 6  # of skipped batches too


def test_lecams_means_move_equally_with_and_without_accumulation(tmp_path):
    means = []
    for parts in (1, 4):
        task = tiny_task(gan_start=0, accumulation=parts, loss={"lecam_weight": 0.1, "lecam_decay": 0.5}, lr=0.0)
        trainer(tmp_path, max_steps=3).fit(task, Clips(count=4, batch_size=4))
        means.append(task.loss.lecam_means)
    # The parts come one after the other, so that the last weighs a little more than in the mean of all.
    torch.testing.assert_close(means[1], means[0], rtol=0.1, atol=1e-3)


def test_frozen_parts_are_in_evaluation_mode_too(tmp_path):
    modes = []

    class Modes(Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            modes.append((task.autoencoder.structure.qformer.training, task.autoencoder.decoder.training))

    task = tiny_task(freeze=["structure.qformer"])
    trainer(tmp_path, max_steps=4, callbacks=[Modes()], val_check_interval=2).fit(task, Clips())
    assert modes == [(False, True)] * 4


def test_a_frozen_last_layer_is_refused_at_the_start_if_the_gan_needs_it(tmp_path):
    with pytest.raises(UserError, match=r"trained last layer .* model\.freeze names"):
        trainer(tmp_path).fit(tiny_task(gan_start=3, freeze=["decoder"]), Clips())


def test_another_freeze_than_the_checkpoints_is_named(trained, tmp_path):
    folder, *_ = trained
    task = tiny_task(gan_start=3, freeze=["encoder"])
    with pytest.raises(UserError, match=r"another model\.freeze; --init_from starts a new training"):
        trainer(tmp_path).fit(task, Clips(), ckpt_path=folder / "checkpoints" / "last.ckpt")


def test_the_best_may_be_that_of_any_logged_validation(tmp_path):
    best = BestCheckpoint(monitor="val/loss", mode="min", dirpath=str(tmp_path / "checkpoints"))
    trainer(tmp_path, callbacks=[best]).fit(tiny_task(), Clips())
    assert (tmp_path / "checkpoints" / "best.ckpt").exists()


def test_a_resumed_run_has_the_rates_of_its_config_from_the_first_step_on(trained, tmp_path):
    folder, *_ = trained
    rates = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, task, batch, batch_idx):
            rates.append(task.optimizers()[0].param_groups[0]["lr"])

    task = tiny_task(gan_start=3, lr=1e-5)
    run = trainer(tmp_path, max_steps=9, callbacks=[Rates()])
    run.fit(task, Clips(), ckpt_path=folder / "checkpoints" / "last.ckpt")
    assert rates[0] == pytest.approx(1e-5 * 0.5 * (1 + math.cos(math.pi * 5 / 7)))


def test_training_logs_how_much_of_a_codebook_a_batch_uses(tmp_path):
    class Count(Callback):
        def on_train_batch_start(self, trainer, task, batch, batch_idx):
            with torch.no_grad():
                codes = task.autoencoder.encode(batch["clip"])["latent"].codes
            shares = torch.bincount(codes.flatten(), minlength=64).double() / codes.numel()
            entropy = -sum(float(share) * math.log(share) for share in shares if share > 0)
            self.wanted = (int((shares > 0).sum()) / 64, math.exp(entropy))

    count = Count()
    run = trainer(tmp_path, max_steps=3, callbacks=[count])
    run.fit(baseline_task("magvit2"), Clips())
    found = [float(run.callback_metrics[f"train/{name}/latent"]) for name in ("codebook_usage", "perplexity")]
    assert found == pytest.approx(count.wanted, rel=1e-5)
    assert 0 < found[0] < 1 < found[1] < 64


def test_a_clip_norm_that_cannot_work_is_refused():
    with pytest.raises(UserError, match=r"gradient_clip_norm above 0, or null for none, got -1"):
        tiny_task(gradient_clip_norm=-1)


def test_bf16_trains_with_finite_losses(tmp_path):
    run = trainer(tmp_path, max_steps=4, precision="bf16-mixed")
    run.fit(tiny_task(gan_start=2), Clips())
    losses = [run.callback_metrics[name] for name in ("train/loss", "discriminator/loss", "val/psnr")]
    assert all(value.isfinite() for value in losses)


def test_training_lowers_the_error(tmp_path):
    task = tiny_task(warmup_steps=2)
    clips = Clips().dataset("val")
    clip = to_clip(torch.stack([clips[index]["clip"] for index in range(6)]))
    with torch.no_grad():
        before = (task.autoencoder.eval()(clip).clip - clip).abs().mean()
    trainer(tmp_path, max_steps=40).fit(task.train(), Clips())
    with torch.no_grad():
        after = (task.autoencoder.eval()(clip).clip - clip).abs().mean()
    assert after < 0.7 * before


@pytest.mark.parametrize(
    ("strategy", "searches"),
    [
        ("auto", [False, True]),
        ("ddp", [False, True]),
        ("ddp_find_unused_parameters_true", [True, True]),
        (DDPStrategy(find_unused_parameters=False), [False, False]),  # a strategy object is the user's own
    ],
)
def test_only_the_user_or_the_task_has_ddp_search_for_parameters_without_a_gradient(tmp_path, strategy, searches):
    run = trainer(tmp_path, devices=2, strategy=strategy)
    found = []
    for teacher in (None, Teacher("x", only_decoder=True)):  # beside which the encoder does not run
        run._choose_search(tiny_task(teacher=teacher))
        found.append(run.strategy._ddp_kwargs["find_unused_parameters"])
    assert found == searches
    assert run.strategy._ddp_kwargs["gradient_as_bucket_view"]


def test_batches_without_a_clip_are_refused_with_their_keys():
    with pytest.raises(UserError, match="Expected batches with a clip, got latents, label; set --data"):
        tiny_task().predict_step({"latents": {}, "label": torch.zeros(1)}, 0)


def test_tensor_float_32_holds_in_a_training_alone(tmp_path):
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, *_):
            seen.append(torch.backends.cuda.matmul.fp32_precision)

    before = torch.backends.cuda.matmul.fp32_precision
    trainer(tmp_path, 3, callbacks=[Look()], tensor_float_32=True, limit_val_batches=0).fit(tiny_task(), Clips())
    assert seen == ["tf32"] * 3
    assert torch.backends.cuda.matmul.fp32_precision == before != "tf32"
