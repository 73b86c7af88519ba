"""The folder of a row: the parts of a measurement, the complete row that they are joined to, and earlier rows.

rows/<name>/parts/000000.json                      numbers of a chunk's clips, until the row is complete
rows/<name>/results.json, clips.csv, features.npy  the row; results.json is written last
rows/<name>/levels.csv                             its rate-distortion curve, with `rate_distortion`
rows/<name>/costs.json                             costs and the settings by which they were measured
rows/<name>/earlier/<identity>/                    a complete row that another one has replaced
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from vidtwin.benchmark import levels, rows
from vidtwin.benchmark.identity import compute_identity, find_known, select_settings
from vidtwin.benchmark.loaded_model import add_latents
from vidtwin.benchmark.plan import Job, ModelError, Part, Plan, compute_digest, make_empty_part
from vidtwin.benchmark.rfvd import decode_features
from vidtwin.console import log
from vidtwin.errors import UserError
from vidtwin.files import inside, replacing, write_text
from vidtwin.metrics.fvd import NUM_FEATURES
from vidtwin.storage.resumable import Resumable, read_json

RESULTS, CLIPS, FEATURES, COSTS = "results.json", "clips.csv", "features.npy", "costs.json"
PICTURES = "clip[0-9]*.*"


class RowFolder:
    """Files of a row, and whether they are the ones that are wanted.

    Args:
        results: Results folder.
        job: The row to measure.
        plan: Clips and protocol.
        settings: Settings of the sweep that may decide a row's numbers, by name.
        costs_settings: Settings that decide its costs.
    """

    def __init__(
        self, results: Path, job: Job, plan: Plan, settings: dict[str, Any], costs_settings: list[Any]
    ) -> None:
        self.results, self.job, self.plan = results, job, plan
        self.name = job.name
        self.folder = inside(results, f"rows/{job.name}")
        self.given_settings, self.costs_settings = settings, costs_settings
        self.settings = select_settings(job.identity, settings)
        self.identity = compute_identity(job.identity, self.settings)
        self.parts = Resumable(inside(self.folder, "parts"), "{:06d}.json", self._read_part)
        self.costs = Resumable(self.folder, COSTS, lambda _, path: read_json(path, identity=self.costs_identity))

    @property
    def costs_identity(self) -> str:
        """The identity of the row's costs."""
        return compute_digest([self.identity, self.costs_settings])

    def find_identity(self) -> str:
        """Return the identity by which this model was measured here, maybe by an earlier version, or its own."""
        for settings in (self.settings, self.given_settings):  # which earlier versions took in full
            if known := find_known(self.job.identity, settings, self._list_identities()):
                return known
        return self.identity

    def _list_identities(self) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """List the identities in the folder, each with the model's spec if it is known: row, earlier rows, parts."""
        for path in [self.folder / RESULTS, *sorted(self.folder.glob(f"earlier/*/{RESULTS}"))]:
            try:
                row = rows.read_row(path)
            except UserError:  # `is_complete` says so
                continue
            if row["kind"] != "failed" and row.get("identity"):
                yield str(row["identity"]), row.get("model")
        for path in sorted(self.parts.folder.glob("[0-9]*.json")):
            try:
                part = read_json(path)
            except UserError:  # `parts` says so
                continue
            if isinstance(part, dict) and part.get("identity"):
                yield str(part["identity"]), None

    def is_complete(self) -> bool:
        """Return whether an up-to-date row exists, restored from `earlier/` if needed; log the reason if not."""
        if not self.job.error:
            self._restore()
        if not (self.folder / RESULTS).exists():
            return False
        try:
            row = self._read_intact(self.folder)
        except UserError as error:
            log(f"{self.name} is measured again: {error}")
            return False
        if row["kind"] == "failed":
            log(f"{self.name} failed before and is tried again")
        elif row.get("identity") != self.identity:
            if not self.job.error:
                log(
                    f"{self.name} is measured again: the row there has another checkpoint, model, set of metrics, "
                    "rate_distortion, batch size, seed, kind of device, compile or windows"
                )
        elif row["failed_clips"]:
            log(f"{self.name} failed on {len(row['failed_clips'])} clips, which are tried again")
        else:
            return True
        return False

    def read(self) -> rows.Row | None:
        """Read the row; None if it is missing or damaged."""
        try:
            return rows.read_row(self.folder / RESULTS)
        except UserError:
            return None

    def update(self, row: rows.Row) -> None:
        """Write `results.json` alone."""
        write_text(self.folder / RESULTS, json.dumps(row, indent=2) + "\n")

    def write_part(self, chunk: int, part: Part) -> None:
        """Write the numbers of a chunk."""
        content = {**part, "identity": self.identity, "chunk": self.plan.list_clips(chunk)}
        write_text(self.parts.path(chunk), json.dumps(content) + "\n")

    def write_costs(self, costs: dict[str, Any]) -> None:
        """Write the costs."""
        write_text(self.costs.path(0), json.dumps(costs | {"identity": self.costs_identity}) + "\n")

    def find_failure(self, chunks: Iterable[int]) -> str | None:
        """Return the reason why a model failed on every clip of some chunks; None if it did not or if one is missing.

        It is the model then, not the clips. All processes read the same parts, so their number changes nothing.
        """
        found = [self.parts.get(chunk) for chunk in chunks]
        if any(part is None or part["clips"] for part in found):
            return None
        return next((clip["reason"] for part in found if part for clip in part["failed"]), None)

    def join(self) -> Part:
        """Join all parts to one, features as arrays; `ModelError` if a part or every clip is missing."""
        joined = make_empty_part()
        for chunk in range(len(self.plan.chunks)):
            part = self.parts.get(chunk)
            if part is None:
                raise ModelError(f"its part {chunk} is missing, though it was measured; run the sweep again")
            joined["clips"] += part["clips"]
            joined["failed"] += part["failed"]
            joined["skipped"] += part["skipped"]
            joined["levels"] += part.get("levels", [])
            joined["features"] += map(decode_features, part["features"])
            summed = self.plan.varies or any("values" in latent for latent in (part["latents"] or {}).values())
            if summed and part["latents"] and part["clips"]:  # those of all clips
                joined["latents"] = add_latents(joined["latents"] or {}, part["latents"])
            elif not summed:
                joined["latents"] = part["latents"] or joined["latents"]
            for latent, found in part["codes"].items():
                known = joined["codes"].setdefault(latent, {"size": found["size"], "counts": Counter()})
                known["counts"].update(found["counts"])  # a Counter adds
        if not joined["clips"]:
            self.remove_parts()  # so that they are tried again
            reason = joined["failed"][0]["reason"] if joined["failed"] else "no clip could be read"
            raise ModelError(f"none of the clips could be measured; {reason}")
        return joined

    def write(self, row: rows.Row, part: Part) -> None:
        """Write a row in place of another one; the parts of clips that failed are removed to be tried again."""
        self._put_aside()
        for picture in self.folder.glob(PICTURES):
            picture.unlink()
        if part["features"]:
            with replacing(self.folder / FEATURES) as temporary, temporary.open("wb") as file:
                np.save(file, np.stack(part["features"]))
        if part["levels"]:
            levels.write(self.folder, row, [level for clip in part["levels"] for level in clip])
        rows.write_row(self.results, row, [{"model": self.name, **clip} for clip in part["clips"]])
        if not part["failed"]:
            self.remove_parts()
        failed = {self.plan.index_of[clip["name"], clip["start_frame"]] for clip in part["failed"]}
        for number, chunk in enumerate(self.plan.chunks):
            if not failed.isdisjoint(chunk):
                self.parts.path(number).unlink()

    def write_failed(self, error: str) -> None:
        """Write a row with an error, but keep a complete one if the model could not be built (no checkpoint)."""
        row = self.read()
        if self.job.error and row and row["kind"] != "failed":
            log(f"{self.name}: kept the complete row that was measured earlier")
            return
        self._put_aside()
        self.update(
            {
                "schema_version": rows.SCHEMA_VERSION,
                "name": self.name,
                "kind": "failed",
                "error": error,
                "model": self.job.identity.get("model"),
                "protocol": self.plan.protocol,
                "protocol_hash": self.plan.digest,
            }
        )

    def remove_parts(self) -> None:
        """Remove all parts."""
        if self.parts.folder.exists():
            shutil.rmtree(self.parts.folder)

    def _read_part(self, chunk: int, path: Path) -> Part | None:
        return cast("Part | None", read_json(path, identity=self.identity, chunk=self.plan.list_clips(chunk)))

    def _read_intact(self, folder: Path) -> rows.Row:
        """Read a row with all of its files; `UserError` names a missing or damaged one."""
        row = rows.read_row(folder / RESULTS)
        if row["kind"] == "failed":
            return row
        clips = rows.read_clips(folder, row)
        if row.get("rate_distortion"):
            levels.read(folder, row)
        if isinstance(row["metrics"].get("rfvd"), dict):
            try:
                shape = np.load(folder / FEATURES, mmap_mode="r").shape
            except (OSError, ValueError) as error:
                raise UserError(f"Expected the features of its clips, got none that can be read ({error}).") from error
            if shape != (len(clips), NUM_FEATURES):
                raise UserError(f"Expected features of {len(clips)} clips, got {shape}.")
        return row

    def _restore(self) -> None:
        """Move the earlier row of this identity back, if there is one."""
        earlier = self._earlier(self.identity)
        if not self._is_wanted(earlier):
            return
        if self._is_wanted(self.folder):
            shutil.rmtree(earlier)  # a run was killed after it had restored the row
            return
        self._put_aside()
        _move_row(earlier, self.folder)
        log(f"{self.name}: restored the earlier row of these settings")

    def _is_wanted(self, folder: Path) -> bool:
        """Return whether a folder has an intact row of this identity."""
        try:
            return self._read_intact(folder).get("identity") == self.identity
        except UserError:
            return False

    def _earlier(self, identity: str) -> Path:
        return inside(inside(self.folder, "earlier"), identity)

    def _put_aside(self) -> None:
        """Move a complete row of another identity to `earlier/` before another row replaces it."""
        row = self.read()
        if row is None or row["kind"] == "failed" or row.get("identity") == self.identity:
            return
        target = self._earlier(str(row.get("identity") or row["fingerprint"] or compute_digest(row)))
        _move_row(self.folder, target)
        log(f"{self.name}: moved the earlier row to {target}")


def _move_row(source: Path, target: Path) -> None:
    """Move a row's files so that one of the two folders has all of them at every moment.

    `results.json`, without which a folder has no row, arrives last and then leaves first.
    """
    target.mkdir(parents=True, exist_ok=True)
    (target / RESULTS).unlink(missing_ok=True)
    moved = _list_files(source)
    for path in _list_files(target):
        if path.name not in {each.name for each in moved}:
            path.unlink()
    for path in [*moved, source / RESULTS]:
        with replacing(target / path.name) as temporary:
            shutil.copyfile(path, temporary)
    for path in [source / RESULTS, *moved]:
        path.unlink()


def _list_files(folder: Path) -> list[Path]:
    """List the files of a row beside its `results.json`."""
    named = [folder / name for name in (FEATURES, levels.NAME, CLIPS) if (folder / name).exists()]
    return named + sorted(folder.glob(PICTURES))
