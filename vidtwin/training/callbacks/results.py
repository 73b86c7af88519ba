"""What `vidtwin test` leaves on disk: a row for the model and one for each reference, measured on the same clips."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from vidtwin import hub, plugins
from vidtwin.autoencoder import Reconstruction, VideoAutoencoder
from vidtwin.benchmark import protocol, rows, table
from vidtwin.benchmark.measure import AVERAGE, LAST, Subject, describe, fingerprint
from vidtwin.clips import views
from vidtwin.errors import UserError
from vidtwin.files import replacing
from vidtwin.metrics.frames import mse
from vidtwin.metrics.latents import LatentStatistics
from vidtwin.posteriors import Encoding, Quantized
from vidtwin.training.task import AutoencoderTask
from vidtwin.video import panels, write_video

PROTOCOL = protocol.ProtocolSettings(preset="vidtwin", posterior="mode")


class ResultsWriter(Callback):
    """Measure each test clip and write `rows/<name>/{results.json,clips.csv}`, `table.csv` and `table.md`.

    Args:
        results_dir: Folder of the results; rows of other models stay.
        name: Name of the model's row.
        checkpoint: The file that the weights came from; None marks the row as untrained.
        references: Short names of autoencoders without weights that are measured on the same clips.
        num_panels: Clips of which a picture and a video are written: input, reconstruction, each latent alone.
    """

    def __init__(
        self,
        results_dir: str | Path,
        name: str,
        checkpoint: str | None,
        references: list[str],
        num_panels: int = 2,
    ) -> None:
        self.folder = Path(results_dir)
        self.name = name
        self.checkpoint = checkpoint
        self.reference_names = references
        self.num_panels = num_panels
        self.panel_paths: list[Path] = []
        self.table = ""

    def on_test_start(self, trainer: Trainer, pl_module: AutoencoderTask) -> None:  # type: ignore[override]
        data: Any = getattr(trainer, "datamodule", None)
        if hasattr(data, "num_frames") and hasattr(data, "resolution"):  # clips that the model won't take
            shape = (1, 3, data.num_frames, data.resolution, data.resolution)
            pl_module.autoencoder.check_clip(torch.empty(shape, device="meta"))
        described = data.protocol() if hasattr(data, "protocol") else {}
        self.skipped = data.skipped["test"] if hasattr(data, "skipped") else {}  # grows while clips are read
        known = dict(self.skipped)  # from the headers; what decoding finds stands in the rows
        self.protocol = PROTOCOL.resolve(described, str(trainer.precision), skipped=known)
        self.hash = protocol.protocol_hash(self.protocol)
        if trainer.is_global_zero:
            self._check_row(pl_module)
            protocol.write(self.protocol, self.folder)
        self.fps = described.get("fps") or 25.0
        self.references: dict[str, VideoAutoencoder] | None = None
        self.clips: dict[str, list[dict[str, Any]]] = {}
        self.latents: dict[str, dict[str, Any]] = {}
        found = trainer.ckpt_path if self.checkpoint else None  # which word it was asked for by, such as best
        self.fingerprint = fingerprint(found) if found and (Path(found).is_file() or hub.is_pretrained(found)) else None
        self.codes = LatentStatistics()
        self.shape: tuple[int, ...] = ()
        self.panel_paths = []

    def on_test_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: AutoencoderTask,
        outputs: Reconstruction,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        clip = batch["clip"]
        self._measure(self.name, pl_module, pl_module.autoencoder, outputs, batch)
        if outputs.encoding is not None:
            quantized = {name: each for name, each in outputs.encoding.items() if isinstance(each, Quantized)}
            self.codes.update(Encoding(quantized))
        for short, reference in self._references(tuple(clip.shape[1:]), clip.device).items():
            self._measure(short, pl_module, reference, reference(clip), batch)
        wanted = self.num_panels - len(self.panel_paths) // 2
        if wanted > 0 and trainer.is_global_zero:
            with trainer.precision_plugin.forward_context():  # callbacks run outside of autocast
                shown_views = views(pl_module.autoencoder, clip, outputs)
            for shown in shown_views[:wanted]:
                self._write_panel(shown)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: AutoencoderTask) -> None:  # type: ignore[override]
        self._gather(trainer)
        if not self.clips:
            raise UserError("Expected clips to test on, got none; check the test split of the data.")
        if trainer.is_global_zero:
            for name in self.clips:
                self._write_row(name, pl_module)
            self.table = table.write(self.folder)
        means = rows.means(self.clips[self.name], self.protocol)
        pl_module.log_dict({f"test/{metric}": found["mean"] for metric, found in means.items()})

    def _measure(
        self,
        name: str,
        task: AutoencoderTask,
        model: VideoAutoencoder,
        reconstruction: Reconstruction,
        batch: dict[str, Any],
    ) -> None:
        clip: Tensor = batch["clip"]
        values, errors = task.metrics(reconstruction.clip, clip), mse(reconstruction.clip, clip)
        for index in range(len(clip)):
            row = {"model": name, "name": batch["name"][index]}
            row |= {"start_frame": int(batch["start_frame"][index]), "num_frames": clip.shape[2]}
            row |= {"mse": float(errors[index])} | {metric: float(value[index]) for metric, value in values.items()}
            self.clips.setdefault(name, []).append(row)
        subject = self._subject(name, task, model)
        latents = subject.latents(reconstruction.latents, tuple(clip.shape[1:]))
        if self.latents.setdefault(name, latents) != latents:
            raise RuntimeError(
                f"{name} gives latents of other sizes from clip to clip: {self.latents[name]}, {latents}."
            )
        self.shape = tuple(clip.shape[1:])

    def _references(self, shape: tuple[int, ...], device: torch.device) -> dict[str, VideoAutoencoder]:
        """Built from the first clip's size; every other class path in the project comes from a config."""
        if self.references is None:
            size = {"num_frames": shape[1], "resolution": shape[2]}
            self.references = {
                short: plugins.load(short, "vidtwin.autoencoders")(**size).eval().to(device)
                for short in self.reference_names
            }
        return self.references

    def _subject(self, name: str, task: AutoencoderTask, model: VideoAutoencoder) -> Subject:
        if name != self.name:
            return Subject(name, "reference", model)
        kind: Literal["trained", "untrained"] = "trained" if self.checkpoint else "untrained"
        return Subject(name, kind, model, self.checkpoint, self.fingerprint, self._weights(task))

    def _check_row(self, task: AutoencoderTask) -> None:
        """A row may be measured again, but not be replaced by that of another model or checkpoint."""
        path = self.folder / "rows" / self.name / "results.json"
        if not path.exists():
            return
        found = {"weights": LAST} | json.loads(path.read_text())
        ours_by_key = {"checkpoint": self.checkpoint, "weights": self._weights(task)}
        ours_by_key["model"] = json.loads(json.dumps(task.autoencoder.spec()))
        for key, ours in ours_by_key.items():
            if found.get(key) != ours:
                raise UserError(
                    f"Expected the row {self.name} in {self.folder} to be of this {key}, got one of {found.get(key)}; "
                    "give another --name or another --results_dir."
                )

    def _gather(self, trainer: Trainer) -> None:
        """Every rank gets the clips of all, in the order of their names, so that means do not depend on the ranks."""
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, (self.clips, self.latents, self.codes, self.shape))
            self.clips, self.latents, self.codes = {}, {}, LatentStatistics()
            for clips, latents, codes, shape in gathered:
                self.shape = self.shape or shape
                self.latents |= latents
                self.codes.merge(codes)
                for name, rows in clips.items():
                    self.clips.setdefault(name, []).extend(rows)
        for rows in self.clips.values():
            rows.sort(key=lambda row: (row["name"], row["start_frame"]))

    def _write_row(self, name: str, task: AutoencoderTask) -> None:
        reference = name != self.name
        model = self._references(self.shape, task.device)[name] if reference else task.autoencoder
        codes = LatentStatistics() if reference else self.codes
        clips = self.clips[name]
        metrics: dict[str, Any] = rows.means(clips, self.protocol)
        row = describe(self._subject(name, task, model), self.latents[name], self.shape, codes, task.device)
        row |= {
            "metrics": metrics | dict.fromkeys(task.metrics.unavailable, "unavailable"),
            "unavailable": task.metrics.unavailable,
            "num_clips": len(clips),
            "failed_clips": [],
            "skipped": self.skipped,
            "cost": None,
            "downstream": None,
            "protocol": self.protocol,
            "protocol_hash": self.hash,
        }
        rows.write_row(self.folder, row, clips)

    def _write_panel(self, shown: dict[str, panels.Frames]) -> None:
        folder = self.folder / "rows" / self.name
        stem = f"clip{len(self.panel_paths) // 2}"
        video, still = folder / f"{stem}.mp4", folder / f"{stem}.png"
        write_video(video, panels.side_by_side(shown), self.fps)
        with replacing(still) as temporary:
            temporary.write_bytes(panels.png(panels.filmstrip(shown)))
        self.panel_paths += [video, still]

    def _weights(self, task: AutoencoderTask) -> str:
        # Where they come from a file, the task has looked there for the average, or has refused.
        return AVERAGE if task.ema.evaluate and (self.checkpoint or task.ema.average is not None) else LAST
