"""Values that `Health` logs in a training of a tiny VidTwin, against the same values computed from its weights."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.profilers import SimpleProfiler
from tiny import tiny_model
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.optim import AdamW
from torch.utils.data import DataLoader

from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.losses.autoencoder import AutoencoderLoss
from vidtwin.posteriors import Encoding, Quantized
from vidtwin.schedules import WarmupCosine
from vidtwin.training.callbacks import health
from vidtwin.training.callbacks.health import Health
from vidtwin.training.task import AutoencoderTask
from vidtwin.training.trainer import VideoTrainer


class Clips(LightningDataModule):
    """Six smooth clips of 4 frames of 32 px: three batches of two to train on, one of four and one of two to validate.

    Args:
        on_item: Called whenever a training clip is read.
    """

    def __init__(self, on_item=lambda: None) -> None:
        super().__init__()
        coarse = torch.rand(6, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
        # So much alike that, of a tiny model's units, some are active and some are not.
        self.clips = 0.35 * nn.functional.interpolate(coarse, (4, 32, 32), mode="trilinear")
        self.on_item = on_item

    def items(self):
        return [{"clip": clip, "name": f"clip{index}.avi", "start_frame": 0} for index, clip in enumerate(self.clips)]

    def train_dataloader(self):
        items, on_item = self.items(), self.on_item

        class Read(torch.utils.data.Dataset):
            def __len__(self):
                return len(items)

            def __getitem__(self, index):
                on_item()
                return items[index]

        return DataLoader(Read(), batch_size=2)

    def val_dataloader(self):
        return DataLoader(self.items(), batch_size=4)


class Memory(Logger):
    """Keeps what is logged: `values[step][name]`."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics, step=None):
        self.values.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *_, **__): ...

    def named(self, step, *starts):
        return {name: value for name, value in self.values.get(step, {}).items() if name.startswith(starts)}


class Codes(VideoAutoencoder):
    """Each 8×8 patch is the nearest of eight vectors."""

    latent_names = ("patches",)

    def __init__(self):
        super().__init__()
        self.down = nn.Conv3d(3, 2, (1, 8, 8), stride=(1, 8, 8))
        self.up = nn.ConvTranspose3d(2, 3, (1, 8, 8), stride=(1, 8, 8))
        self.codebook = nn.Embedding(8, 2)

    def codes(self, clip):
        vectors = self.down(clip).movedim(1, -1)
        return torch.cdist(vectors.flatten(0, -2), self.codebook.weight).argmin(1).view(vectors.shape[:-1])

    def _encode(self, clip):
        codes = self.codes(clip)
        return Encoding(patches=Quantized(self.codebook(codes).movedim(-1, 1), codes, 8))

    def _decode(self, latents):
        return self.up(latents["patches"])

    def _latent_shapes(self, clip_shape):
        return {"patches": (2, clip_shape[1], clip_shape[2] // 8, clip_shape[3] // 8)}

    @property
    def last_layer(self):
        return self.up.weight


def fit(folder, *callbacks, model=None, data=None, **arguments):
    """Three steps: the task and its logger."""
    torch.manual_seed(0)
    task = AutoencoderTask(
        model or tiny_model(),
        AutoencoderLoss(perceptual_weight=0),
        optimizer=lambda p: AdamW(p, lr=1e-3),
        scheduler=lambda o: WarmupCosine(o, warmup_steps=1),
    )
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 2}
    settings = {"accelerator": "cpu", "max_steps": 3, "default_root_dir": folder, "num_sanity_val_steps": -1}
    logger = Memory()
    trainer = VideoTrainer(**{**settings, **quiet, "logger": logger, "callbacks": list(callbacks), **arguments})
    trainer.fit(task, data or Clips())
    return task, logger


def of_latents(logger, step):
    """What `Health` alone logs of a validation."""
    logged = logger.named(
        step, "val/kl/", "val/active_units/", "val/psnr/", "val/codebook_usage/", "val/dead_codes/", "val/perplexity/"
    )
    assert all(type(value) is float for value in logged.values())
    return logged


def decibels(prediction, target):
    """PSNR by its definition, mean over frames and clips."""
    error = (prediction.double().clamp(-1, 1) - target.double()) / 2
    return float((-10 * torch.log10(error.square().mean((1, 3, 4)) + 1e-8)).mean())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("health"), Health())


@torch.no_grad()
def reference(model):
    """All that is to be logged of the six clips, taken at once."""
    clips = Clips().clips
    encoding = model.eval().encode(clips)
    expected = {}
    for name, posterior in encoding.items():
        mean, deviation = posterior.mean.double(), (posterior.logvar.double() / 2).exp()
        kl = kl_divergence(Normal(mean, deviation), Normal(0.0, 1.0)).flatten(2).sum(2).mean(0)
        active = (np.var(mean.numpy(), axis=0) > 0.01).reshape(len(kl), -1).mean(1)
        expected |= {f"val/kl/{name}": float(kl.sum()), f"val/active_units/{name}": active.mean()}
        for channel in range(len(kl)):
            expected[f"val/kl/{name}/{channel}"] = float(kl[channel])
            expected[f"val/active_units/{name}/{channel}"] = active[channel]
        expected[f"val/psnr/{name}_only"] = decibels(model.decode({name: mean.float()}), clips)
    return expected


def test_every_channels_kl_and_active_units_and_each_latent_alone_are_logged(trained):
    task, logger = trained
    expected = reference(task.autoencoder)
    assert {"val/kl/structure/3", "val/active_units/dynamics/7", "val/psnr/dynamics_only"} < set(expected)
    assert of_latents(logger, 3) == pytest.approx(expected, rel=1e-4)
    shares = [expected[f"val/active_units/{name}"] for name in ("structure", "dynamics")]
    assert all(0 < share < 1 for share in shares)


def test_the_channels_add_up_to_the_kl_of_the_loss(trained):
    _, logger = trained
    total = sum(logger.values[3][f"val/kl/{name}"] for name in ("structure", "dynamics"))
    assert total == pytest.approx(logger.values[3]["val/kl"], rel=1e-5)


def test_the_curves_start_before_the_first_step_unless_a_few_clips_were_checked(trained, tmp_path):
    _, logger = trained
    torch.manual_seed(0)
    assert of_latents(logger, 0) == pytest.approx(reference(tiny_model()), rel=1e-4)
    _, logger = fit(tmp_path, Health(), num_sanity_val_steps=1)
    assert not logger.named(0, "val/")
    assert set(of_latents(logger, 3)) == set(of_latents(trained[1], 3))


def test_partial_and_max_channels_reduce_the_logged_values(tmp_path):
    _, logger = fit(tmp_path, Health(partial=False, max_channels=4))
    whole = {f"val/{kind}/{name}" for kind in ("kl", "active_units") for name in ("structure", "dynamics")}
    channels = {f"val/{kind}/structure/{channel}" for kind in ("kl", "active_units") for channel in range(4)}
    assert set(of_latents(logger, 3)) == whole | channels  # dynamics has eight channels


def test_dead_codes_are_logged(tmp_path):
    model = Codes()
    with torch.no_grad():
        model.codebook.weight[5:] = 100.0  # codes that no patch is near to
    task, logger = fit(tmp_path, Health(), model=model)
    counts = np.bincount(task.autoencoder.codes(Clips().clips).flatten().numpy(), minlength=8)
    shares = counts[counts > 0] / counts.sum()
    assert counts[5:].sum() == 0
    assert of_latents(logger, 3) == pytest.approx(
        {
            "val/codebook_usage/patches": (counts > 0).mean(),
            "val/dead_codes/patches": (counts == 0).sum(),
            "val/perplexity/patches": np.exp(-(shares * np.log(shares)).sum()),
        }
    )


def test_in_mixed_precision_each_latent_is_decoded_as_the_model_is(tmp_path):
    _, logger = fit(tmp_path, Health(), precision="bf16-mixed")
    assert {"val/psnr/structure_only", "val/psnr/dynamics_only"} < set(of_latents(logger, 3))


def test_clips_that_never_came_and_models_that_keep_no_encoding_are_no_error(tmp_path):
    class Bare(Codes):
        def forward(self, clip):
            result = super().forward(clip)
            result.encoding = None
            return result

    _, logger = fit(tmp_path, Health(), limit_val_batches=0)
    assert not of_latents(logger, 3)
    _, logger = fit(tmp_path, Health(), model=Bare())
    assert not of_latents(logger, 3)
    assert "val/psnr" in logger.values[3]


class Clock:
    """A time that passes only where a test says so."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(health, "time", SimpleNamespace(monotonic=lambda: self.now))

    def read(self):
        """A clip takes one second more than the one before it: 1, 2, 3, …"""
        self.clips = getattr(self, "clips", 0) + 1
        self.now += self.clips


class Slow(Callback):
    """All that is not the loader takes its time too."""

    def __init__(self, clock) -> None:
        self.clock = clock

    def later(self, *_, **__):
        self.clock.now += 1000

    on_train_batch_start = on_train_batch_end = on_train_epoch_start = on_train_epoch_end = later
    on_validation_batch_end = on_before_zero_grad = on_save_checkpoint = later


def test_the_wait_for_the_loader_is_that_and_nothing_else(tmp_path, monkeypatch):
    clock, profiler = Clock(monkeypatch), SimpleProfiler(dirpath=tmp_path, filename="profile")
    callbacks = [Slow(clock), Health(), Slow(clock)]
    data, settings = Clips(clock.read), {"max_steps": 6, "val_check_interval": 1, "profiler": profiler}
    _, logger = fit(tmp_path, *callbacks, data=data, **settings)
    waits = {
        step: values["train/loader_wait"] for step, values in logger.values.items() if "train/loader_wait" in values
    }
    # Two clips a batch, in two epochs; a value every two batches, their mean.
    assert waits == {1: (1 + 2 + 3 + 4) / 2, 3: (5 + 6 + 7 + 8) / 2, 5: (9 + 10 + 11 + 12) / 2}
    # The user's own profiler has been told all the same, and is left as it was.
    assert len(profiler.recorded_durations["[_TrainingEpochLoop].train_dataloader_next"]) == 6
    assert not {"start", "stop"} & set(vars(profiler))


def test_a_training_that_fails_leaves_the_profiler_as_it_was(tmp_path):
    class Failing(Callback):
        def on_train_batch_start(self, *_, **__):
            raise RuntimeError("broken")

    profiler = SimpleProfiler(dirpath=tmp_path, filename="profile")
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, Health(), Failing(), profiler=profiler)
    assert not {"start", "stop"} & set(vars(profiler))
