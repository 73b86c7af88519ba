"""A small results folder as `vidtwin test` leaves it, with everything that a report has to show."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vidtwin.benchmark import protocol, rows

HOSTILE_MODEL = '<img src=x onerror=alert(1)> & "co"'
HOSTILE_CLIP = "</script><script>alert(2)</script>.avi"
FRAMES, SIDE = 6, 8
WHY_NO_LPIPS = "no weights of VGG-16 in the cache"

# name: (kind, compression rate, mean PSNR)
MODELS: dict[str, tuple[str, float, float]] = {
    "VidTwin": ("trained", 0.002046, 28.0),
    "MAGVIT-v2": ("trained", 0.0065, 26.0),
    HOSTILE_MODEL: ("trained", 0.0685, 31.0),
    "CMD": ("untrained", 0.0685, 33.0),
    "temporal_mean": ("reference", 0.0625, 20.0),
    "mean_colour": ("reference", 0.0000012, 13.0),
}
FAILED = "iVideoGPT"


def settings(**data: Any) -> dict[str, Any]:
    """A protocol on six-frame clips of UCF101; `data` changes the data module's description."""
    of_data = {
        "data": "UCF101",
        "split": "test",
        "num_frames": FRAMES,
        "resolution": SIDE,
        "fps": 8.0,
        "clip": "one per video, from its middle",
        "tail": "drop",
        "clips_sha256": "ab" * 32,
    }
    chosen = protocol.ProtocolSettings(posterior="mode")
    return chosen.resolve(of_data | data, "32-true", skipped={"v_broken_g01_c01.avi": "no frame decodes"})


def write_results(
    folder: Path,
    models: dict[str, tuple[str, float, float]] = MODELS,
    *,
    num_clips: int = 7,
    failed: bool = True,
    players: bool = True,
    rfvd: bool = True,
    lpips: bool = False,
) -> Path:
    """Write a results folder.

    Args:
        folder: Its path; made if absent.
        models: By name its kind, rate and mean PSNR.
        num_clips: Of each model but the first, which has no numbers of the last clip; its last name holds markup.
        failed: Whether one more row failed.
        players: Whether worst and median clip of the first model are kept as strips.
        rfvd: Whether rFVD was measured, on too few clips to be ranked.
        lpips: Whether LPIPS was measured.
    """
    described = settings()
    digest = protocol.write(described, folder)
    draw = random.Random(0)
    names = [f"v_Archery_g{index:05d}_c01.avi" for index in range(num_clips - 1)] + [HOSTILE_CLIP]
    hardness = {name: draw.gauss(0, 3) for name in names}
    for index, (name, (kind, rate, psnr)) in enumerate(models.items()):
        kept = names[:-1] if index == 0 and len(models) > 1 else names
        clips = [_clip(name, clip, psnr + hardness[clip] + draw.gauss(0, 0.7), lpips) for clip in kept]
        rows.write_row(folder, _row(name, kind, rate, clips, described, digest, rfvd), clips)
    if failed:
        _write_failed(folder, described, digest)
    if players:
        write_players(folder, [name for name, (kind, _, _) in models.items() if kind == "trained"], names)
    return folder


def write_players(folder: Path, models: list[str], names: list[str]) -> None:
    """Strips in which the grey of a frame is 40 times its number, and 20, so that a test sees which frame is shown."""
    clips = []
    for index, why in enumerate(["worst", "median"]):
        views: list[dict[str, Any]] = [{"title": "input", "model": None, "kind": "input"}]
        for model in models:
            views.append({"title": model, "model": model, "kind": "reconstruction"})
            views.append({"title": f"{model} error", "model": model, "kind": "error"})
        if "VidTwin" in models:
            views += [
                {"title": f"VidTwin {latent} only", "model": "VidTwin", "kind": "partial"}
                for latent in ("structure", "dynamics")
            ]
        for number, view in enumerate(views):
            view["file"] = f"players/{index}/view{number}.webp"
            path = folder / view["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            frames = np.arange(FRAMES, dtype=np.uint8).repeat(SIDE)[:, None, None] * 40 + 20
            Image.fromarray(np.broadcast_to(frames, (FRAMES * SIDE, SIDE, 3)).copy()).save(path, lossless=True)
        clips.append({"id": str(index), "name": names[index], "start_frame": 12, "why": why, "views": views})
    text = json.dumps({"fps": 8.0, "num_frames": FRAMES, "size": SIDE, "clips": clips})
    (folder / "players" / "players.json").write_text(text, encoding="utf-8")


def _clip(model: str, name: str, psnr: float, lpips: bool) -> rows.Clip:
    mse = 10 ** (-psnr / 10)
    clip: rows.Clip = {"model": model, "name": name, "start_frame": 12, "num_frames": FRAMES, "mse": mse, "psnr": psnr}
    clip |= {"ssim": 1 / (1 + math.exp(-(psnr - 20) / 6)), "flicker": mse / 2}
    return clip | ({"lpips": 0.9 * math.exp(-psnr / 20)} if lpips else {})


def _row(
    name: str,
    kind: str,
    rate: float,
    clips: list[rows.Clip],
    described: dict[str, Any],
    digest: str,
    rfvd: bool,
) -> rows.Row:
    measured: dict[str, Any] = rows.means(clips, described)
    absent = {} if "lpips" in measured else {"lpips": WHY_NO_LPIPS}
    measured |= dict.fromkeys(absent, "unavailable")
    if rfvd:
        note = "not ranked below 401 clips"
        measured["rfvd"] = {"value": 40_000 * rate, "num_clips": len(clips), "ranked": False, "note": note}
    numbers = round(rate * 3 * FRAMES * SIDE**2 * 1000)
    per_second = {"median": 12.5, "min": 11.0, "max": 13.0}
    trained = kind == "trained"
    return {
        "schema_version": rows.SCHEMA_VERSION,
        "name": name,
        "kind": kind,
        "error": None,
        "model": {"class_path": "vidtwin.models.vidtwin.VidTwin", "init_args": {"depth": 2}},
        "checkpoint": f"runs/{kind}/last.ckpt" if trained else None,
        "fingerprint": "0f" * 8 if trained else None,
        "weights": "running average",
        "windows": {"num_frames": 3, "windows": 2} if name == "MAGVIT-v2" else None,
        "parameters": 1_506_392,
        "latents": {
            "structure": {"shape": [4, 8, 4, 4], "numbers": 512, "rate": rate * 0.75, "bits": None},
            "dynamics": {"shape": [numbers, 8], "numbers": numbers, "rate": rate * 0.25, "bits": None},
        },
        "compression_rate": rate,
        "bits_per_pixel": 0.0119 if name == "MAGVIT-v2" else None,
        "claimed": {"rate": 0.0015, "agrees": False} if name == "VidTwin" else None,
        "codebooks": {"codes": {"size": 512, "dead_codes": 12, "perplexity": 301.5}} if name == "MAGVIT-v2" else {},
        "metrics": measured,
        "unavailable": absent,
        "num_clips": len(clips),
        "failed_clips": [{"name": HOSTILE_CLIP, "start_frame": 12, "reason": "decode gave NaN"}]
        if name == "VidTwin"
        else [],
        "skipped": {"v_broken_g01_c01.avi": "no frame decodes"},
        "cost": {
            "flops": {"encode": 12_300_000_000, "decode": 24_600_000_000},
            "encode": {"clips_per_second": per_second, "peak_memory_bytes": 123_456_789},
            "decode": {"clips_per_second": per_second, "peak_memory_bytes": 234_567_890},
            "batch_size": 1,
            "warmup": 2,
            "repeats": 5,
            "memory_counter": "tensors",
            "device": "cpu (one core)",
        }
        if trained
        else {"error": "out of memory"},
        "downstream": {
            "tokens": 184,
            "tokens_by_latent": {"structure": 128, "dynamics": 56},
            "parameters": 18_914_304,
            "parameters_ffn_norm_only": 12_610_560,
            "embedding_parameters": 65_000,
            "flops_forward": 7_000_000_000,
            "flops_training_step": 21_000_000_000,
            "seconds_per_step": {"median": 0.12, "min": 0.11, "max": 0.14},
            "peak_memory_bytes": 345_678_901,
            "memory_counter": "tensors",
            "device": "cpu (one core)",
        }
        if trained
        else None,
        "protocol": described,
        "protocol_hash": digest,
        "device": "cpu (one core)",
        "versions": {"vidtwin": "0.1.0", "torch": "2.11.0"},
    }


def _write_failed(folder: Path, described: dict[str, Any], digest: str) -> None:
    row = {
        "schema_version": rows.SCHEMA_VERSION,
        "name": FAILED,
        "kind": "failed",
        "error": "Expected a checkpoint of iVideoGPT, got one of <CMD>; give its own.",
        "model": {"class_path": "vidtwin.baselines.ivideogpt.IVideoGPT", "init_args": {}},
        "protocol": described,
        "protocol_hash": digest,
        "device": "cpu (one core)",
        "versions": {"vidtwin": "0.1.0", "torch": "2.11.0"},
    }
    path = folder / "rows" / FAILED / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(row), encoding="utf-8")
