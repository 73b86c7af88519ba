"""Handle SIGTERM, which a scheduler sends before it takes the machine away: save, and exit with a code to requeue."""

import signal
import threading
from types import FrameType
from typing import Any, cast

from lightning.pytorch import Callback, Trainer

from vidtwin.errors import Preempted
from vidtwin.training.base import TrainingTask
from vidtwin.training.callbacks.checkpoint import LatestCheckpoint


class Preemption(Callback):
    """After SIGTERM on any rank finish the step on all of them, save, and raise `Preempted`.

    During the sanity check there is nothing to save: `Preempted` is raised at its end. During a later validation the
    rest of it and one more step come first.

    The handler only sets a flag. Lightning's handler communicates with the other ranks, possibly in the middle of
    another exchange, and saves nothing.
    """

    def on_sanity_check_start(self, trainer: Trainer, pl_module: TrainingTask) -> None:  # type: ignore[override]
        self._install(trainer, pl_module)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: TrainingTask) -> None:  # type: ignore[override]
        if trainer.strategy.reduce_boolean_decision(pl_module.stop_requested, all=False):
            raise Preempted

    def on_train_start(self, trainer: Trainer, pl_module: TrainingTask) -> None:  # type: ignore[override]
        self._install(trainer, pl_module)

    def _install(self, trainer: Trainer, task: TrainingTask) -> None:
        # Installed after Lightning's handlers; Lightning restores the original ones at the end.
        if threading.current_thread() is threading.main_thread():

            def request(number: int, frame: FrameType | None) -> None:
                task.stop_requested = True

            signal.signal(signal.SIGTERM, request)
        # A signal between Lightning's handler and this one: its flag becomes ours.
        signals = cast(Any, trainer)._signal_connector
        task.stop_requested |= signals.received_sigterm
        signals.received_sigterm = False
        # Lightning's exchange of its own flag would make the host wait for the device in each batch.
        cast(Any, trainer.fit_loop.epoch_loop)._broadcast_sigterm_tensor = lambda: None

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: TrainingTask, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Several ranks have agreed in the step, beside whether its values are finite.
        if not (pl_module.stop_requested if trainer.world_size == 1 else pl_module.stopping):
            return
        if trainer.global_step == 0:
            raise Preempted  # all batches so far were skipped: nothing to save
        saved = None
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, LatestCheckpoint):
                callback.save(trainer)
                saved = callback.dirpath
        raise Preempted(trainer.global_step, saved)
