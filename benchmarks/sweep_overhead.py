"""Where a sweep's time goes: models, waiting for clips, metrics and bookkeeping; and whether its memory grows.

    python benchmarks/sweep_overhead.py --config configs/benchmark/demo.yaml --results_dir runs/overhead
    python benchmarks/sweep_overhead.py --seeded_backbones runs/backbones --config … --results_dir …

Takes the arguments of `vidtwin test`. Costs, players, table and report are left out: they do not grow with the clips.
With --seeded_backbones LPIPS runs with random weights from files made in that folder: its numbers mean nothing, its
time is that of the real networks.
"""

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torchvision

from vidtwin.benchmark import rows
from vidtwin.benchmark import sweep as engine
from vidtwin.benchmark.runner import Runner
from vidtwin.cli import benchmark as sweep_command


def seeded_backbones(folder: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    options = []
    for name, build in (("vgg", torchvision.models.vgg16), ("alex", torchvision.models.alexnet)):
        path = folder / f"{name}.pth"
        if not path.exists():
            torch.save(build().features.state_dict(prefix="features."), path)
        options.append(f"{name}: {path}")
    return [f"--perceptual_backbones={{{', '.join(options)}}}"]


class Clock:
    """Sums of seconds by name; a part within another counts for the inner one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.inner = 0.0

    def around(self, name: str, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began, outside = time.perf_counter(), self.inner
            self.inner = 0.0
            result = function(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            took = time.perf_counter() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + took - self.inner
            self.inner = outside + took
            return result

        return timed


def main() -> None:
    argv = sys.argv[1:]
    if argv and argv[0] == "--seeded_backbones":
        argv = [*argv[2:], *seeded_backbones(Path(argv[1]))]
    clock, memory = Clock(), []
    runner = Runner

    forward, measure, built = runner._forward, runner._measure_chunk, runner._built
    runner._forward = clock.around("model", forward)  # type: ignore[method-assign]
    runner._built = clock.around("building and loading", built)  # type: ignore[method-assign]

    def chunk(self: Any, *args: Any) -> Any:
        part = measure(self, *args)
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return part

    runner._measure_chunk = clock.around("metrics and bookkeeping", chunk)  # type: ignore[method-assign]
    runner._measure_chunks = clock.around("clips and writing", runner._measure_chunks)  # type: ignore[method-assign]
    finish = runner._measured

    def measured(self: Any, job: Any, *args: Any) -> Any:
        clock.seconds.clear()
        memory.clear()
        error = finish(self, job, *args)
        times = dict(clock.seconds)
        work = sum(seconds for name, seconds in times.items() if name != "building and loading")
        if work:
            own = work - times.get("model", 0.0)
            half = memory[len(memory) // 2] if memory else 0.0
            print(
                f"{job.name}: "
                + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in times.items())
                + f"; on top of the model {own / times['model']:.1%}"
                + f"; peak memory at half the clips {half:.0f} MB, at the end {memory[-1]:.0f} MB"
            )
        return error

    runner._measured = measured  # type: ignore[method-assign]
    engine.Sweep._write_all = lambda self, *_: rows.read(self.folder)  # type: ignore[method-assign]
    sys.exit(sweep_command.run([*argv, "--cost=false", "--downstream=false", "--players=0", "--progress=false"]))


if __name__ == "__main__":
    main()
