"""Plan the content of a folder of latents, and complete its manifest from the shards. No model is needed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from vidtwin.apply.inputs import Input
from vidtwin.apply.windows import examine
from vidtwin.autoencoder import complete
from vidtwin.errors import UserError
from vidtwin.listing import identity
from vidtwin.storage.latent_files import (
    LOGVAR,
    Manifest,
    Piece,
    StoredPiece,
    VideoEntry,
    channel_statistics,
    open_shard,
)
from vidtwin.video import VideoError, is_lasting, is_of_file


class Survey(NamedTuple):
    """Outcome of `survey_inputs`.

    Attributes:
        videos: The usable videos.
        classes: Names of the labels.
        skipped: Name → reason of the videos that are unusable.
        unread: Name → reason of the videos at which the system failed, which may be usable.
    """

    videos: list[VideoEntry]
    classes: list[str]
    skipped: dict[str, str]
    unread: dict[str, str]


def survey_inputs(inputs: Sequence[Input], labelled: bool, known: Mapping[str, VideoEntry]) -> Survey:
    """Survey the videos without decoding them.

    Args:
        inputs: The videos.
        labelled: Take the folders of the videos as their classes, see `check_classes`.
        known: Videos surveyed before, by name; taken over if the file has not changed.

    Raises:
        UserError: The system fails at a video in a way that others would meet, or at one that was surveyed before.
    """
    folders = [entry.name.rpartition("/")[0] for entry in inputs]
    classes = sorted(set(folders)) if labelled else []
    videos: list[VideoEntry] = []
    skipped: dict[str, str] = {}
    unread: dict[str, str] = {}
    bar = tqdm(inputs, desc="surveying videos", unit=" videos", disable=None, delay=1, dynamic_ncols=True)
    for entry, folder in zip(bar, folders, strict=True):
        label = classes.index(folder) if labelled else -1
        try:
            video = _survey_video(entry, known.get(entry.name))
        except VideoError as error:
            if not is_of_file(error) or (not error.lasting and entry.name in known):
                raise UserError(
                    f"Expected to read {entry.path}, got an error of the system: {error} Try again."
                ) from error
            (skipped if error.lasting else unread)[entry.name] = _reason(error, entry.path)
        else:
            videos.append(replace(video, label=label))
    return Survey(videos, classes, skipped, unread)


def _survey_video(entry: Input, known: VideoEntry | None) -> VideoEntry:
    try:
        size, changed = identity(entry.path)
    except OSError as error:
        lasting = is_lasting(error) and not isinstance(error, FileNotFoundError)
        raise VideoError(f"{entry.path}: {error.strerror}.", lasting=lasting) from error
    if known is not None and (known.bytes, known.changed, known.source) == (size, changed, str(entry.path)):
        return replace(known, num_frames=None, height=None, width=None)
    info, fault = examine(entry.path)
    if fault is not None and not info.num_frames:
        raise fault
    damage = _reason(fault, entry.path) if fault else None
    return VideoEntry(entry.name, str(entry.path), -1, str(info.fps), info.num_frames, size, changed, damage=damage)


def _reason(error: VideoError, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ").rstrip(".")


def cut(counts: Sequence[int], clips_per_shard: int) -> list[list[Piece]]:
    """Cut the windows of all videos, one after the other, into shards; `counts` holds the number for each video."""
    shards: list[list[Piece]] = []
    room = 0
    for video, count in enumerate(counts):
        first = 0
        while first < count:
            if not room:
                shards.append([])
                room = clips_per_shard
            windows = min(room, count - first)
            shards[-1].append(Piece(video, first, windows))
            first, room = first + windows, room - windows
    return shards


def difference(ours: Manifest, theirs: Manifest) -> str | None:
    """Return the first difference between the latents of two manifests, "theirs, not ours"; None if they agree.

    Videos that could not be read for theirs are no difference.
    """
    for key in ("class_path", "init_args", "weights_sha256"):
        mine, other = ours.model[key], theirs.model.get(key)
        if key == "init_args" and mine != other:  # of one class, which `ours` has imported
            mine, other = complete(ours.model), complete(theirs.model)
        if mine != other:
            named = [
                f"{m.model['class_path'].rpartition('.')[2]} {m.model['weights_sha256'][:8]}" for m in (theirs, ours)
            ]
            return f"those of {named[0]}, not of {named[1]}" + (" with these arguments" if key == "init_args" else "")
    for key in sorted({*ours.settings, *theirs.settings}):
        if ours.settings.get(key) != theirs.settings.get(key):
            return f"{key}={theirs.settings.get(key)}, not {key}={ours.settings.get(key)}"
    if ours.classes != theirs.classes:
        return f"{len(theirs.classes)} classes, not {len(ours.classes)} or others"
    held = {video.name: video for video in theirs.videos}
    for video in ours.videos:
        other = held.pop(video.name, None)
        if other is None and video.name in theirs.unread:
            continue
        if other is None:
            return f"no video {video.name}"
        if (video.bytes, video.changed) != (other.bytes, other.changed):
            return f"latents of {video.name} as it was before it changed"
    if held:
        return f"a video {next(iter(held))}, which is not among the inputs"
    return None if ours.digest == theirs.digest or read_since(ours, theirs) else "another plan of its shards"


def read_since(ours: Manifest, theirs: Manifest) -> list[str]:
    """Return the names of our videos that could not be read for theirs."""
    return [video.name for video in ours.videos if video.name in theirs.unread]


def finish(manifest: Manifest, folder: Path) -> Manifest:
    """Complete a manifest from its shards: results of each video, statistics and totals."""
    shards = []
    videos = list(manifest.videos)
    sums: list[dict[str, Any]] = []
    shapes: dict[str, set[tuple[int, ...]]] = {name: set() for name in manifest.latents}
    numbers, bits, pixels, size = 0, 0.0, 0, 0
    for number, planned in enumerate(manifest.shards):
        shard = open_shard(folder, manifest, number)
        size += shard.path.stat().st_size
        sums.append(shard.sums)
        shards.append([replace(p, stored=len(s.num_frames)) for p, s in zip(planned, shard.pieces, strict=True)])
        for piece, stored in zip(planned, shard.pieces, strict=True):
            videos[piece.video] = _join(videos[piece.video], stored)
            pixels += sum(stored.num_frames) * (stored.height or 0) * (stored.width or 0)
        for name, shape in shard.sizes():
            _, latent, *part = name.split(".")
            if part == [LOGVAR]:
                continue
            shapes[latent].add(tuple(shape[1:]))
            numbers += math.prod(shape)
            bits += math.prod(shape) * math.log2(manifest.latents[latent].codebook_size or 1)
    coded = all(latent.kind == "codes" for latent in manifest.latents.values())
    latents = {
        name: replace(latent, shape=next(iter(shapes[name])) if len(shapes[name]) == 1 else None)
        for name, latent in manifest.latents.items()
    }
    totals = {
        "clips": sum(piece.stored or 0 for pieces in shards for piece in pieces),
        "videos": sum(bool(video.num_frames) for video in videos),
        "frames": sum(video.num_frames or 0 for video in videos),
        "bytes": size,
        "compression_rate": numbers / (3 * pixels) if pixels else None,
        "bits_per_pixel": bits / pixels if coded and pixels else None,
    }
    return replace(
        manifest,
        latents=latents,
        videos=[replace(video, num_frames=video.num_frames or 0) for video in videos],
        shards=shards,
        complete=True,
        statistics=channel_statistics(sums),
        totals=totals,
    )


def _join(video: VideoEntry, piece: StoredPiece) -> VideoEntry:
    return replace(
        video,
        num_frames=(video.num_frames or 0) + sum(piece.num_frames),
        height=video.height or piece.height,
        width=video.width or piece.width,
        damage=video.damage or piece.damage,
    )
