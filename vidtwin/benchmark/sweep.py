"""Measure autoencoders on the same clips under one protocol: `vidtwin test` of one, or of a list of them.

    test clips ── chunks of eval_batch_size ── every model: encode, decode, measure ──> rows/<name>/parts/<chunk>.json
    all parts of a model ──> rows/<name>/clips.csv, results.json
    all rows ──> comparison.json, players, table, plots, report

A chunk's numbers are written when it is measured, so that an interrupted sweep resumes. Processes share the chunks; the
clips of a chunk, and with them all numbers, do not depend on the number of processes.
"""

import json
import math
from functools import cached_property, partial
from typing import Any, Literal

from lightning.fabric import Fabric

from vidtwin import autoencoder, hub, plugins
from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.benchmark import analysis, analysis_plots, curve_plots, meta, render, report, rows, statistics
from vidtwin.benchmark import players as player_files
from vidtwin.benchmark import plots as plot_files
from vidtwin.benchmark.identity import is_codec
from vidtwin.benchmark.loaded_model import AVERAGE, LAST, LoadedModel, fingerprint
from vidtwin.benchmark.options import FVD, Entry, ModelConfig, SweepOptions
from vidtwin.benchmark.plan import Job, Plan, format_error
from vidtwin.benchmark.protocol import protocol_hash
from vidtwin.benchmark.protocol import write as write_protocol
from vidtwin.benchmark.runner import Runner
from vidtwin.console import log, write
from vidtwin.distributed import launch
from vidtwin.errors import UserError, few
from vidtwin.metrics.cvvdp import describe_display
from vidtwin.storage import checkpoints
from vidtwin.storage.resumable import lock

_GB = 12e-9  # of a pixel's three floats

__all__ = ["FVD", "Entry", "ModelConfig", "Sweep"]


class Sweep(SweepOptions):
    """Measure every autoencoder on the same test clips and write rows, table, plots, players and report.

    `SweepOptions` lists the arguments.
    """

    def run(self) -> int:
        """Measure the missing chunks and write all outputs → 0, or 1 if a model could not be measured."""
        if self.meta:
            return self._count()
        if self.analysis and self.varies:
            raise UserError(
                "Expected clips of one size for analysis, got a data.num_frames or data.resolution of null; give "
                "numbers, or --analysis false."
            )
        fabric = launch(self.accelerator, self.devices, self.num_nodes, self.precision)
        self.source.dataset("test")  # before the folder is made: refused data leave none
        if self.strict:
            self._check_models()
        try:
            with lock(self.folder, "sweep", fabric):
                return self._run(fabric)
        except KeyboardInterrupt:
            log(f"finished chunks are in {self.folder}; run the same command again to continue", rank_zero=True)
            raise

    def _count(self) -> int:
        """Count the models on the meta device at the size of the clips, and write meta.json and meta.md."""
        if self.varies:
            raise UserError(
                "Expected clips of one size for --meta, got a data.num_frames or data.resolution of null; give "
                "--data.num_frames 16 --data.resolution 224."
            )
        models, codecs = [], []
        for entry in self.autoencoders:
            try:
                config = self._read_model(entry, self._find_checkpoint(entry))
                if is_codec(config.spec):
                    codecs.append(entry.name)
                    continue
                log(f"counting {entry.name}", rank_zero=True)
                models.append(meta.count(entry, config, self.shape))
            except Exception as error:  # of the model's own
                models.append({"name": entry.name, "error": format_error(error)})
        if codecs:
            log(f"left out {few(codecs)}: codecs have no weights, and their bytes are known only of clips")
        write(f"\n{meta.write(self.folder, self.shape, models)}")
        write(str(self.folder / "meta.md"))
        return int(any(model["error"] for model in models))

    def _run(self, fabric: Fabric) -> int:
        plan = self._make_plan(fabric)
        jobs = [self._make_job(entry) for entry in self.autoencoders]
        jobs += [self._make_reference(name, plan.shape) for name in self.reference_names]
        lines = [f"{len(plan.keys)} clips, protocol {plan.protocol['name']} ({plan.digest})"]
        if departs := plan.protocol["departs"]:
            lines.append(f"protocol {self.protocol.preset} departs: {'; '.join(departs)}")
        lines += [f"{job.name} failed: {job.error}" for job in jobs if job.error]
        for line in lines:
            log(line, rank_zero=True)
        if plan.varies:
            frames, height, width = largest = max(self.shapes, key=math.prod)
            log(
                f"the largest clip has {frames} frames of {width} x {height} px, {_GB * math.prod(largest):.1f} GB as "
                "floats, of which its measurement holds several copies; a number for data.num_frames or "
                "data.resolution takes less",
                rank_zero=True,
            )
        self._check_other_rows({job.name for job in jobs}, plan.digest)
        runner = Runner(self, fabric, plan, jobs)
        runner.run()
        if self.analysis:
            analysis.analyze(runner)
        if fabric.is_global_zero:
            self.write_outputs(runner)
        fabric.barrier()
        return int(fabric.broadcast(bool(runner.failed)))

    def write_outputs(self, runner: Runner) -> None:
        """Write comparison, players, pictures, table, plots and report from the rows."""
        for path in (self.folder / "comparison.json", self.folder / "players" / "players.json"):
            if path.exists():
                try:
                    rows.read_json(path)
                except UserError:
                    log(f"{path} is cut off or damaged, and is made again")
                    path.unlink()
        results = rows.read(self.folder)
        features = runner.measurer.features
        found = results.comparison | {"rows": features.compare(results) if features else {}}
        results.comparison = rows.compare(results, found)
        rows.write_comparison(self.folder, results.comparison | {"statistics": statistics.of(results)})
        if (self.players or self.random_players) and results.comparison["num_clips"]:
            player_files.write_players(results, runner)
        paths = player_files.write_clips(runner) if self.pictures else []
        write(f"\n{render.write(self.folder)}")
        drawn = [
            *plot_files.write(self.folder),
            *curve_plots.write(self.folder),
            *analysis_plots.write(self.folder),
        ]
        for path in [*paths, self.folder / "table.md", *drawn, report.write(self.folder)]:
            if path.suffix != ".svg":
                write(str(path))

    def _check_models(self) -> None:
        for job in map(self._make_job, self.autoencoders):
            if job.error:
                raise UserError(job.error)
            try:
                job.build().check(*self.shape[1:])
            except UserError:
                raise
            except Exception as error:
                raise UserError(f"{job.name} can't be built: {format_error(error)}") from error

    def _make_plan(self, fabric: Fabric) -> Plan:
        dataset = self.source.dataset("test")
        keys = [dataset.identity(index) for index in range(len(dataset))]
        if not keys:
            raise UserError(f"Expected test clips of {type(self.source).__name__}, got none.")
        resolved: dict[str, Any] = {}
        refused = ""
        if fabric.is_global_zero:  # one process reads the content of the videos
            try:
                resolved = self.protocol.resolve(
                    self.source.protocol(),
                    self.precision,
                    self.i3d.sha256.lower() if self.i3d.sha256 else None,
                    self.dataset,
                    self.source.skipped["test"],
                    describe_display(self.cvvdp, self.source.eval_fps or 25.0) if self.cvvdp else None,
                )
                write_protocol(resolved, self.folder, self.source.digests())
            except UserError as error:
                refused = str(error)
        resolved, refused = fabric.broadcast((resolved, refused))
        if refused:  # all processes end, and none waits for another
            raise UserError(refused)
        size = self.source.eval_batch_size
        chunks = [list(range(len(keys)))[start : start + size] for start in range(0, len(keys), size)]
        # Videos that reading finds unusable later stand in the rows: the protocol is known before.
        digest = protocol_hash(resolved)
        smallest = tuple(map(min, zip(*self.shapes, strict=True)))
        return Plan(chunks, keys, self.shape, resolved, digest, smallest, self.varies)

    @property
    def varies(self) -> bool:
        """True if clips differ in length or size."""
        return self.source.num_frames is None or self.source.resolution is None

    @cached_property
    def shapes(self) -> list[tuple[int, int, int]]:
        """Frames, height and width of the clips; one of them if all have the same."""
        if self.varies:
            dataset = self.source.dataset("test")
            found = [dataset.shape(index) for index in range(len(dataset))]
            if found := [shape for shape in found if all(shape)]:
                return found
        side = self.source.resolution or 1
        height, width = (side, side) if isinstance(side, int) else side
        return [(self.source.num_frames or 1, height, width)]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the clip with the median number of pixels."""
        ordered = sorted(self.shapes, key=lambda shape: (math.prod(shape), shape))
        return (3, *ordered[(len(ordered) - 1) // 2])

    def _find_checkpoint(self, entry: Entry) -> str | None:
        return hub.join_path(self.checkpoints, entry.checkpoint) if entry.checkpoint else None

    def _read_model(self, entry: Entry, checkpoint: str | None) -> ModelConfig:
        """Read the model of an entry's configs, or else of its checkpoint, without building it."""
        paths = [entry.config] if isinstance(entry.config, str) else entry.config or []
        if paths and entry.model:
            raise UserError(f"Expected a config or a model for {entry.name}, got both; remove one.")
        if paths:
            if self.read_config is None:
                raise UserError(f"Expected read_config for the configs of {entry.name}, got none.")
            return self.read_config(paths, entry.arguments or {})
        if entry.model:
            path = plugins.resolve(entry.model, "vidtwin.autoencoders")
            spec: dict[str, Any] = {"class_path": path, "init_args": entry.arguments or {}}
            return ModelConfig(spec, partial(autoencoder.build, spec))
        if entry.arguments:
            raise UserError(f"Expected a config for the arguments of {entry.name}, got none; give config too.")
        if checkpoint is None:
            raise UserError(f"Expected a config or a checkpoint for {entry.name}, got neither.")
        spec = checkpoints.model_spec(checkpoints.read(checkpoint, lazily=True), checkpoint)
        return ModelConfig(spec, partial(checkpoints.build, spec))

    def _make_job(self, entry: Entry) -> Job:
        """Find a row's identity without building its model; a mistake in the entry becomes the row's error."""
        base = {"windows": entry.windows}
        checkpoint = self._find_checkpoint(entry)
        try:
            config = self._read_model(entry, checkpoint)
            mark = fingerprint(checkpoint) if checkpoint else None
        except UserError as error:
            return Job(entry.name, base, _refuse, str(error), seed_of=entry.seed_of)

        def build() -> LoadedModel:
            model = config.build()
            weights, differs = LAST, []
            if checkpoint:
                checkpoints.check(checkpoint)
                held = checkpoints.read(checkpoint, lazily=True)
                if (held.get("teacher") or {}).get("only_decoder"):
                    raise UserError(
                        f"Expected weights of an encoder and a decoder, got a decoder alone in {checkpoint} "
                        "(model.teacher.only_decoder); `vidtwin decode` takes it for its teacher's latents."
                    )
                average = self.protocol.weights == "average" or (self.protocol.weights == "auto" and "ema" in held)
                checkpoints.load_weights(model, checkpoint, average, held)
                weights = AVERAGE if average else LAST
                stored = held.get("model_spec") or model.spec()
                differs = checkpoints.differences(json.loads(json.dumps(model.spec())), stored)
            window = model.temporal.usual_length if entry.windows else None
            kind: Literal["trained", "untrained", "reference"] = "trained" if checkpoint else "untrained"
            if model.coding:  # there is nothing to train
                kind = "reference"
            claimed = entry.claimed_rate
            return LoadedModel(
                entry.name, kind, model, checkpoint, mark, weights, claimed, window, differs, pads=self.varies
            )

        return Job(
            entry.name,
            base | {"model": config.spec, "fingerprint": mark},
            build,
            claimed_rate=entry.claimed_rate,
            seed_of=entry.seed_of,
        )

    def _make_reference(self, name: str, shape: tuple[int, int, int, int]) -> Job:
        def make(num_frames: int, height: int, width: int) -> VideoAutoencoder:
            resolution = height if height == width else [height, width]
            model: VideoAutoencoder = plugins.load(name, "vidtwin.references")(
                num_frames=num_frames, resolution=resolution
            )
            return model

        def build() -> LoadedModel:
            return LoadedModel(name, "reference", make(*shape[1:]), rebuild=make if self.varies else None)

        return Job(name, {"name": name, "reference": plugins.resolve(name, "vidtwin.references")}, build)

    def _check_other_rows(self, own: set[str], digest: str) -> None:
        """Log the rows of models that the config does not list; refuse unreadable ones before anything is measured."""
        others = [path for path in sorted(self.folder.glob("rows/*/results.json")) if path.parent.name not in own]
        for path in others:
            row = rows.read_row(path)
            if row["protocol_hash"] != digest:
                raise UserError(
                    f"Expected rows of protocol {digest} in {self.folder}, got others: {row['name']}; they can't be "
                    "compared. Move them to a folder of their own."
                )
            if row["kind"] != "failed":
                rows.read_clips(path.parent, row)
        if others:
            names = ", ".join(path.parent.name for path in others)
            log(
                f"also compared, since they are in {self.folder}: {names}, which the config does not list",
                rank_zero=True,
            )


def _refuse() -> LoadedModel:
    raise AssertionError("a job with an error is not built")
