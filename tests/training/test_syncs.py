"""Count how often the host waits for the device in a step (on a CPU: values read, or made from a number)."""

import traceback
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tiny import Clips, tiny_task, trainer
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from vidtwin.training.callbacks import progress


class Waits(TorchDispatchMode):
    """Collect the lines that read a tensor's value (device to host) or make a tensor of one (host to device)."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default):
            ours = [f for f in traceback.extract_stack()[:-1] if "/torch/" not in f.filename]
            self.lines.append(f"{func}: {ours[-1].filename}:{ours[-1].lineno}")
        return func(*args, **(kwargs or {}))


class Count(Callback):
    """Count in batch 3, from its start to the start of the next."""

    def __init__(self) -> None:
        self.waits = Waits()

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3:
            self.waits.__enter__()
        elif trainer.global_step == 4:
            self.waits.__exit__(None, None, None)


@pytest.mark.parametrize("gan_start", [None, 0])
def test_a_step_waits_for_the_device_once(gan_start: int | None, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(progress, "_INTERVAL", 60.0)
    count = Count()
    optimizer = partial(AdamW, lr=1e-3, fused=True)  # as in the configs; the loop over tensors reads its counters
    task = tiny_task(gan_start=gan_start, ema_decay=0.9, optimizer=optimizer, discriminator_optimizer=optimizer)
    run = trainer(tmp_path, 5, callbacks=[count], enable_progress_bar=True, val_check_interval=None)
    run.fit(task, datamodule=Clips(count=10))
    assert run.global_step == 5
    on_the_host = ("/datamodules/clips.py", "/datamodules/loader.py")  # what the loader does
    lines = [line for line in count.waits.lines if not any(file in line for file in on_the_host)]
    assert len(lines) == 1, "\n".join(lines)
