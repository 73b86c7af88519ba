"""Kill a sweep at random moments, resume it, and compare its files with those of an undisturbed one.

    python benchmarks/kill_sweep.py --config configs/benchmark/demo.yaml --out runs/kill_sweep
    python benchmarks/kill_sweep.py --config MY.yaml --out runs/kill_sweep --times 3 -- --devices 2 --accelerator cpu

Arguments after `--` are passed to `vidtwin test`. Costs and the DiT are not measured, since they differ between runs.
SIGKILL is sent to all processes of a sweep at a moment drawn uniformly from the duration of the undisturbed one, up to
`--kills` times; then the sweep runs to its end. Compared byte for byte: protocol.json, comparison.json, table.*, each
row's clips.csv and results.json, the players. Exits with 1 if a file differs.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

COMPARED = ("protocol.json", "comparison.json", "table.*", "rows/*/clips.csv", "rows/*/results.json", "players/**/*")


def build_command(arguments: argparse.Namespace, folder: Path) -> list[str]:
    words = ["--config", arguments.config, "--results_dir", str(folder), *arguments.rest]
    words += ["--cost", "false", "--downstream", "false", "--progress", "false"]
    return [sys.executable, "-m", "vidtwin", "test", *words]


def run(words: list[str], log: Path, seconds: float | None = None) -> bool:
    """Run a command, or kill it after some seconds → whether it finished."""
    with log.open("ab") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False
    if code not in (0, 1):
        raise SystemExit(f"`{' '.join(words)}` ended with {code}; see {log}")
    return True


def read_files(folder: Path) -> dict[str, bytes]:
    paths = {path for pattern in COMPARED for path in folder.glob(pattern) if path.is_file()}
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="Config of a sweep.")
    parser.add_argument(
        "--out", required=True, type=Path, help="Folder of the sweeps' results; its content is deleted."
    )
    parser.add_argument("--times", type=int, default=10, help="Number of sweeps to kill.")
    parser.add_argument("--kills", type=int, default=2, help="Maximum number of kills per sweep.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the moments.")
    argv = sys.argv[1:]
    split = argv.index("--") if "--" in argv else len(argv)
    arguments = parser.parse_args(argv[:split])
    arguments.rest = argv[split + 1 :]
    draw = random.Random(arguments.seed)
    shutil.rmtree(arguments.out, ignore_errors=True)
    arguments.out.mkdir(parents=True)

    started = time.monotonic()
    run(build_command(arguments, arguments.out / "whole"), arguments.out / "whole.log")
    length = time.monotonic() - started
    wanted = read_files(arguments.out / "whole")
    print(f"undisturbed: {length:.1f} s, {len(wanted)} files", flush=True)

    equal = 0
    for number in range(arguments.times):
        folder, log = arguments.out / f"{number}", arguments.out / f"{number}.log"
        moments: list[float] = []
        ended = False
        while not ended and len(moments) < arguments.kills:
            moments.append(draw.uniform(0, length))
            ended = run(build_command(arguments, folder), log, moments[-1])
        parts = len(list(folder.glob("rows/*/parts/[0-9]*.json")))
        complete = len(list(folder.glob("rows/*/results.json")))
        if not ended:
            run(build_command(arguments, folder), log)
        found = read_files(folder)
        different = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
        equal += not different
        at = ", ".join(f"{moment:.1f}" for moment in (moments[:-1] if ended else moments))
        print(
            f"{number + 1}: killed after {at} s, {complete} rows and {parts} chunks were complete; "
            f"{'all files are equal' if not different else f'differ: {different}'}",
            flush=True,
        )
    print(f"{equal} of {arguments.times} are equal to the undisturbed sweep")
    return int(equal < arguments.times)


if __name__ == "__main__":
    sys.exit(main())
