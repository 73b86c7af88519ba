"""Pictures in TensorBoard, from a real training."""

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_model
from torch.utils.data import DataLoader

from vidtwin.losses.autoencoder import AutoencoderLoss
from vidtwin.schedules import WarmupCosine
from vidtwin.training.callbacks.clips import ClipLogger
from vidtwin.training.task import AutoencoderTask
from vidtwin.training.trainer import VideoTrainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_first_clips_are_shown_with_each_latent_alone(tmp_path, precision):
    items = [{"clip": torch.rand(3, 4, 32, 32) * 2 - 1, "name": f"{index}.avi"} for index in range(4)]
    task = AutoencoderTask(
        tiny_model(), AutoencoderLoss(perceptual_weight=0), scheduler=lambda o: WarmupCosine(o, warmup_steps=1)
    )
    logger = TensorBoardLogger(tmp_path)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = VideoTrainer(
        accelerator="cpu",
        max_steps=2,
        precision=precision,
        logger=logger,
        callbacks=[ClipLogger(num_clips=3)],
        default_root_dir=tmp_path,
        **quiet,
    )
    trainer.fit(task, DataLoader(items, batch_size=2), DataLoader(items, batch_size=2))
    events = EventAccumulator(logger.log_dir).Reload()
    shown = {f"val_clips/{index}/{kind}" for index in range(3) for kind in ("frames", "video")}
    assert set(events.Tags()["images"]) == shown
    assert events.Images("val_clips/0/frames")[-1].step == 2
