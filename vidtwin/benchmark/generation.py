"""Generation FVD: the distance between generated videos and real clips of the same classes."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vidtwin import console
from vidtwin.benchmark.options import FVD
from vidtwin.benchmark.protocol import protocol_hash
from vidtwin.clips import as_clip
from vidtwin.data import ClipSource
from vidtwin.errors import UserError, few
from vidtwin.files import inside, parse_json, write_text
from vidtwin.metrics.fvd import MIN_FRAMES, Convention, FeatureNetwork, frechet_distance, rfvd, statistics
from vidtwin.video import Frames, iter_frames

SAMPLES, SCORE = "samples.json", "score.json"  # the first is written by `vidtwin generate`
Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Generated:
    """A folder of `vidtwin generate`.

    Attributes:
        folder: Where it is.
        manifest: Content of samples.json.
    """

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> "Generated":
        """Read samples.json; raise `UserError` if it is missing or damaged."""
        path = Path(folder) / SAMPLES
        try:
            manifest = parse_json(path.read_text(encoding="utf-8"))
            _check(manifest)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"Expected a folder of generated videos with {path}, got none; make it by `vidtwin generate`."
            ) from None
        except (ValueError, TypeError, KeyError, ZeroDivisionError):
            raise UserError(
                f"Expected a manifest written by `vidtwin generate` in {path}, got something else."
            ) from None
        return cls(Path(folder), manifest)

    @property
    def classes(self) -> dict[str, int]:
        """Number of videos by class; by "" for a model without classes."""
        counts = Counter("" if sample["label"] < 0 else sample["class"] for sample in self.manifest["samples"])
        return dict(sorted(counts.items()))

    def clips(self) -> Iterator[Frames]:
        """Yield the videos as they are on disk: (T, H, W, 3); raise `UserError` for one of another shape."""
        shape = (self.manifest["num_frames"], *self.manifest["size"], 3)
        for sample in self.manifest["samples"]:
            path = inside(self.folder, sample["file"])
            frames = list(iter_frames(path))
            if (len(frames), *frames[0].shape) != shape:
                raise UserError(
                    f"Expected {shape[0]} frames of {shape[1]}x{shape[2]} in {path}, got {len(frames)} of "
                    f"{frames[0].shape[0]}x{frames[0].shape[1]}; generate again."
                )
            yield np.stack(frames)


def _check(manifest: dict[str, Any]) -> None:
    """Raise `KeyError`, `TypeError` or `ValueError` for entries that `vidtwin generate` does not write."""
    samples = manifest["samples"]
    if not Fraction(manifest["fps"]) > 0:
        raise ValueError("expected a rate")
    texts = [manifest["weights_sha256"], *(sample[key] for sample in samples for key in ("file", "class"))]
    counts = [manifest["num_frames"], *manifest["size"]]
    if not samples or not all(isinstance(text, str) for text in texts) or len(manifest["size"]) != 2:
        raise ValueError("expected samples")
    if not all(isinstance(count, int) and count > 0 for count in counts):
        raise ValueError("expected counts")
    if not all(isinstance(sample["label"], int) for sample in samples):
        raise ValueError("expected labels")


@dataclass(frozen=True)
class Protocol:
    """Protocol of a comparison of generated videos to real ones; values of equal hashes are comparable.

    Attributes:
        samples: Number of generated videos by class.
        split: Split of the real clips.
        reference: Number of real clips of these classes.
        reference_sha256: SHA-256 of their names and start frames.
        clips: Their length, size, rate and filter.
        compared: What is compared.
        fvd: Convention and SHA-256 of the network; None without.
    """

    samples: dict[str, int]
    split: Split
    reference: int
    reference_sha256: str
    clips: dict[str, Any]
    compared: str
    fvd: dict[str, Any]


def score(
    folder: str | Path,
    data: ClipSource,
    split: Split = "train",
    fvd: FVD | None = None,
    convention: Convention = "styleganv",
    batch_size: int = 8,
    device: str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Measure generation FVD, and write score.json in the folder of the generated videos.

    The real clips are all those of a split (of the first epoch, if they are drawn) whose classes were generated. The
    distance is class-conditional: of all classes together, each in the share in which it was generated or occurs.

    Args:
        folder: Written by `vidtwin generate`.
        data: Data module of the real clips.
        split: Split of the real clips.
        fvd: Network of FVD; without one it is "unavailable".
        convention: How clips reach the network.
        batch_size: Clips per pass.
        device: Device of the network.
        progress: Show a progress bar.

    Returns:
        The content of score.json: `gfvd` ({"value", "num_clips", "ranked", "note"} or "unavailable"), `reason` if it
        is, `protocol` and `protocol_hash`.

    Raises:
        UserError: The real clips have other sizes, or none is of a generated class.
    """
    generated = Generated.read(folder)
    _check_clips(generated, data)
    network, reason = _load_network(fvd, convention, generated.manifest["num_frames"])
    real = _Real(data, split, set(generated.classes) - {""})
    if network is not None:
        network.network.to(device)
    found: dict[str, list[Tensor]] = {"real": [], "generated": []}
    total = len(real) + len(generated.manifest["samples"])
    with tqdm(total=total, desc="scoring", unit="clip", disable=None if progress else True, dynamic_ncols=True) as bar:
        for name, clips in (("real", iter(real)), ("generated", generated.clips())):
            for batch in _batches(clips, batch_size):
                if network is not None:
                    found[name].append(network(as_clip(batch).to(device)).cpu())
                bar.update(len(batch))
    if not real.identities:
        raise UserError(f"Expected real clips of the generated classes in the {split} split, got none; set --split.")
    protocol = Protocol(
        generated.classes,
        split,
        len(real.identities),
        hashlib.sha256("".join(f"{name}\t{start}\n" for name, start in real.identities).encode()).hexdigest(),
        {name: getattr(data.settings, name) for name in ("num_frames", "resolution", "fps", "resize", "seed")},
        "generated video files with clips, uint8",
        {"convention": convention, "sha256": fvd.sha256 if fvd is not None else None},
    )
    gfvd: Any = "unavailable"
    if network is not None:
        gfvd, reason = _distance(*(torch.cat(parts) for parts in found.values()))
    result = {
        "schema_version": 1,
        "gfvd": gfvd,
        "reason": reason,
        "protocol": asdict(protocol),
        "protocol_hash": protocol_hash(asdict(protocol)),
        "generated_by": generated.manifest["weights_sha256"],
    }
    write_text(generated.folder / SCORE, json.dumps(result, indent=1) + "\n")
    return result


class _Real:
    """Real clips of given classes, of all if none is given, uint8 (T, H, W, 3); unreadable ones are left out."""

    def __init__(self, data: ClipSource, split: Split, classes: set[str]) -> None:
        self.clips: Any = data.dataset(split)
        self.names, self.classes = data.class_names(), classes
        self.identities: list[tuple[str, int]] = []
        unknown = sorted(classes - set(self.names))
        if unknown:
            raise UserError(
                f"Expected real clips of the generated classes, got none of {few(unknown)} among {few(self.names)}; "
                "give the data of the training."
            )

    def __len__(self) -> int:
        return len(self.clips)

    def __iter__(self) -> Iterator[Frames]:
        for index in range(len(self.clips)):
            item = self.clips[0, index]
            if "clip" not in item:
                console.log(f"{item['skipped'][0][0]}: {item['skipped'][0][1]}; left out")
                continue
            if self.classes and self.names[item["label"]] not in self.classes:
                continue
            self.identities.append((item["name"], int(item["start_frame"])))
            yield item["clip"]


def _check_clips(generated: Generated, data: ClipSource) -> None:
    size = data.settings.size
    ours, theirs = generated.manifest["num_frames"], data.num_frames
    if ours != theirs or size is None or list(size) != list(generated.manifest["size"]):
        height, width = generated.manifest["size"]
        wanted = height if height == width else f"[{height}, {width}]"
        raise UserError(
            f"Expected real clips of {ours} frames of {height}x{width} pixels, as in {generated.folder}, got others; "
            f"set --data.num_frames {ours} --data.resolution {wanted}."
        )
    made, real = float(Fraction(generated.manifest["fps"])), data.settings.rates[0]
    if real is not None and abs(real - made) > 0.01 * made:
        console.log(
            f"{generated.folder}: the generated clips have {made:g} frames per second, the real ones {real:g}; "
            f"--data.fps {made:g}, or null for all frames, compares like with like"
        )


def _load_network(fvd: FVD | None, convention: Convention, num_frames: int) -> tuple[FeatureNetwork | None, str | None]:
    """Load the network of FVD → it, and the reason if it is unavailable."""
    if fvd is None or fvd.path is None:
        return None, "expected an I3D network, got none; give --fvd.path and --fvd.sha256"
    if num_frames < MIN_FRAMES:
        return None, f"clips of {num_frames} frames; FVD needs {MIN_FRAMES}"
    if fvd.sha256 is None:
        raise UserError(f"Expected --fvd.sha256 of the file {fvd.path}, which is a program, got none.")
    return FeatureNetwork(fvd.path, fvd.sha256, convention), None


def _distance(real: Tensor, generated: Tensor) -> tuple[Any, str | None]:
    if min(len(real), len(generated)) < 2:
        return "unavailable", "fewer than two clips, which have no covariance"
    value = float(frechet_distance(*statistics(real), *statistics(generated)))
    return rfvd(value, min(len(real), len(generated))), None


def _batches(clips: Iterator[Frames], size: int) -> Iterator[list[Frames]]:
    batch: list[Frames] = []
    for clip in clips:
        batch.append(clip)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
