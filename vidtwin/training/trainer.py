"""Extend Lightning's Trainer by the subcommands of `vidtwin`: `fit`, `validate`, `predict` and `replay`."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelSummary
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import save_file

from vidtwin import console
from vidtwin.data import ClipSource
from vidtwin.errors import UserError
from vidtwin.files import inside, replacing
from vidtwin.posteriors import Quantized
from vidtwin.precision import tensor_float_32
from vidtwin.storage import checkpoints
from vidtwin.training.base import TrainingTask, describe_missing_gradients
from vidtwin.training.callbacks.checkpoint import BestCheckpoint, LatestCheckpoint
from vidtwin.training.callbacks.guard import StepGuard
from vidtwin.training.callbacks.preemption import Preemption
from vidtwin.training.callbacks.progress import ProgressBar
from vidtwin.training.callbacks.skipped import SkippedVideos
from vidtwin.training.callbacks.summary import Summary
from vidtwin.training.checks import check_trainer
from vidtwin.training.compilation import Compilation
from vidtwin.training.replay import read as read_dump
from vidtwin.training.replay import replay as run_again
from vidtwin.training.sharding import FSDP2Strategy
from vidtwin.training.task import AutoencoderTask
from vidtwin.video import write_video
from vidtwin.video.convert import to_uint8


class VideoTrainer(Trainer):
    """Train, validate and predict with autoencoders: Lightning's Trainer with defaults for a GAN.

    Checkpoints are written atomically and read without running code. Steps that are not finite are logged, dumped and
    undone (`StepGuard`); SIGTERM saves first (`Preemption`). DDP searches for parameters without a gradient if the task
    says that there may be some (`TrainingTask.may_skip_parameters`), or by the strategy
    `ddp_find_unused_parameters_true`.

    Args:
        *args: As of Lightning's Trainer.
        compilation: What torch.compile compiles, in validation and prediction too; None compiles nothing.
        tensor_float_32: Round the factors of float32 products and convolutions on a GPU to 10 bits of mantissa in
            `fit`, several times faster than with all 24; no effect on those in bfloat16, nor on metrics.
        **kwargs: As of Lightning's Trainer.
    """

    def __init__(
        self, *args: Any, compilation: Compilation | None = None, tensor_float_32: bool = False, **kwargs: Any
    ) -> None:
        self.compilation, self.tensor_float_32 = compilation, tensor_float_32
        plugins = kwargs.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, list) else [plugins]
        kwargs["plugins"] = [*plugins, checkpoints.AtomicCheckpointIO()]
        strategy = kwargs.get("strategy", "auto")
        if strategy in ("fsdp2", "fsdp2_bf16") or isinstance(strategy, FSDP2Strategy):
            kwargs["inference_mode"] = False  # weights gathered in inference mode can't be trained
        callbacks = kwargs.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        if kwargs.get("enable_checkpointing") is False and any(isinstance(each, Checkpoint) for each in callbacks):
            raise UserError(
                "Expected trainer.enable_checkpointing true, got false: a training goes back to its checkpoints; "
                "--latest_checkpoint.every_n_steps N and --latest_checkpoint.keep 1 save fewer."
            )
        wanted: list[type[Callback]] = [SkippedVideos, StepGuard, Preemption]
        if kwargs.get("enable_progress_bar") is not False:
            wanted.append(ProgressBar)
        if kwargs.get("enable_model_summary") is not False and not any(isinstance(c, ModelSummary) for c in callbacks):
            wanted.append(Summary)
            kwargs["enable_model_summary"] = False  # Lightning's own
        callbacks += [cls() for cls in wanted if not any(isinstance(callback, cls) for callback in callbacks)]
        kwargs["callbacks"] = callbacks
        super().__init__(*args, **kwargs)
        self._search_is_chosen = True
        if isinstance(self.strategy, DDPStrategy):
            self._search_is_chosen = "find_unused_parameters" in self.strategy._ddp_kwargs
            self.strategy._ddp_kwargs.setdefault("gradient_as_bucket_view", True)  # saves a copy of the gradients

    @property
    def checkpoint_callback(self) -> Checkpoint | None:
        """Return the callback of the best checkpoint, so that `ckpt_path="best"` works."""
        return next(
            (c for c in self.checkpoint_callbacks if isinstance(c, BestCheckpoint)), super().checkpoint_callback
        )

    def fit(  # type: ignore[override]
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        *,
        resume: str | None = None,
        init_from: str | None = None,
    ) -> None:
        """Train.

        Args:
            model: The task.
            train_dataloaders: Loaders of training clips, instead of `datamodule`.
            val_dataloaders: Loaders of validation clips, likewise.
            datamodule: The data.
            ckpt_path: Checkpoint to resume: weights, optimizers, schedules, step, place in the data.
            resume: "auto": resume the newest intact checkpoint of the run that the logger names, or start a new run if
                there is none. A folder: resume the newest one in it.
            init_from: Weights to start a new training from, as far as they fit (`load_part` of `storage.checkpoints`
                and `storage.diffusion`); the log lists what is kept, interpolated and fresh. The discriminator is new.
                Ignored if a run is resumed.
        """
        task = model
        if not isinstance(task, TrainingTask):
            raise UserError(f"Expected a TrainingTask, got {type(task).__name__}.")
        check_trainer(self)
        if ckpt_path and resume:
            raise UserError(f"Expected --ckpt_path or --resume, got both ({ckpt_path} and {resume}).")
        if resume:
            ckpt_path = self._find_newest(resume)
        if init_from and not ckpt_path:
            task.start_from(init_from)
        self._choose_search(task)
        try:
            with tensor_float_32() if self.tensor_float_32 else nullcontext():
                super().fit(task, train_dataloaders, val_dataloaders, datamodule, ckpt_path)
        except RuntimeError as error:
            if "parameters that were not used in producing the loss" not in str(error):  # Lightning's words for DDP's
                raise
            raise UserError(describe_missing_gradients("some parameters of the last part of a batch")) from error
        except ValueError as error:
            interval, batches = self.val_check_interval, self.fit_loop.max_batches
            if (
                isinstance(error, UserError)
                or not isinstance(interval, int)
                or interval <= batches
                or self.check_val_every_n_epoch is None
                or not self.limit_val_batches
            ):
                raise
            raise UserError(
                f"Expected trainer.val_check_interval of at most the {batches} batches of an epoch, got {interval}; "
                "--trainer.check_val_every_n_epoch null counts batches over all epochs."
            ) from error

    def _choose_search(self, task: TrainingTask) -> None:
        """Have DDP search for parameters without a gradient if the task may have some, unless the user has chosen."""
        if not self._search_is_chosen:
            assert isinstance(self.strategy, DDPStrategy)
            self.strategy._ddp_kwargs["find_unused_parameters"] = task.may_skip_parameters

    def _find_newest(self, resume: str) -> Path | None:
        """Find the checkpoint to resume; None if there is none for "auto"."""
        folder = Path(resume)
        if folder.is_file():
            raise UserError(
                f"Expected the folder of a run or auto for --resume, got a file; give it as --ckpt_path {resume}."
            )
        if resume == "auto":
            saved = next((c for c in self.checkpoint_callbacks if isinstance(c, LatestCheckpoint)), None)
            if saved is None:
                raise UserError("Expected a LatestCheckpoint among the callbacks for resume='auto', got none.")
            folder = saved.folder(self)
        log = partial(console.log, rank_zero=True)
        found = checkpoints.newest(folder, log)
        if found is None and (folder / "checkpoints").is_dir():
            found = checkpoints.newest(folder / "checkpoints", log)
        if found is None and resume != "auto":
            raise UserError(f"Expected intact checkpoints in {folder}, got none.")
        log(f"resuming from {found}" if found else f"starting a new run: no checkpoint in {folder}")
        return found

    def predict(  # type: ignore[override]
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        *,
        out: str = "predictions",
    ) -> None:
        """Write the latents (.safetensors) and the reconstruction (.mp4) of each test clip.

        For a model with codebooks the integer codes of each latent are written too, as `<latent>.codes`, from which
        `dequantize` restores it.

        Args:
            model: The task.
            dataloaders: Loaders of clips, instead of `datamodule`.
            datamodule: The data.
            ckpt_path: Weights to use.
            out: Folder for `<name>.safetensors` and `<name>.mp4`. The name is the video's with its suffix, followed by
                the clip's first frame if `data.eval_clips` is `all`.
        """
        writer = _PredictionWriter(Path(out))
        callbacks: list[Callback] = cast(Any, self).callbacks
        callbacks.append(writer)
        try:
            super().predict(self._task(model), dataloaders, datamodule, return_predictions=False, ckpt_path=ckpt_path)
        finally:
            callbacks.remove(writer)
        console.write(f"latents and reconstructions -> {out}", rank_zero=True)

    def replay(self, model: LightningModule, dump: str) -> list[str]:
        """Rerun a step that training skipped, and report where its values stop being finite.

        Args:
            model: The task; on the command line it is built from the dump.
            dump: File of a skipped step, in a run's folder `nonfinite`.

        Returns:
            The lines of the report.
        """
        task = model or self.lightning_module
        if not isinstance(task, TrainingTask):
            raise UserError(f"Expected a TrainingTask, got {type(task).__name__}.")
        content = read_dump(dump)
        task.prepare_replay(content)
        task.to(self.strategy.root_device)
        with self.precision_plugin.forward_context():
            lines = run_again(task, content)
        for line in lines:
            console.write(line, rank_zero=True)
        return lines

    def _task(self, model: LightningModule | None) -> AutoencoderTask:
        task = model or self.lightning_module
        if not isinstance(task, AutoencoderTask):
            raise UserError(f"Expected an AutoencoderTask, got {type(task).__name__}.")
        return task


class _PredictionWriter(Callback):
    """Write latents and reconstruction of each clip under its name."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        data: Any = getattr(trainer, "datamodule", None)  # missing if loaders were passed
        known = isinstance(data, ClipSource)
        fps, several = (data.eval_fps if known else None) or 25.0, known and data.eval_clips == "all"
        for index, (name, start) in enumerate(zip(batch["name"], batch["start_frame"].tolist(), strict=True)):
            # With the suffix, so that neither two videos nor a video and its own reconstruction share a file. Names
            # may be absolute or point upwards, but must not lead out of the folder.
            below = Path(*(part for part in Path(name).parts if part not in ("..", Path(name).anchor)))
            if several:
                below = below.with_name(f"{below.name}.{start:06d}")
            with replacing(inside(self.out, f"{below}.safetensors")) as temporary:
                tensors = {key: z[index].contiguous().cpu() for key, z in outputs.latents.items()}
                for key, posterior in (outputs.encoding or {}).items():
                    if isinstance(posterior, Quantized):
                        tensors[f"{key}.codes"] = posterior.codes[index].to(torch.int32).cpu()
                save_file(tensors, temporary)
            write_video(inside(self.out, f"{below}.mp4"), to_uint8(outputs.clip[index]), fps)
