"""What `vidtwin test` leaves on disk: a row for the model and one for each reference, measured on the same clips."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

import vidtwin
from vidtwin import panels, plugins
from vidtwin.autoencoder import Reconstruction, VideoAutoencoder
from vidtwin.benchmark import protocol, table
from vidtwin.errors import UserError
from vidtwin.files import replacing, write_text
from vidtwin.metrics.latents import LatentStatistics
from vidtwin.posteriors import Encoding, Quantized
from vidtwin.task import AutoencoderTask
from vidtwin.video import write_video

SCHEMA_VERSION = 1
LAST, AVERAGE = "of the last step", "running average"


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
        self.protocol = {**protocol.VIDTWIN, "precision": str(trainer.precision), "data": described}
        self.hash = protocol.protocol_hash(self.protocol)
        if trainer.is_global_zero:
            self._check_row(pl_module)
            protocol.write(self.protocol, self.folder)
        self.fps = described.get("fps") or 25.0
        self.references: dict[str, VideoAutoencoder] | None = None
        self.clips: dict[str, list[dict[str, Any]]] = {}
        self.sizes: dict[str, dict[str, Any]] = {}
        self.codes = LatentStatistics()
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
        if self.references is None:
            # Built from the first clip's size; every other class path in the project comes from a config.
            size = {"num_frames": clip.shape[2], "resolution": clip.shape[3]}
            self.references = {
                short: plugins.load(short, "vidtwin.autoencoders")(**size).eval().to(clip.device)
                for short in self.reference_names
            }
        for short, reference in self.references.items():
            self._measure(short, pl_module, reference, reference(clip), batch)
        wanted = self.num_panels - len(self.panel_paths) // 2
        if wanted > 0 and trainer.is_global_zero:
            with trainer.precision_plugin.forward_context():  # callbacks run outside of autocast
                views = panels.views(pl_module.autoencoder, clip, outputs)
            for shown in views[:wanted]:
                self._write_panel(shown)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: AutoencoderTask) -> None:  # type: ignore[override]
        self._gather(trainer)
        if not self.clips:
            raise UserError("Expected clips to test on, got none; check the test split of the data.")
        if trainer.is_global_zero:
            for name in self.clips:
                self._write_row(name, pl_module)
            self.table = table.write(self.folder)
        means = {metric: self._mean(self.name, metric) for metric in pl_module.metrics.names}
        pl_module.log_dict({f"test/{metric}": value for metric, value in means.items()})

    def _measure(
        self,
        name: str,
        task: AutoencoderTask,
        model: VideoAutoencoder,
        reconstruction: Reconstruction,
        batch: dict[str, Any],
    ) -> None:
        clip: Tensor = batch["clip"]
        values = task.metrics(reconstruction.clip, clip)
        for index in range(len(clip)):
            row = {"model": name, "name": batch["name"][index]}
            row |= {"start_frame": int(batch["start_frame"][index]), "num_frames": clip.shape[2]}
            row |= {metric: float(value[index]) for metric, value in values.items()}
            self.clips.setdefault(name, []).append(row)
        numbers = {latent: z[0].numel() for latent, z in reconstruction.latents.items()}
        size = {
            "model": model.spec(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "latents": numbers,
            "compression_rate": sum(numbers.values()) / clip[0].numel(),
            "bits_per_pixel": model.bits_per_pixel(clip.shape[1:]),
        }
        if self.sizes.setdefault(name, size) != size:
            raise RuntimeError(f"{name} gives latents of other sizes from clip to clip: {self.sizes[name]}, {size}.")

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
            torch.distributed.all_gather_object(gathered, (self.clips, self.sizes, self.codes))
            self.clips, self.sizes, self.codes = {}, {}, LatentStatistics()
            for clips, sizes, codes in gathered:
                self.sizes |= sizes
                self.codes.merge(codes)
                for name, rows in clips.items():
                    self.clips.setdefault(name, []).extend(rows)
        for rows in self.clips.values():
            rows.sort(key=lambda row: (row["name"], row["start_frame"]))

    def _mean(self, name: str, metric: str) -> float:
        return math.fsum(row[metric] for row in self.clips[name]) / len(self.clips[name])

    def _write_row(self, name: str, task: AutoencoderTask) -> None:
        rows = self.clips[name]
        metrics: dict[str, Any] = {}
        for metric in task.metrics.names:
            values = torch.tensor([row[metric] for row in rows], dtype=torch.float64)
            metrics[metric] = {"mean": self._mean(name, metric), "std": float(values.std(correction=0))}
        metrics |= dict.fromkeys(task.metrics.unavailable, "unavailable")
        reference = name != self.name
        results = {
            "schema_version": SCHEMA_VERSION,
            "name": name,
            "kind": "reference" if reference else "trained" if self.checkpoint else "untrained",
            "checkpoint": None if reference else self.checkpoint,
            "weights": LAST if reference else self._weights(task),
            **self.sizes[name],
            "codebooks": {} if reference else self._codebooks(),
            "metrics": metrics,
            "unavailable": task.metrics.unavailable,
            "num_clips": len(rows),
            "skipped": self.skipped,
            "protocol": self.protocol,
            "protocol_hash": self.hash,
            "device": str(task.device),
            "versions": {"vidtwin": vidtwin.__version__, "torch": torch.__version__},
        }
        folder = self.folder / "rows" / name
        columns = ["model", "name", "start_frame", "num_frames", *task.metrics.all_names]
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow([*columns, "protocol_hash"])
        writer.writerows([*(row.get(column) for column in columns), self.hash] for row in rows)
        write_text(folder / "clips.csv", buffer.getvalue())
        write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")

    def _codebooks(self) -> dict[str, dict[str, float]]:
        """By quantized latent: how much of its codebook the test clips use."""
        return {
            name: {
                "size": int(found["codebook_size"]),
                "dead_codes": int(found["dead_codes"]),
                "perplexity": float(found["perplexity"]),
            }
            for name, found in self.codes.compute().items()
        }

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
        return AVERAGE if task.use_ema and (self.checkpoint or task.average is not None) else LAST
