"""The protocol of a measurement, and its hash.

Two papers' PSNR of one model differ by how it was computed. The settings that all rows of a comparison share are one
object, whose hash is in every row; rows of different hashes are never compared. A row's `identity` has the settings of
its own too: checkpoint, metrics, batch size, kind of device, seed, windows.
"""

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from vidtwin.errors import UserError, few
from vidtwin.files import write_text

PEER = "peer: "
"""Beginning of departures that are not hashed: they describe the peer's evaluation, and decide no number of ours."""

_TORCHVISION = "bilinear, antialiased (torchvision)"
# What no setting changes of evaluations that resize clips. The differences in brackets are those of the PSNR of real
# videos averaged over 2x2 and 4x4 pixels, at 18 to 39 dB.
_RESIZED = (
    "resized pictures stay floats there, and have 8 bits here (below 0.04 dB of PSNR)",
    "pixels that are not square stay so there, and are shown square here",
)
_EFFECTS = {"resize": "-1.4 to +0.6 dB of PSNR"}
# The evaluation of each peer. `data` are its settings of the data module, and `peer` others that are compared to those
# chosen: differences are named, not forced. `remarks` hold whatever is chosen.
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
        "remarks": (*_RESIZED, "how rFVD was computed is not published"),
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
        "remarks": (*_RESIZED, "how rFVD was computed is not published"),
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
        "peer": {"precision": "bf16-true"},
        "remarks": (
            "a file is of a whole video of up to 1080p there, and of a square clip here",
            "rFVD is of whole videos of up to 300 frames there, and of clips here",
            "equal videos have 186.6 dB there, and 100 here",
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
            "both sides get 8 bits by truncation there, and by rounding here (below 0.05 dB of PSNR)",
            "rFVD is the mean of those of batches there, and one of all clips here",
        ),
    },
}
# How the pictures of `compared` become files: numbers of other files are others.
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
    ) -> dict[str, Any]:
        """Build the whole protocol, the content of `protocol.json`.

        Args:
            data: The data module's description of its test clips.
            precision: Of the models.
            fvd_sha256: Digest of the I3D network; None without one.
            dataset: Name of the data set in papers (MCL-JCV), used to look up published numbers.
            skipped: Videos without a usable clip, with the reason.
        """
        if self.preset not in PRESETS:
            raise UserError(f"Expected protocol.preset to be one of {', '.join(PRESETS)}, got {self.preset!r}.")
        preset = PRESETS[self.preset]
        changed = {
            field.name: value
            for field in fields(self)
            if field.name in preset and (value := getattr(self, field.name)) not in (None, preset[field.name])
        }
        chosen = {key: value for key, value in preset.items() if key != "data"} | changed
        if chosen["psnr"] == "video" and chosen["average"] != "video":
            raise UserError(f"Expected protocol.average: video for protocol.psnr: video, got {chosen['average']}.")
        ours = data | {"precision": precision}
        departs = [
            f"{key} {data.get(key)} for {value}" for key, value in preset["data"].items() if data.get(key) != value
        ]
        remarks = [
            f"{key} {value}, not {ours.get(key)}" + (f" ({_EFFECTS[key]})" if key in _EFFECTS else "")
            for key, value in preset["peer"].items()
            if ours.get(key) != value
        ]
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
            "posterior": chosen["posterior"],
            "weights": self.weights,
            "precision": precision,
            "data": data,
            "skipped": dict(sorted((skipped or {}).items())),
            "departs": [*departs, *(PEER + remark for remark in (*remarks, *preset["remarks"]))] if data else [],
        }


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
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"Expected JSON in {path}, got a file that is cut off or damaged ({error}); remove it and run again."
            ) from error
        if protocol_hash(found) == digest:
            return digest
        if any(folder.glob("rows/*/*")):  # before anything is measured it may be replaced
            changed = _changed_videos(videos or {}, listing)
            remark = f"; the content of {few(changed)} has changed" if changed else ""
            raise UserError(
                f"Expected results of protocol {digest} in {folder}, got those of {protocol_hash(found)} "
                f"(they differ in {', '.join(differences(protocol, found))}{remark}); choose another --results_dir."
            )
    write_text(listing, json.dumps(videos or {}, indent=1, sort_keys=True) + "\n")
    write_text(path, json.dumps(protocol, indent=2, sort_keys=True) + "\n")
    return digest


def _changed_videos(videos: dict[str, str], listing: Path) -> list[str]:
    """List the videos whose content is not the listed one; none if the list is missing or damaged."""
    try:
        listed = json.loads(listing.read_text(encoding="utf-8"))
        return sorted(name for name, digest in videos.items() if listed.get(name, digest) != digest)
    except (OSError, ValueError, AttributeError, RecursionError):
        return []
