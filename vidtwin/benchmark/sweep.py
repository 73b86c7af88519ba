"""Measure autoencoders on the same clips under one protocol: `vidtwin test` of one, or of a list of them.

    test clips ── chunks of eval_batch_size ── every model: encode, decode, measure ──> rows/<name>/parts/<chunk>.json
    all parts of a model ──> rows/<name>/clips.csv, results.json
    all rows ──> comparison.json, players, table, plots, report

A chunk's numbers are written when it is measured, so that a sweep goes on where it was ended. Which clips a chunk holds
does not depend on the number of processes, which share the chunks: their numbers are those of one process.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning import LightningDataModule
from lightning.fabric import Fabric
from tqdm import tqdm

from vidtwin import hub, plugins
from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.benchmark import plots as plot_files
from vidtwin.benchmark import protocol, report, rows, table
from vidtwin.benchmark.measure import AVERAGE, LAST, Subject, fingerprint
from vidtwin.benchmark.runner import Job, Plan, Runner, one_line
from vidtwin.data import ClipSource
from vidtwin.distributed import Precision, launch
from vidtwin.errors import UserError, suggestion
from vidtwin.storage import checkpoints
from vidtwin.storage.resumable import lock


@dataclass
class ModelConfig:
    """An autoencoder as configs describe it, before it is built: `class_path` and `init_args`, and its builder."""

    spec: dict[str, Any]
    build: Callable[[], VideoAutoencoder]


ConfigReader = Callable[[Sequence[str]], ModelConfig]


@dataclass
class Entry:
    """One autoencoder of a sweep.

    Args:
        name: Of its row, and of the row's folder.
        config: A config of `fit`, or several, each over those before it, of which the autoencoder counts. By default
            the model that the checkpoint holds. A path is looked for beside the sweep's own config first.
        checkpoint: Trained weights; without them the row is marked as untrained.
        claimed_rate: Compression rate that the model's authors state; 0.002 is 0.2%.
        windows: Let a model that takes shorter clips have them in windows of its length, and say so in its row.
    """

    name: str
    config: str | list[str] | None = None
    checkpoint: str | None = None
    claimed_rate: float | None = None
    windows: bool = False


@dataclass
class FVD:
    """The network of rFVD. Without one rFVD is unavailable.

    Args:
        path: TorchScript file of I3D.
        sha256: Its SHA-256: the file is a program, and only a known one is run.
    """

    path: str | None = None
    sha256: str | None = None


class Sweep:
    """Measure every autoencoder on the same test clips and write rows, table, plots, players and report.

    Args:
        autoencoders: The models: {name, config, checkpoint, claimed_rate, windows}.
        data: The data module, whose test clips are taken.
        protocol: How reconstructions are compared; `preset` is vidtwin, vidtok, tokenbench or wfvae.
        checkpoints_dir: Folder that relative paths of checkpoints start from.
        results_dir: Folder of the results. What is complete there is not measured again.
        dataset: The data set's name as papers call it (MCL-JCV), by which published numbers stand beside.
        references: Autoencoders without weights that are measured too, by their short names; by default all that are
            registered as `vidtwin.references`: the clip's mean colour and its temporal mean frame.
        accelerator: Where to run, as in Lightning: auto, cpu, cuda, ….
        devices: How many devices, or which; each is a process that takes its share of the chunks.
        num_nodes: Machines, each with so many devices.
        precision: Of the models; the metrics are always in full precision.
        perceptual_backbones: Files with torchvision's weights for LPIPS, by "vgg" and "alex"; by default torch hub's
            cache.
        fvd: The network of rFVD.
        vmaf: Measure VMAF too; needs the extra `vmaf`.
        cost: Measure FLOPs, clips a second and peak memory.
        downstream: Measure what the paper's DiT costs on each model's latents.
        repeats: Timed passes of both.
        players: Clips of each kind, worst and median, that are kept for the report's players.
        seed: Of the samples of posteriors.
        progress: Show a progress bar.
        read_config: Reads the configs of an entry; `UserError` for those without an autoencoder.
        pictures: Write this many of the first clips as rows/<name>/clip<i>.mp4 and .png for each entry.
        strict: Refuse entries that can't be built, before anything is written, instead of writing failed rows.
    """

    def __init__(
        self,
        autoencoders: list[Entry],
        data: LightningDataModule,
        protocol: protocol.ProtocolSettings = protocol.ProtocolSettings(),  # noqa: B008 - it is frozen
        checkpoints_dir: str = ".",
        results_dir: str = "results",
        dataset: str | None = None,
        references: list[str] | None = None,
        accelerator: str = "auto",
        devices: int | list[int] | str = 1,
        num_nodes: int = 1,
        precision: Precision = "32-true",
        perceptual_backbones: dict[str, str | None] | None = None,
        fvd: FVD | None = None,
        vmaf: bool = False,
        cost: bool = True,
        downstream: bool = True,
        repeats: int = 5,
        players: int = 2,
        seed: int = 0,
        progress: bool = True,
        read_config: ConfigReader | None = None,
        pictures: int = 0,
        strict: bool = False,
    ) -> None:
        self.entries = autoencoders
        self.data: Any = data
        self.settings = protocol
        self.checkpoints = Path(checkpoints_dir)
        self.folder = Path(results_dir)
        self.dataset = dataset
        known = sorted(plugins.available("vidtwin.references"))
        self.references = known if references is None else references
        self.accelerator, self.devices, self.num_nodes, self.precision = accelerator, devices, num_nodes, precision
        self.backbones = perceptual_backbones or {}
        self.fvd = fvd or FVD()
        self.vmaf = vmaf
        self.cost, self.downstream, self.repeats = cost, downstream, repeats
        self.players = players
        self.seed = seed
        self.progress = progress
        self.read_config = read_config
        self.pictures = pictures
        self.strict = strict
        self._check_names()
        if (self.fvd.path is None) != (self.fvd.sha256 is None):
            raise UserError("Expected fvd.path and fvd.sha256 together: only a file that is known is run.")
        for name, value, least in (("repeats", repeats, 1), ("players", players, 0)):
            if value < least:
                raise UserError(f"Expected {name} of at least {least}, got {value}.")
        if not 0 <= seed < 2**32:
            raise UserError(f"Expected seed of at least 0 and below 2^32, got {seed}.")
        for entry in autoencoders:
            if entry.claimed_rate is not None and not 0 < entry.claimed_rate < math.inf:
                raise UserError(
                    f"Expected claimed_rate of {entry.name} above 0, as 0.002 for 0.2%, got {entry.claimed_rate}."
                )
        if not isinstance(data, ClipSource):
            raise UserError(f"Expected a data module with test clips of its own, got {type(data).__name__}.")

    def _check_names(self) -> None:
        if not self.entries and not self.references:
            raise UserError("Expected autoencoders to measure, got none.")
        known = sorted(plugins.available("vidtwin.references"))
        for name in self.references:
            if name not in known:
                raise UserError(f"Expected references of {', '.join(known)}, got {name!r}{suggestion(name, known)}")
        names = [entry.name for entry in self.entries] + self.references
        for name in names:
            if name != Path(name).name or name.startswith(".") or not name.strip():
                raise UserError(f"Expected an autoencoder's name that can be a folder's, got {name!r}.")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"Expected a name of its own for each row, got several called {', '.join(twice)}.")

    def run(self) -> int:
        """Measure what is missing and write everything → 0, or 1 where a model could not be measured."""
        fabric = launch(self.accelerator, self.devices, self.num_nodes, self.precision)
        self.data.dataset("test")  # data that are refused leave no folder behind
        if self.strict:
            self._check_models()
        try:
            with lock(self.folder, "sweep", fabric):
                return self._run(fabric)
        except KeyboardInterrupt:
            self._show(fabric, f"what was measured is in {self.folder}; the same command goes on")
            raise

    def _run(self, fabric: Fabric) -> int:
        plan = self._plan(fabric)
        jobs = [self._job(entry) for entry in self.entries]
        jobs += [self._reference(name, plan.shape) for name in self.references]
        self._show(fabric, f"{len(plan.keys)} clips, protocol {plan.protocol['name']} ({plan.digest})")
        for line in plan.protocol["departs"]:
            self._show(fabric, f"protocol {self.settings.preset} is of other data: {line}")
        for job in jobs:
            if job.error:
                self._show(fabric, f"{job.name} failed: {job.error}")
        self._check_other_rows(fabric, {job.name for job in jobs}, plan.digest)
        runner = Runner(self, fabric, plan)
        waiting = [job for job in jobs if not runner.is_complete(job)]
        waiting.sort(key=runner.has_failed)
        fabric.barrier()  # before a process changes what another still looks at
        if fabric.is_global_zero:
            runner.remove_left_parts([job for job in jobs if job not in waiting])
        runner.measure_all(waiting, len(jobs))
        failed = []
        if fabric.is_global_zero:
            runner.refresh(jobs)
            self._write_all(fabric, runner, jobs)
            failed = runner.failed
        fabric.barrier()
        return int(fabric.broadcast(bool(failed)))

    def _check_models(self) -> None:
        for job in map(self._job, self.entries):
            if job.error:
                raise UserError(job.error)
            try:
                job.build().check(self.data.num_frames, self.data.resolution)
            except UserError:
                raise
            except Exception as error:
                raise UserError(f"{job.name} can't be built: {type(error).__name__}: {one_line(error)}") from error

    def _plan(self, fabric: Fabric) -> Plan:
        dataset = self.data.dataset("test")
        keys = [dataset.identity(index) for index in range(len(dataset))]
        described = self.data.protocol()
        if not keys:
            raise UserError(f"Expected test clips of {type(self.data).__name__}, got none.")
        size = self.data.eval_batch_size
        resolved = self.settings.resolve(
            described,
            self.precision,
            self.fvd.sha256.lower() if self.fvd.sha256 else None,
            self.dataset,
            self.data.skipped["test"],
        )
        # What reading finds later stands in the rows: the protocol is known before.
        digest = protocol.protocol_hash(resolved)
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"Expected a folder for results, got {self.folder}, which is a file; set --results_dir.")
        refused = ""
        if fabric.is_global_zero:
            try:
                protocol.write(resolved, self.folder)
            except UserError as error:
                refused = str(error)
        if refused := fabric.broadcast(refused):  # all processes end, and none waits for another
            raise UserError(refused)
        order = list(range(len(keys)))
        side = self.data.resolution
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        return Plan(chunks, keys, (3, self.data.num_frames, side, side), resolved, digest)

    def _job(self, entry: Entry) -> Job:
        """What the row's identity is, without building the model; a mistake in it becomes the row's error."""
        base = {"windows": entry.windows}
        checkpoint = hub.join_path(self.checkpoints, entry.checkpoint) if entry.checkpoint else None
        try:
            config = None
            paths = [entry.config] if isinstance(entry.config, str) else entry.config or []
            if paths:
                if self.read_config is None:
                    raise UserError(f"Expected read_config for the configs of {entry.name}, got none.")
                config = self.read_config(paths)
                spec = config.spec
            elif checkpoint:
                spec = checkpoints.model_spec(checkpoints.read(checkpoint, lazily=True), checkpoint)
            else:
                raise UserError(f"Expected a config or a checkpoint for {entry.name}, got neither.")
            mark = fingerprint(checkpoint) if checkpoint else None
        except UserError as error:
            return Job(entry.name, base, _unusable, str(error))

        def build() -> Subject:
            model = config.build() if config else checkpoints.build(spec)
            weights, differs = LAST, []
            if checkpoint:
                checkpoints.check(checkpoint)
                held = checkpoints.read(checkpoint, lazily=True)
                average = self.settings.weights == "average" or (self.settings.weights == "auto" and "ema" in held)
                checkpoints.load_weights(model, checkpoint, average)
                weights = AVERAGE if average else LAST
                stored = held.get("model_spec") or model.spec()
                differs = checkpoints.differences(json.loads(json.dumps(model.spec())), stored)
            window = model.temporal.usual_length if entry.windows else None
            kind: Literal["trained", "untrained"] = "trained" if checkpoint else "untrained"
            return Subject(entry.name, kind, model, checkpoint, mark, weights, entry.claimed_rate, window, differs)

        return Job(entry.name, base | {"model": spec, "fingerprint": mark}, build, claimed_rate=entry.claimed_rate)

    def _reference(self, name: str, shape: tuple[int, int, int, int]) -> Job:
        def build() -> Subject:
            model = plugins.load(name, "vidtwin.references")(num_frames=shape[1], resolution=shape[2])
            return Subject(name, "reference", model)

        return Job(name, {"name": name, "reference": plugins.resolve(name, "vidtwin.references")}, build)

    def _check_other_rows(self, fabric: Fabric, own: set[str], digest: str) -> None:
        """Rows of no entry stay in the table; one that can't be read would end the sweep after all was measured."""
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
            self._show(fabric, f"rows there of no autoencoder in the config, which are compared too: {names}")

    def _remove_damaged(self) -> None:
        """Files that are made of the rows, cut off by a disk or a hand, are made again."""
        for path in (self.folder / "comparison.json", self.folder / "players" / "players.json"):
            if path.exists():
                try:
                    rows.read_json(path)
                except UserError:
                    tqdm.write(f"vidtwin: {path} is cut off or damaged, and is made again", file=sys.stderr)
                    path.unlink()

    def _write_all(self, fabric: Fabric, runner: "Runner", jobs: list[Job]) -> rows.Results:
        self._remove_damaged()
        results = rows.read(self.folder)
        results.comparison = rows.compare(results, runner.frechet_of_common_clips(results))
        rows.write_comparison(self.folder, results.comparison)
        if self.players and results.comparison["num_clips"]:
            runner.write_players(results, jobs)
        pictures = runner.write_pictures(jobs) if self.pictures else []
        text = table.write(self.folder)
        paths = [*pictures, self.folder / "table.md", *plot_files.write(self.folder), report.write(self.folder)]
        sys.stdout.write(f"\n{text}\n")
        for path in paths:
            if path.suffix != ".svg":
                sys.stdout.write(f"{path}\n")
        sys.stdout.flush()
        return results

    def _show(self, fabric: Fabric, line: str) -> None:
        if fabric.is_global_zero:
            tqdm.write(f"vidtwin: {line}", file=sys.stderr)


def _unusable() -> Subject:
    raise AssertionError("a job with an error is not built")
