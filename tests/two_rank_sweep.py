"""Sweeps on two processes; run by test_sweep_on_two_ranks.py."""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from sweeping import Coded, NumberedData, checkpoint, feature_network, sweep

from vidtwin.benchmark.options import RateDistortion
from vidtwin.benchmark.protocol import ProtocolSettings
from vidtwin.benchmark.sweep import FVD, Entry
from vidtwin.errors import UserError
from vidtwin.metrics.fvd import file_sha256


def prepare(folder: Path) -> None:
    """Write checkpoints of models, some of which fail, and the network of rFVD."""
    checkpoint(folder / "good.ckpt")
    checkpoint(folder / "picky.ckpt", raise_on=[0, 1, 2])
    checkpoint(folder / "codes.ckpt", model=Coded(raise_on=[7]))
    checkpoint(folder / "broken.ckpt", raise_on=[-1])
    feature_network(folder / "i3d.pt")


def run(folder: Path, name: str, **arguments: Any) -> int:
    """Run a sweep over the prepared models on eleven clips, one of them unreadable → exit code."""
    names = ["good", "picky", "codes", "broken", "absent"]
    entries = [Entry(each, checkpoint=str(folder / f"{each}.ckpt")) for each in names]
    fvd = FVD(str(folder / "i3d.pt"), file_sha256(folder / "i3d.pt"))
    data = NumberedData(11, num_frames=10, unreadable=[4])
    return sweep(
        folder / name, entries, data, fvd=fvd, players=1, analysis=True, **{"references": [], **arguments}
    ).run()


def run_curves(folder: Path, name: str, **arguments: Any) -> int:
    """Run a sweep of coded latents, noise and a codec → exit code."""
    entries = [Entry(each, checkpoint=str(folder / f"{each}.ckpt")) for each in ("good", "picky")]
    entries.append(Entry("jpeg", model="vidtwin.baselines.codecs.JPEG"))
    chosen = RateDistortion(bits=[3], noise=[0.5], clips=7)
    return sweep(folder / name, entries, NumberedData(5), rate_distortion=chosen, references=[], **arguments).run()


def main(folder: Path) -> None:
    """Run the sweeps on this rank and write its exit codes and its refusal."""
    found: dict[str, Any] = {"two": run(folder, "two", devices=2)}
    found["resumed"] = run(folder, "resumed", devices=2)
    found["curves"] = run_curves(folder, "curves_two", devices=2)
    try:
        run(folder, "two", devices=2, protocol=ProtocolSettings(posterior="sample", ssim="uniform7"))
    except UserError as error:
        found["refused"] = str(error)
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


def fail_alone(folder: Path) -> None:
    """Fail on the second rank, for which the first one waits."""
    if os.environ["LOCAL_RANK"] == "1":
        raise RuntimeError("the second rank fails")
    time.sleep(60)
    (folder / "waited").touch()
