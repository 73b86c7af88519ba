"""Count how often the host waits for the device (on a CPU: values read, or made from a number)."""

import traceback
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch.utils._python_dispatch import TorchDispatchMode


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
    """Count in the batch `at`, from its start to the start of the next, without what the loader does."""

    def __init__(self, at: int = 3) -> None:
        self.waits, self.at = Waits(), at

    @property
    def lines(self) -> list[str]:
        on_the_host = ("/datamodules/clips.py", "/datamodules/loader.py", "/latent_files.py", "/combined_loader.py")
        return [line for line in self.waits.lines if not any(file in line for file in on_the_host)]

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.at:
            self.waits.__enter__()
        elif trainer.global_step == self.at + 1:
            self.waits.__exit__(None, None, None)
