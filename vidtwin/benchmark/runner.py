"""Run a sweep in one of its processes: each measures every world-size-th chunk, the first one joins and writes rows."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from lightning.fabric import Fabric

from vidtwin.apply import pipeline
from vidtwin.benchmark import rows
from vidtwin.benchmark.loaded_model import LoadedModel, compare_claim
from vidtwin.benchmark.measurer import DeviceError, Measurer
from vidtwin.benchmark.options import SweepOptions
from vidtwin.benchmark.plan import Failure, Job, ModelError, Part, Plan, format_error
from vidtwin.benchmark.row_folder import RowFolder
from vidtwin.console import Progress, log
from vidtwin.distributed import gather_objects
from vidtwin.errors import UserError
from vidtwin.files import remove_leftovers

HEAD = 16  # clips: a model that fails on all of the first ones fails, one that fails on others lacks those


class Runner:
    """Measure the rows that are missing.

    Args:
        options: Options of the sweep, and its data.
        fabric: Processes.
        plan: Clips and protocol.
        jobs: Rows.

    Attributes:
        failed: Names of rows that could not be measured.
    """

    def __init__(self, options: SweepOptions, fabric: Fabric, plan: Plan, jobs: list[Job]) -> None:
        self.options, self.fabric, self.plan = options, fabric, plan
        self.measurer = Measurer(options, fabric, plan)
        settings = self.measurer.settings, self.measurer.costs_settings
        self.rows = [RowFolder(options.folder, job, plan, *settings) for job in jobs]
        self.mine = [chunk for chunk in range(len(plan.chunks)) if chunk % fabric.world_size == fabric.global_rank]
        self.head = range(min(len(plan.chunks), -(-HEAD // len(plan.chunks[0]))))
        self.failed: list[str] = []

    def run(self) -> None:
        """Measure every missing row. A model that fails becomes a row with its error; the others continue."""
        waiting = self._select()
        clips = sum(len(self.plan.chunks[chunk]) for chunk in self.mine)
        shown = bool(self.options.progress and self.fabric.is_global_zero and waiting)
        with Progress(clips * len(waiting), "measuring", "clips", shown) as bar:
            for row in waiting:
                bar.set_description_str(row.name)
                before = bar.n
                self.measure_row(row, bar)
                self.fabric.barrier()
                bar.update(before + clips - bar.n)
        if self.fabric.is_global_zero:
            self._refresh()

    def measure_row(self, row: RowFolder, bar: Progress) -> None:
        """Measure this process's share of a row; the first process then measures its costs and writes it."""
        model, error, needs_costs = None, row.job.error, False
        missing: list[int] = []
        failed: list[Failure] = []
        if not error:
            missing = row.parts.missing(self.mine)
            needs_costs = self.fabric.is_global_zero and self._lacks_costs(row)
            self._log_progress(row, missing, bar)
            if missing or needs_costs:
                try:
                    model = self.measurer.build(row.job)
                except ModelError as caught:
                    error = str(caught)
        if model:
            first = [chunk for chunk in missing if chunk in self.head]
            self._measure_chunks(row, model, first, bar, failed.extend)
        errors = [each for each in gather_objects(error) if each]  # the parts of the first clips are complete then
        error = errors[0] if errors else row.find_failure(self.head)
        if error and not row.job.error:  # which was logged at the start
            log(f"{row.name} failed: {error}", rank_zero=True)
        if model and not error:
            for line in model.differs:
                log(f"{row.name}: the checkpoint differs from the config, which wins: {line}", rank_zero=True)
            self._log_failed(row, failed)
            rest = [chunk for chunk in missing if chunk not in self.head]
            self._measure_chunks(row, model, rest, bar, partial(self._log_failed, row))
        self.fabric.barrier()  # costs are measured while the others wait
        if self.fabric.is_global_zero:
            if needs_costs and model and not error:
                row.write_costs(self.measurer.measure_costs(model))
            self._finish(row, model, error)
        del model
        if self.fabric.device.type == "cuda":
            torch.cuda.empty_cache()

    def _select(self) -> list[RowFolder]:
        """Return the rows to measure, those that failed before last: some models end the process."""
        waiting: list[int] = []
        if self.fabric.is_global_zero:
            for number, row in enumerate(self.rows):
                remove_leftovers(row.folder)
                row.identity = row.find_identity()
                if row.is_complete():
                    row.remove_parts()  # the sweep was killed before it did that
                else:
                    waiting.append(number)
            if complete := len(self.rows) - len(waiting):
                log(f"{complete} of {len(self.rows)} rows are complete")
            waiting.sort(key=lambda number: (self.rows[number].read() or {}).get("kind") == "failed")
        waiting, identities = self.fabric.broadcast((waiting, [row.identity for row in self.rows]))
        for row, identity in zip(self.rows, identities, strict=True):
            row.identity = identity
        return [self.rows[number] for number in waiting]

    def _log_progress(self, row: RowFolder, missing: list[int], bar: Progress) -> None:
        stale = len(list(row.parts.folder.glob("[0-9]*.json"))) - len(self.mine) + len(missing)
        if self.fabric.world_size == 1 and stale > 0:
            log(f"{row.name}: {stale} chunks there are of another checkpoint, model or batch size")
        if ready := sum(len(self.plan.chunks[chunk]) for chunk in self.mine if chunk not in missing):
            log(f"{row.name}: {ready} clips were measured before", rank_zero=True)
            if not bar.disable:  # a hidden bar has no such attribute
                bar.initial += ready  # the rate, and with it the ETA, is of what is measured now
            bar.update(ready)

    def _log_failed(self, row: RowFolder, failed: list[Failure]) -> None:
        for clip in failed:
            log(f"{row.name} fails on {clip['name']} at frame {clip['start_frame']}: {clip['reason']}")

    def _measure_chunks(
        self,
        row: RowFolder,
        model: LoadedModel,
        chunks: list[int],
        bar: Progress,
        report: Callable[[list[Failure]], None],
    ) -> None:
        """Measure chunks and write their parts; report the clips of each on which the model failed."""
        if not chunks:
            return
        # Made here, since the loader watches its processes in the main thread alone.
        batches = iter(self.measurer.load([self.plan.chunks[chunk] for chunk in chunks]))

        def read(chunk: int) -> Iterator[dict[str, Any]]:
            yield next(batches)

        def write(chunk: int, parts: Iterator[Part]) -> None:
            try:
                (part,) = parts
            except DeviceError as error:
                row.write_failed(str(error))  # and the next run takes the other models first
                raise UserError(
                    f"{row.name} has left {self.fabric.device} unusable: {error}; run the same command again, which "
                    "measures the other models first."
                ) from error
            row.write_part(chunk, part)
            bar.update(len(self.plan.chunks[chunk]))
            report(part["failed"])

        with pipeline.ending_on_sigterm() if self.fabric.world_size == 1 else nullcontext():
            pipeline.run(chunks, read, partial(self.measurer.measure, model), write)

    def _lacks_costs(self, row: RowFolder) -> bool:
        if not (self.options.cost or self.options.downstream):
            return False
        costs = row.costs.get(0)
        # Out of memory may have been a neighbour's doing.
        return costs is None or bool(costs["cost"] and "error" in costs["cost"])

    def _finish(self, row: RowFolder, model: LoadedModel | None, error: str | None) -> None:
        """Join the parts of all processes and write the row."""
        try:
            if error:
                if row.find_failure(self.head):
                    row.remove_parts()  # so that they are tried again in the next run
                raise ModelError(error)
            part = row.join()
            model = model or self.measurer.build(row.job)
        except ModelError as caught:
            self.failed.append(row.name)
            row.write_failed(str(caught))
            return
        clips = part["clips"]
        metrics: dict[str, Any] = rows.means(clips, self.plan.protocol)
        unavailable = dict(self.measurer.unavailable)
        if features := self.measurer.features:
            try:
                metrics["rfvd"] = features.compute_distance([rows.key_of(clip) for clip in clips], part["features"])
            except UserError as caught:  # features that are not finite
                unavailable["rfvd"] = format_error(caught)
        metrics |= dict.fromkeys(unavailable, "unavailable")
        costs = row.costs.get(0) or {}
        assert part["latents"] is not None  # as always if there are clips
        content = model.describe(part["latents"], self.plan.shape, part["codes"], self.fabric.device) | {
            "metrics": metrics,
            "unavailable": unavailable,
            "num_clips": len(clips),
            "failed_clips": part["failed"],
            "skipped": self.plan.protocol["skipped"] | dict(part["skipped"]),
            "cost": costs.get("cost"),
            "downstream": costs.get("downstream"),
            "rate_distortion": self.measurer.curves.settings if self.measurer.curves and part["levels"] else None,
            "seed_of": row.job.seed_of,
            "identity": row.identity,
            "protocol": self.plan.protocol,
            "protocol_hash": self.plan.digest,
        }
        row.write(content, part)

    def _refresh(self) -> None:
        """Update claimed rates and costs in complete rows to the present settings."""
        for row in self.rows:
            content = row.read()
            if content is None or content["kind"] == "failed" or content.get("identity") != row.identity:
                continue
            if self._lacks_costs(row):
                log(f"{row.name}: its costs are measured")
                try:
                    row.write_costs(self.measurer.measure_costs(self.measurer.build(row.job)))
                except ModelError as error:
                    log(f"{row.name}: no costs: {error}")
            costs = row.costs.get(0) or {}
            new = content | {"claimed": compare_claim(content["compression_rate"], row.job.claimed_rate)}
            if row.job.seed_of or content.get("seed_of"):
                new["seed_of"] = row.job.seed_of
            if set(content["unavailable"]) == set(self.measurer.unavailable):
                new["unavailable"] = self.measurer.unavailable
            new |= {key: costs[key] for key in ("cost", "downstream") if costs.get(key)}
            if new != content:
                row.update(new)
