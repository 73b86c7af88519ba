"""Count how often the host waits for the device in a step."""

from functools import partial
from typing import Any

import pytest
from generation import latent_data, tiny_diffusion, write_latents
from tiny import Clips, tiny_task, trainer
from torch.optim import AdamW
from waits import Count

from vidtwin.training.callbacks import progress


@pytest.mark.parametrize("gan_start", [None, 0])
def test_a_step_waits_for_the_device_once(gan_start: int | None, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(progress, "_INTERVAL", 60.0)
    count = Count()
    optimizer = partial(AdamW, lr=1e-3, fused=True)  # as in the configs; the loop over tensors reads its counters
    task = tiny_task(gan_start=gan_start, ema_decay=0.9, optimizer=optimizer, discriminator_optimizer=optimizer)
    run = trainer(tmp_path, 5, callbacks=[count], enable_progress_bar=True, val_check_interval=None)
    run.fit(task, datamodule=Clips(count=10))
    assert run.global_step == 5
    assert len(count.lines) == 1, "\n".join(count.lines)


def test_a_step_of_a_diffusion_model_waits_for_the_device_once(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(progress, "_INTERVAL", 60.0)
    count = Count()
    task = tiny_diffusion(ema_decay=0.9, optimizer=partial(AdamW, lr=1e-3, fused=True), gradient_clip_norm=1.0)
    run = trainer(tmp_path, 5, callbacks=[count], enable_progress_bar=True)
    run.fit(task, datamodule=latent_data(write_latents(tmp_path)))
    assert run.global_step == 5
    assert len(count.lines) == 1, "\n".join(count.lines)
