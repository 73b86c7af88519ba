"""Kill a training repeatedly and check that it ends with the weights of an undisturbed one.

    python benchmarks/soak.py --kills 20 --folder /tmp/soak

Two trainings of a tiny VidTwin with a GAN, EMA, dropout and a data worker: one undisturbed, one killed at random
moments (SIGKILL or SIGTERM, at random) and restarted each time by the same command with `--resume auto`. Prints a line
per kill and compares weights, EMA, optimizers, schedules and counts bit for bit. Exits with 1 if they differ.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from vidtwin.storage import checkpoints

KEPT = ("state_dict", "optimizer_states", "lr_schedulers", "ema", "training", "global_step", "epoch")
MODEL = {
    "num_frames": 4, "resolution": 32, "patch_size": 8, "hidden_size": 32, "depth": 1, "num_heads": 2,
    "num_queries": 2, "structure_width": 8, "query_size": 16, "qformer_depth": 1, "qformer_heads": 2,
    "qformer_intermediate_size": 16, "qformer_dropout": 0.3,
}  # fmt: skip


def build_config(folder: Path, steps: int) -> dict[str, Any]:
    rate = {"class_path": "vidtwin.schedules.WarmupCosine", "init_args": {"warmup_steps": 10}}
    discriminator = {
        "class_path": "vidtwin.losses.PatchDiscriminator2d",
        "init_args": {"channels": 8, "num_layers": 1, "norm": "batch"},
    }
    loss = {"perceptual_weight": 0.0, "adversarial_start": 20, "lecam_weight": 0.1, "discriminator": discriminator}
    return {
        "model": {
            "autoencoder": {"class_path": "vidtwin.VidTwin", "init_args": MODEL},
            "loss": {"class_path": "vidtwin.losses.AutoencoderLoss", "init_args": loss},
            "scheduler": rate,
            "discriminator_scheduler": rate,
            "ema_decay": 0.99,
        },
        "data": {
            "class_path": "vidtwin.datamodules.synthetic.Synthetic",
            "init_args": {"num_frames": 4, "resolution": 32, "batch_size": 2, "num_workers": 1},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": steps,
            "val_check_interval": 150,
            "limit_val_batches": 2,
            "check_val_every_n_epoch": None,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": str(folder), "name": "run", "version": ""},
            },
        },
        "latest_checkpoint": {"every_n_steps": 25},
    }


def start(folder: Path, steps: int) -> subprocess.Popen[str]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(build_config(folder, steps)))
    command = [sys.executable, "-m", "vidtwin", "fit", "--config", str(path), "--resume", "auto"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def wait_for_start(process: subprocess.Popen[str]) -> list[str]:
    """Wait until the training logs where it resumes; read the rest of its stderr in the background."""
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if "resuming from" in line or "starting a new run" in line:
            break
    stream = process.stderr
    threading.Thread(target=lambda: lines.extend(stream), daemon=True).start()
    return lines


def find_difference(ours: Any, theirs: Any, where: str) -> str | None:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if ours.keys() != theirs.keys():
            return where
        return next((d for key in ours if (d := find_difference(ours[key], theirs[key], f"{where}.{key}"))), None)
    if isinstance(ours, list | tuple):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return next((d for i, (a, b) in pairs if (d := find_difference(a, b, f"{where}[{i}]"))), None)
    same = torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    return None if same else where


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--longest", type=float, default=8.0, help="longest time until a kill, in seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    shutil.rmtree(arguments.folder, ignore_errors=True)
    whole, parts = arguments.folder / "undisturbed", arguments.folder / "killed"

    process = start(whole, arguments.steps)
    output = wait_for_start(process)
    if process.wait() != 0:
        raise SystemExit("".join(output))
    killed = 0
    begin = time.monotonic()
    while True:
        process = start(parts, arguments.steps)
        output = wait_for_start(process)
        if killed < arguments.kills:
            delay = chance.uniform(0, arguments.longest)
            try:
                process.wait(delay)
            except subprocess.TimeoutExpired:
                number = chance.choice([signal.SIGKILL, signal.SIGTERM])
                process.send_signal(number)
                if process.wait() == 0:  # it finished just before the signal
                    break
                killed += 1
                newest = checkpoints.newest(parts / "run/checkpoints")
                at = f"the newest checkpoint is {newest.name}" if newest else "no checkpoint yet"
                ended = f"{number.name} after {delay:4.1f} s, exit code {process.returncode}"
                print(f"{killed:3d}  {ended}; {at}", flush=True)
                continue
        if process.wait() != 0:
            raise SystemExit("".join(output))
        break
    folders = [folder / "run/checkpoints/last.ckpt" for folder in (whole, parts)]
    states = [{key: checkpoints.read(path)[key] for key in KEPT} for path in folders]
    found = find_difference(*states, "checkpoint")
    print(f"{killed} kills, {arguments.steps} steps, {time.monotonic() - begin:.0f} s")
    print(f"differs in {found}" if found else f"equal bit for bit: {', '.join(KEPT)}")
    return 1 if found or killed < arguments.kills else 0


if __name__ == "__main__":
    sys.exit(main())
