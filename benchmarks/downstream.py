"""Measure the DiT of the paper's appendix C.2 on the latents of every full-size model, 16 frames of 224 px.

    python benchmarks/downstream.py                   tokens and FLOPs, without running the DiT
    python benchmarks/downstream.py --device cuda     also peak memory and time of a training step

FLOPs count a multiply-add as two; a training step is a forward and a backward pass on one clip. The DiT's six layers
have 18,914,304 parameters; embedding parameters map a model's latents to tokens and back.
"""

import argparse

import torch
from experiments import as_markdown
from full_size import CLIP, MODELS, spec

from vidtwin.benchmark import cost, downstream
from vidtwin.storage import checkpoints

HEADER = ["Model", "Latents", "Tokens", "Embedding parameters", "Forward", "Training step"]
MEASURED = ["Peak memory", "Seconds a step"]


def latent_shapes(name: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return checkpoints.build(spec(name)).latent_shapes(CLIP)


def count(name: str, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    with torch.device("meta"):
        model = downstream.LatentDiT(shapes)
    tokens = " + ".join(f"{number:,}" for number in model.tokens.counts.values())
    total = sum(model.tokens.counts.values())
    flops = downstream.flops(model)
    return [
        name,
        ", ".join(f"{key} {'x'.join(map(str, shape))}" for key, shape in shapes.items()),
        f"{total:,}" if len(shapes) == 1 else f"{tokens} = {total:,}",
        f"{model.num_parameters('embeddings'):,}",
        *(f"{flops[key] / 1e9:,.1f} GFLOP" for key in ("flops_forward", "flops_training_step")),
    ]


def measure(shapes: dict[str, tuple[int, ...]], device: str, repeats: int) -> list[str]:
    found = downstream.measure(shapes, device, repeats=repeats)
    times = found["seconds_per_step"]
    least, most = times["min"], times["max"]
    return [f"{found['peak_memory_bytes'] / 1e6:,.0f} MB", f"{times['median']:.3g} ({least:.3g} to {most:.3g})"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="measure training steps on this device")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        shapes = latent_shapes(name)
        rows.append(count(name, shapes))
        if arguments.device:
            rows[-1] += measure(shapes, arguments.device, arguments.repeats)
            print(f"{name}: {rows[-1][-1]} s", flush=True)
    print(as_markdown(HEADER + (MEASURED if arguments.device else []), rows))
    if arguments.device:
        print(f"\nOn {cost.device_name(arguments.device)}, {torch.get_num_threads()} threads on the host.")


if __name__ == "__main__":
    main()
