"""Measure the targets of training and encoding on one GPU, within 8 minutes on an H200 (docs/performance.md).

    python benchmarks/gpu.py [--data path/to/UCF-101]
    python benchmarks/gpu.py --tiny        the same code with a tiny model on any machine; its figures mean nothing

Prints each figure beside its target, and writes the rows of benchmarks/speed.py to --out. Shares are of what the GPU
reaches in products of 4096 × 4096 matrices in bf16 in the same run; those of the nominal peak stand beside. A line
whose compilation fails is measured without it, and stderr says why.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from experiments import as_markdown
from speed import Row, parse, run

from vidtwin.files import write_text

TINY = ["--resolution", "32", "--depth", "1", "--side", "256", "--repeats", "1", "--warmup", "1"]
# Name, options of benchmarks/speed.py, and (part, key of its row, target) with "at least" or "at most" by its sign.
RUNS: list[tuple[str, list[str], list[tuple[str, str, float]]]] = [
    (
        "base, eager",
        ["--batch", "8", "--parts", "encode", "decode", "step, GAN"],
        [("encode", "clips_per_second", 450)],
    ),
    (
        "base, compiled",
        ["--batch", "8", "--compile", "--parts", "encode", "step", "step, GAN", "loader"],
        [
            ("encode", "clips_per_second", 450),
            ("step", "share", 0.50),
            ("step, GAN", "share", 0.45),
            ("step, GAN", "clips_per_second", 45),
            ("loader + step", "waiting", -0.02),
        ],
    ),
    (
        "large, compiled",
        ["--config", "configs/vidtwin_large.yaml", "--batch", "6", "--compile", "--parts", "step"],
        [("step", "share", 0.55)],
    ),
    (
        "large, checkpointing",
        ["--config", "configs/vidtwin_large.yaml", "--batch", "6", "--checkpointing", "true", "--parts", "step, GAN"],
        [("step, GAN", "peak_bytes", -80e9)],
    ),
]


HEADER = ["run", "part", "figure", "measured", "target", "of nominal", ""]
NOMINAL = 989e12  # FLOP/s of an H100 or H200 in bf16, without sparsity


def judge(name: str, rows: list[Row], targets: list[tuple[str, str, float]], tiny: bool = False) -> Iterator[list[str]]:
    """Yield a line per target: figure, target, share of the nominal peak, met or not; a tiny model meets none."""
    for part, key, target in targets:
        row = next((row for row in rows if row["part"] == part), {})
        found: Any = row.get(key)
        bound = f"at {'least' if target > 0 else 'most'} {abs(target):.3g}"
        met = "not measured" if found is None else "met" if (found - abs(target)) * target >= 0 else "missed"
        nominal = f"{row['flops'] / row['seconds']['median'] / NOMINAL:.0%}" if "seconds" in row else ""
        if tiny and found is not None:
            nominal, met = "", "a trial"
        yield [name, part, key, "" if found is None else f"{found:.3g}", bound, nominal, met]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder in UCF-101's layout, for the loader")
    parser.add_argument("--tiny", action="store_true", help="a trial of the script, on any device")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no run after this time")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"))
    args = parser.parse_args(argv)
    if not (torch.cuda.is_available() or args.tiny):
        raise SystemExit("Expected a GPU, got none; --tiny tries the script on a CPU.")
    began = time.monotonic()
    content: dict[str, Any] = {"tiny": args.tiny}
    lines: list[list[str]] = []
    left_out: list[str] = []
    for name, options, targets in RUNS:
        if time.monotonic() - began > 60 * args.minutes:
            lines += [[name, part, key, "", "", "", "not measured: out of time"] for part, key, _ in targets]
            continue
        own = parse(["--precisions", "bf16", *(["--data", args.data] if args.data else []), *options])
        if args.tiny:
            own = parse(["--precisions", "bf16", *(["--data", args.data] if args.data else []), *options, *TINY])
        try:
            result = run(own)
        except RuntimeError as error:  # out of memory: the others still count
            lines += [[name, part, key, "", "", "", " ".join(str(error).split())[:60]] for part, key, _ in targets]
            continue
        left_out += [f"Left out of {name}: {line}.\n" for line in result.pop("left_out", [])]
        runs = content.get("runs", {}) | {name: result.pop("rows")}
        content = {"tiny": args.tiny, **result, "runs": runs}
        lines += judge(name, runs[name], targets, args.tiny)
        write_text(args.out, json.dumps(content, indent=1) + "\n")
    if args.tiny:
        sys.stdout.write("A trial of the script with tiny models: the figures mean nothing.\n")
    sys.stdout.write(f"{content.get('device')}, commit {content.get('commit')}\n\n")
    sys.stdout.write(as_markdown(HEADER, lines) + "\n" + "".join(left_out) + f"-> {args.out}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
