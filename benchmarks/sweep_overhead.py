"""Profile a sweep: time of models, loading, metrics and bookkeeping, and growth of memory.

    python benchmarks/sweep_overhead.py --config configs/benchmark/demo.yaml --results_dir runs/overhead
    python benchmarks/sweep_overhead.py --seeded_backbones runs/backbones --config … --results_dir …

Takes the arguments of `vidtwin test`. Costs, players, table and report are omitted: they do not grow with the clips.
With --seeded_backbones LPIPS runs with random weights, written to that folder: its values are meaningless, its time is
that of the real networks.
"""

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torchvision

from vidtwin.benchmark.measurer import Measurer
from vidtwin.benchmark.runner import Runner
from vidtwin.benchmark.sweep import Sweep
from vidtwin.cli import benchmark


def write_backbones(folder: Path) -> list[str]:
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
    """Seconds by name; time in a nested part counts for the inner part only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.inner = 0.0

    def wrap(self, owner: type, method: str, name: str) -> None:
        """Time a method of a class."""
        function = getattr(owner, method)

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

        setattr(owner, method, timed)


def main() -> None:
    argv = sys.argv[1:]
    if argv and argv[0] == "--seeded_backbones":
        argv = [*argv[2:], *write_backbones(Path(argv[1]))]
    clock, memory = Clock(), []
    measure = Measurer.measure

    def measure_chunk(self: Measurer, *args: Any) -> dict[str, Any]:
        part = measure(self, *args)
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return part

    Measurer.measure = measure_chunk  # type: ignore[method-assign]
    clock.wrap(Measurer, "reconstruct", "model")
    clock.wrap(Measurer, "build", "building and loading")
    clock.wrap(Measurer, "measure", "metrics and bookkeeping")
    clock.wrap(Runner, "measure_row", "clips and writing")
    measure_row = Runner.measure_row

    def report_row(self: Runner, row: Any, bar: Any) -> None:
        clock.seconds.clear()
        memory.clear()
        measure_row(self, row, bar)
        times = clock.seconds
        if "model" in times:
            own = sum(times.values()) - times["model"] - times.get("building and loading", 0.0)
            print(
                f"{row.name}: "
                + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in times.items())
                + f"; on top of the model {own / times['model']:.1%}"
                + f"; peak memory at half the clips {memory[len(memory) // 2]:.0f} MB, at the end {memory[-1]:.0f} MB"
            )

    Runner.measure_row = report_row  # type: ignore[method-assign]
    Sweep.write_outputs = lambda self, runner: None  # type: ignore[method-assign]
    sys.exit(benchmark.run([*argv, "--cost=false", "--downstream=false", "--players=0", "--progress=false"]))


if __name__ == "__main__":
    main()
