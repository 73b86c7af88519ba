"""Run by test_encode.py: a folder of videos encoded and decoded by two processes, of which Lightning starts the second.

python two_ranks_encode.py VIDEOS CHECKPOINT OUT
"""

import os
import sys
import time
from pathlib import Path

import torch

from vidtwin.cli import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    videos, checkpoint, out = sys.argv[1:]
    shared = ["--accelerator", "cpu", "--devices", "2", "--progress", "false", "--trust_module", "sweeping"]
    encode = ["encode", videos, "--out", f"{out}/latents", "--ckpt_path", checkpoint, "--clips_per_shard", "3"]
    codes = [main([*encode, *shared]), main([*encode, *shared])]
    if os.environ["LOCAL_RANK"] == "1":
        time.sleep(1)  # the first process writes nothing before the second has looked at what exists
    codes.append(main(["decode", f"{out}/latents", "--out", f"{out}/two", *shared]))
    if codes != [0, 0, 0]:  # the other process may wait for this one
        sys.exit(f"exit codes {codes}")
    refused = main(["encode", videos, "--out", f"{out}/latents", "--ckpt_path", checkpoint, *shared])
    Path(out, f"rank{os.environ['LOCAL_RANK']}.txt").write_text(str([*codes, refused]))
    torch.distributed.barrier()
