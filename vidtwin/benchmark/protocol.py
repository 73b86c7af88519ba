"""The protocol of a measurement, and its hash.

Two papers' PSNR of one model differ by how it was computed. The settings that all rows of a comparison share are one
object, whose hash is in every row; rows of different hashes are never compared. A row's `identity` has the settings of
its own too: checkpoint, metrics, batch size, kind of device, seed, windows.
"""

import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from vidtwin.errors import UserError, few
from vidtwin.files import parse_json, write_text

PEER = "peer: "
"""Beginning of departures that are not hashed: they describe the peer's evaluation, and decide no number of ours."""

_TORCHVISION = "bilinear, antialiased (torchvision)"


@dataclass(frozen=True)
class _Remark:
    """A step of a peer that no setting here repeats, and the values of settings with which it matters.

    It matters with all of `only`, but not with all of `unless`.
    """

    text: str
    only: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    unless: dict[str, Any] = field(default_factory=dict)

    def holds(self, settings: dict[str, Any]) -> bool:
        spared = bool(self.unless) and all(settings.get(key) == value for key, value in self.unless.items())
        return not spared and all(settings.get(key) in values for key, values in self.only.items())


# Differences in dB, ours minus the peer's, are those that benchmarks/peers.py prints: of means over 2x2 and 4x4 pixels.
_AREA = "area (swscale): antialiased shrinking, bilinear enlarging"
_RESIZING = {"resize": (_TORCHVISION, _AREA)}  # rendered clips are not resized
_RESIZED = (
    _Remark("resized pictures stay floats there, and have 8 bits here (-0.02 to +0.00 dB of PSNR)", _RESIZING),
    _Remark(
        "pixels that are not square stay so there, and are shown square here (+0.05 to +0.82 dB of PSNR)", _RESIZING
    ),
)
_WHOLE = {"num_frames": "all of a video"}
_NATIVE = {"resolution": "native"}
_UNPUBLISHED_RFVD = _Remark("how rFVD was computed is not published")
_EFFECTS = {
    ("resize", _TORCHVISION, _AREA): "-1.15 to +0.22 dB of PSNR",
    ("tail", "none", "drop"): "frames at the end that fill no clip are left out",
    ("tail", "none", "pad"): "the last clip repeats its last frame",
    ("short_videos", "none", "skip"): "videos that are shorter than a clip are left out",
    ("short_videos", "none", "loop"): "videos that are shorter than a clip start again",
    ("short_videos", "none", "pad"): "videos that are shorter than a clip repeat their last frame",
    ("precision", "bf16-true", "32-true"): "the rounding of clip and reconstruction alone: +0.00 to +0.01 dB of PSNR",
}
# The evaluation of each peer. `data` are its settings of the data module, and `peer` others that are compared to those
# chosen: differences are named, not forced.
PRESETS: dict[str, dict[str, Any]] = {
    # VidTok's evaluation, which VidTwin's authors use with a mean over clips, at the rate of their README.
    "vidtwin": {
        "compared": "floats",
        "psnr": "frame",
        "psnr_epsilon": 1e-8,
        "ssim": "gaussian_pooled",
        "lpips": "vgg",
        "average": "clip",
        "fvd": "styleganv",
        "posterior": "sample",
        "data": {"num_frames": 16, "resolution": 224, "clip": "all clips of a video", "tail": "pad"},
        "peer": {
            "fps": "25 in whole steps of the source's frames",
            "resize": _TORCHVISION,
            "precision": "32-true",
        },
        "remarks": (*_RESIZED, _UNPUBLISHED_RFVD),
    },
    "vidtok": {
        "compared": "floats",
        "psnr": "frame",
        "psnr_epsilon": 1e-8,
        "ssim": "gaussian_pooled",
        "lpips": "vgg",
        "average": "frame",
        "fvd": "styleganv",
        "posterior": "sample",
        "data": {"num_frames": 17, "resolution": 256, "clip": "all clips of a video", "tail": "pad"},
        "peer": {
            "fps": "30 in whole steps of the source's frames",
            "resize": _TORCHVISION,
            "precision": "32-true",
        },
        "remarks": (*_RESIZED, _UNPUBLISHED_RFVD),
    },
    # Cosmos' TokenBench: the reconstruction's file beside the one that was read, one MSE a video.
    "tokenbench": {
        "compared": "h264",
        "psnr": "video",
        "psnr_epsilon": 0.0,
        "ssim": "uniform7",
        "lpips": "vgg",
        "average": "video",
        "fvd": "styleganv",
        "posterior": "mode",
        "data": {
            "num_frames": "all of a video",
            "resolution": "native",
            "fps": None,
            "crop": "none",
            "clip": "all clips of a video",
        },
        "peer": {"tail": "none", "short_videos": "none", "precision": "bf16-true"},
        "remarks": (
            _Remark(
                "a file is of a whole video of up to 1080p there, and of a clip here",
                {"compared": ("h264",)},
                _WHOLE | _NATIVE,
            ),
            _Remark("pixels that are not square stay so there, and are shown square here", {"resolution": ("native",)}),
            _Remark(
                "Cosmos takes 17 frames of a video at a time (here an entry with `windows: true` takes its model's own "
                "number) and pads the last ones at both ends, which are padded at one end here",
                {"num_frames": ("all of a video",)},
            ),
            _Remark("rFVD is of whole videos of up to 300 frames there, and of clips here", unless=_WHOLE),
            _Remark(
                "rFVD is of a video's first 300 frames there, and of all here", {"num_frames": ("all of a video",)}
            ),
            _Remark("equal videos have 186.6 dB there, and 100 here", {"psnr_epsilon": (0.0,)}),
        ),
    },
    # Open-Sora-Plan's evaluation of WF-VAE, which decodes a sample. Its mean over batches of equal size is that over
    # clips.
    "wfvae": {
        "compared": "mp4v",
        "psnr": "frame",
        "psnr_epsilon": 0.0,
        "ssim": "gaussian",
        "lpips": "alex_spatial",
        "average": "clip",
        "fvd": "styleganv",
        "posterior": "sample",
        "data": {
            "num_frames": 33,
            "resolution": 256,
            "fps": None,
            "clip": "one per video, from its first frame",
            "crop": "largest centre square",
        },
        "peer": {"resize": _TORCHVISION, "precision": "bf16-true"},
        "remarks": (
            *_RESIZED,
            _Remark(
                "both sides get 8 bits by truncation there, and by rounding here (-0.05 to +0.04 dB of PSNR)",
                {"compared": ("8-bit", "mp4v")},
            ),
            _Remark(
                "without --crop_size whole pictures are reconstructed and then cropped there, and clips are cropped "
                "before here (-0.17 to +0.39 dB of PSNR)",
                {"crop": ("largest centre square",)},
            ),
            _Remark("rFVD is the mean of those of batches there, and one of all clips here"),
        ),
    },
}
# How the pictures of `compared` become files: numbers of other files are others. These sentences, and the lines of
# `departs` that do not begin with PEER, are hashed as they stand: another word makes another protocol.
_FILES = {
    "mp4v": "both sides: OpenCV's MPEG-4 part 2, 1.5 bits per pixel, quantizers from 3, a keyframe every 12 frames",
    "h264": "the reconstruction, beside the clip as it was read: x264 medium, quantizer 20, above 640x480 pixels 28",
}


@dataclass(frozen=True)
class ProtocolSettings:
    """Settings of the comparison. A null is as in the preset; another value stands in the protocol's name.

    Args:
        preset: The evaluation of vidtwin, vidtok, tokenbench (Cosmos) or wfvae (Open-Sora-Plan).
        compared: The compared pictures: clamped floats, both sides rounded to 8 bits, both sides written as an mp4v
            file and read back, or the reconstruction as an h264 file beside the clip as it was read.
        psnr: The range of one MSE: a frame, a clip or a video (which needs average: video).
        psnr_epsilon: Added to the MSE of values in [0, 1]: 1e-8 caps PSNR at 80 dB; without one it ends at 100 dB.
        ssim: Gaussian 11x11 window after pooling large frames, Gaussian without pooling, or uniform 7x7.
        lpips: Network of LPIPS; alex_spatial is the mean of its map.
        average: How clips are weighted in a mean: each once, by its frames, or the videos once each.
        fvd: Convention of the I3D network and its preprocessing.
        posterior: The decoded latents: the posterior's mode or a sample (seeded by the clips, the same in each run).
        weights: The running average of a checkpoint that has one (auto), the weights of its last step (last), or the
            average alone (average), which a checkpoint without one then fails.
    """

    preset: Literal["vidtwin", "vidtok", "tokenbench", "wfvae"] = "vidtwin"
    compared: Literal["floats", "8-bit", "mp4v", "h264"] | None = None
    psnr: Literal["frame", "clip", "video"] | None = None
    psnr_epsilon: float | None = None
    ssim: Literal["gaussian_pooled", "gaussian", "uniform7"] | None = None
    lpips: Literal["vgg", "alex", "alex_spatial"] | None = None
    average: Literal["clip", "frame", "video"] | None = None
    fvd: Literal["styleganv", "videogpt", "internal"] | None = None
    posterior: Literal["mode", "sample"] | None = None
    weights: Literal["auto", "last", "average"] = "auto"

    def resolve(
        self,
        data: dict[str, Any],
        precision: str,
        fvd_sha256: str | None = None,
        dataset: str | None = None,
        skipped: dict[str, str] | None = None,
        cvvdp: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Build the whole protocol, the content of `protocol.json`.

        Args:
            data: The data module's description of its test clips.
            precision: Of the models.
            fvd_sha256: Digest of the I3D network; None without one.
            dataset: Name of the data set in papers (MCL-JCV), used to look up published numbers.
            skipped: Videos without a usable clip, with the reason.
            cvvdp: The display of ColorVideoVDP (`vidtwin.metrics.cvvdp.describe_display`); None if it isn't measured.
        """
        if self.preset not in PRESETS:
            raise UserError(f"Expected protocol.preset to be one of {', '.join(PRESETS)}, got {self.preset!r}.")
        preset = PRESETS[self.preset]
        changed = {
            each.name: value
            for each in fields(self)
            if each.name in preset and (value := getattr(self, each.name)) not in (None, preset[each.name])
        }
        chosen = {key: value for key, value in preset.items() if key != "data"} | changed
        if chosen["psnr"] == "video" and chosen["average"] != "video":
            raise UserError(f"Expected protocol.average: video for protocol.psnr: video, got {chosen['average']}.")
        ours = chosen | data | {"precision": precision}
        departs = [
            f"{key} {data.get(key)} for {value}" for key, value in preset["data"].items() if data.get(key) != value
        ]
        remarks = [
            _describe_step(key, value, ours.get(key))
            for key, value in preset["peer"].items()
            if ours.get(key) not in (value, "none")  # rendered clips, of which nothing is resized
        ]
        remarks += [remark.text for remark in preset["remarks"] if remark.holds(ours)]
        if chosen["psnr_epsilon"] < 0:
            raise UserError(f"Expected protocol.psnr_epsilon of at least 0, got {chosen['psnr_epsilon']}.")
        return {
            "name": ", ".join([self.preset, *(f"{key} {value}" for key, value in changed.items())]),
            "dataset": dataset,
            "value_range": [0.0, 1.0],
            "compared": chosen["compared"],
            **({"files": _FILES[chosen["compared"]]} if chosen["compared"] in _FILES else {}),
            "psnr": chosen["psnr"],
            "psnr_epsilon": float(chosen["psnr_epsilon"]),
            "ssim": chosen["ssim"],
            "lpips": {"net": chosen["lpips"], "version": "0.1"},
            "average": chosen["average"],
            "fvd": {"convention": chosen["fvd"], "sha256": fvd_sha256},
            **({"cvvdp": cvvdp} if cvvdp else {}),
            "posterior": chosen["posterior"],
            "weights": self.weights,
            "precision": precision,
            "data": data,
            "skipped": dict(sorted((skipped or {}).items())),
            "departs": [*departs, *(PEER + remark for remark in remarks)] if data else [],
        }


def _describe_step(key: str, peers: Any, ours: Any) -> str:
    effect = _EFFECTS.get((key, peers, ours))
    return f"{key} {peers}, not {ours}" + (f" ({effect})" if effect else "")


def protocol_hash(protocol: dict[str, Any]) -> str:
    """Compute the first 16 digits of the SHA-256 of the protocol as sorted, compact JSON without `peer:` lines."""
    text = json.dumps(_drop_remarks(protocol), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _drop_remarks(protocol: dict[str, Any]) -> dict[str, Any]:
    departs = protocol.get("departs")
    if not isinstance(departs, list):
        return protocol
    return protocol | {"departs": [line for line in departs if not str(line).startswith(PEER)]}


def flat(protocol: dict[str, Any]) -> dict[str, Any]:
    """Flatten nested dictionaries; keys are joined by dots."""
    found: dict[str, Any] = {}
    for key, value in protocol.items():
        if isinstance(value, dict) and value:
            found |= {f"{key}.{inner}": deeper for inner, deeper in flat(value).items()}
        else:
            found[key] = value
    return found


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """List the differences of two protocols: `data.fps 8.0 for 25.0`."""
    first, second = flat(_drop_remarks(ours)), flat(_drop_remarks(theirs))
    return [
        f"{key} {first.get(key)} for {second.get(key)}"
        for key in sorted({*first, *second})
        if first.get(key) != second.get(key)
    ]


def write(protocol: dict[str, Any], folder: Path, videos: dict[str, str] | None = None) -> str:
    """Write `protocol.json` and `videos.json` into a results folder, return the protocol's hash.

    Args:
        protocol: As `ProtocolSettings.resolve` makes it.
        folder: Results folder.
        videos: SHA-256 of the content of each test video, by name; of them the protocol has one digest.

    Raises:
        UserError: There are rows of another protocol, or of videos that have changed.
    """
    path, listing = folder / "protocol.json", folder / "videos.json"
    digest = protocol_hash(protocol)
    text = json.dumps(protocol, indent=2, sort_keys=True) + "\n"
    if path.exists():
        try:
            found = parse_json(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError(f"it holds a {type(found).__name__}")
        except ValueError as error:
            raise UserError(
                f"Expected JSON in {path}, got a file that is cut off or damaged ({error}); remove it and run again."
            ) from error
        if protocol_hash(found) == digest:
            if found != protocol:  # remarks of another version
                write_text(path, text)
            return digest
        if any(folder.glob("rows/*/*")):  # before anything is measured it may be replaced
            changed = _changed_videos(videos or {}, listing)
            remark = f"; the content of {few(changed)} has changed" if changed else ""
            raise UserError(
                f"Expected results of protocol {digest} in {folder}, got those of {protocol_hash(found)} "
                f"(they differ in {', '.join(differences(protocol, found))}{remark}); choose another --results_dir."
            )
    write_text(listing, json.dumps(videos or {}, indent=1, sort_keys=True) + "\n")
    write_text(path, text)
    return digest


def _changed_videos(videos: dict[str, str], listing: Path) -> list[str]:
    """List the videos whose content is not the listed one; none if the list is missing or damaged."""
    try:
        listed = parse_json(listing.read_text(encoding="utf-8"))
        return sorted(name for name, digest in videos.items() if listed.get(name, digest) != digest)
    except (OSError, ValueError, AttributeError):
        return []
