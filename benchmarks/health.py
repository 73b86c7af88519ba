"""Measure signals, gradients and latents of VidTwin at full size, and its first steps of training (docs/health.md).

    python benchmarks/health.py CLIP CLIP ... --sizes base large
    python benchmarks/health.py CLIP CLIP ... --sizes base --resolution 32 --depth 2 --steps 80

Builds each size with the initial values "released", "balanced" and with configs/recipes/fast.yaml ("fast"), and prints,
in fp32 and in bf16 (autocast, as precision bf16-mixed), each cell as fp32 / bf16:

    PSNR        of the reconstruction in dB, from the posteriors' means
    difference  of the reconstruction in bf16 from that in fp32: root mean square, relative to the latter's
    share       of the variance between clips that the reconstruction keeps if only this latent varies, the other being
                its mean over the clips; the two add up to 1 if the decoder is linear
    spread      standard deviation of a latent's means over the clips, root mean square over its numbers
    noise       standard deviation of its posterior, likewise
    signal      root mean square of the features after each block, and of what each branch gives to the decoder
    gradient    norm of the gradient of each module's parameters and, by their number, root mean square per number; of
                L1 + KL of the first clip, as means over the pixels

With --steps it trains each model on all clips at once instead, in fp32, and prints PSNR and shares of these clips by
step. The PSNR of a latent is that of the reconstruction if only this latent varies.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from experiments import as_markdown
from torch import Tensor, nn

from vidtwin.clips import load_clip
from vidtwin.models.vidtwin import VidTwin

CONFIGS = Path("configs")
KL_WEIGHT = 1e-3
BY_STEP = ("PSNR", "structure: share", "dynamics: share", "structure: PSNR", "dynamics: PSNR")
Values = dict[str, float]


def read_arguments(config: str) -> dict[str, Any]:
    """Read what a config sets among the arguments of VidTwin, without its base: VidTwin-base is the default."""
    arguments: dict[str, Any] = yaml.safe_load((CONFIGS / config).read_text())["model"]["autoencoder"]["init_args"]
    return arguments


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="+", type=Path, help="videos, of which each gives its first clip at 8 fps")
    parser.add_argument("--sizes", nargs="+", default=["base"], choices=("small", "base", "large"))
    parser.add_argument("--variants", nargs="+", default=["released", "balanced", "fast"], choices=VARIANTS)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--depth", type=int, help="blocks of encoder and decoder instead of those of the size")
    parser.add_argument("--steps", type=int, default=0, help="steps of training on these clips")
    parser.add_argument("--lr", type=float, default=1.6e-4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


VARIANTS: dict[str, dict[str, Any]] = {
    "released": {"initialization": "released"},
    "balanced": {"initialization": "balanced"},
    "fast": read_arguments("recipes/fast.yaml"),
}


def build(size: str, variant: str, args: argparse.Namespace) -> VidTwin:
    """Build a size with the frames, resolution and depth of the options."""
    arguments = read_arguments(f"vidtwin_{size}.yaml") | VARIANTS[variant]
    arguments |= {"num_frames": args.frames, "resolution": args.resolution}
    if args.depth:
        arguments["depth"] = args.depth
    torch.manual_seed(args.seed)
    return VidTwin(**arguments)


def compute_size(x: Tensor) -> float:
    """Compute the root mean square of numbers."""
    return float(x.detach().float().square().mean().sqrt())


def psnr(clips: Tensor, targets: Tensor) -> float:
    """Compute the PSNR (dB) per frame on [0, 1] and average over the frames."""
    error = ((clips.clamp(-1, 1) - targets) / 2).square().mean((1, 3, 4))
    return float((-10 * torch.log10(error + 1e-8)).mean())


def list_modules(model: VidTwin) -> dict[str, list[nn.Parameter]]:
    """List the parameters of each block and of each part of the branches, in the order of the forward pass."""
    structure, dynamics = model.structure, model.dynamics
    parts: dict[str, list[nn.Module]] = {"encoder, patch embedding": [model.encoder.patch_embed]}
    for index, block in enumerate(model.encoder.transformer.blocks, 1):
        parts[f"encoder, block {index}"] = [block]
    parts["structure, Q-Former"] = [structure.qformer]
    parts["structure, encoding convolutions"] = [structure.conv_in, structure.downsample]
    parts["structure, head"] = [structure.head]
    parts["dynamics, encoding convolutions"] = [dynamics.downsample]
    parts["dynamics, head"] = [dynamics.head]
    parts["structure, decoding convolutions"] = [structure.embed, structure.upsample, structure.conv_out]
    parts["structure, to features and frames"] = [structure.to_features, structure.to_frames]
    parts["dynamics, embedding"] = [dynamics.embed]
    parts["dynamics, up-sampling"] = [dynamics.upsample]
    for index, block in enumerate(model.decoder.transformer.blocks, 1):
        parts[f"decoder, block {index}"] = [block]
    parts["decoder, last layer"] = [model.decoder.linear]
    listed = {name: [p for module in modules for p in module.parameters()] for name, modules in parts.items()}
    listed["decoder, last layer"].append(model.decoder.modulation)
    return {name: parameters for name, parameters in listed.items() if parameters}


@contextmanager
def record_signals(model: VidTwin) -> Iterator[Values]:
    """Record the root mean square of features during a forward pass."""
    signals: Values = {}

    def watch(module: nn.Module, name: str) -> Any:
        def write(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            signals[name] = compute_size(output)

        return module.register_forward_hook(write)

    def watch_input(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        signals["decoder, input"] = compute_size(inputs[0])

    handles = [watch(model.encoder.patch_embed, "encoder, patch embedding")]
    handles.append(model.decoder.register_forward_pre_hook(watch_input))
    for half, transformer in {"encoder": model.encoder.transformer, "decoder": model.decoder.transformer}.items():
        for index, block in enumerate(transformer.blocks, 1):
            handles.append(watch(block, f"{half}, block {index}"))
    handles.append(watch(model.decoder, "reconstruction"))
    yield signals
    for handle in handles:
        handle.remove()


def lower(precision: str) -> torch.autocast:
    """Return the context of a precision: autocast to bfloat16, or nothing."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def compute_loss(model: VidTwin, clip: Tensor) -> Tensor:
    """Compute L1 + KL in training mode, in means over the pixels."""
    output = model.train()(clip)
    return (output.clip.float() - clip).abs().mean() + KL_WEIGHT / clip[0, :, 0].numel() * output.regularization["kl"]


def measure_pass(model: VidTwin, clip: Tensor, precision: str) -> tuple[Values, Values]:
    """Run one forward and backward pass → signals, and norms of gradients."""
    squares: dict[nn.Parameter, float] = {}

    def measure(parameter: nn.Parameter) -> None:
        squares[parameter] = float(parameter.grad.float().square().sum())
        parameter.grad = None  # all at once they take as much memory as the model

    handles = [parameter.register_post_accumulate_grad_hook(measure) for parameter in model.parameters()]
    torch.manual_seed(0)
    with lower(precision), record_signals(model) as signals:
        loss = compute_loss(model, clip)
    loss.backward()
    for handle in handles:
        handle.remove()
    gradients = {}
    for name, parameters in list_modules(model).items():
        gradients[name] = math.sqrt(sum(squares.get(parameter, 0.0) for parameter in parameters))
    return signals, gradients


@torch.no_grad()
def measure_latents(model: VidTwin, clips: Tensor, precision: str) -> tuple[Values, Tensor]:
    """Measure the reconstructions of clips (N, 3, T, H, W), and what each latent contributes → (…, reconstructions)."""
    model.eval()
    with lower(precision):
        encoded = [model.encode(clip[None]) for clip in clips]
        means = {name: torch.cat([e[name].mean for e in encoded]).float() for name in model.latent_names}  # type: ignore[attr-defined]
        noise = {name: torch.cat([e[name].logvar for e in encoded]).float() for name in model.latent_names}  # type: ignore[attr-defined]
        signals = {
            f"{name}, features": compute_size(branch.decode(means[name][:1]))
            for name, branch in (("structure", model.structure), ("dynamics", model.dynamics))
        }

        def decode(varying: tuple[str, ...]) -> Tensor:
            given = {n: z if n in varying else z.mean(0, keepdim=True).expand_as(z) for n, z in means.items()}
            parts = range(len(clips))
            return torch.cat([model.decode({n: z[i : i + 1] for n, z in given.items()}).float() for i in parts])

        both = decode(model.latent_names)
        values = {"PSNR": psnr(both, clips)} | signals
        total = both.var(0).mean()
        for name in model.latent_names:
            part = decode((name,))
            values[f"{name}: share"] = float(part.var(0).mean() / total)
            values[f"{name}: PSNR"] = psnr(part, clips)
            values[f"{name}: spread"] = float(means[name].var(0).mean().sqrt())
            values[f"{name}: noise"] = float(noise[name].exp().mean().sqrt())
    return values, both


def train(model: VidTwin, clips: Tensor, steps: int, lr: float) -> dict[int, Values]:
    """Train on all clips at once, with the paper's optimizer at a constant rate → measures of the clips by step."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4, eps=1e-15, fused=True
    )
    torch.manual_seed(0)
    measured = {0: measure_latents(model, clips, "fp32")[0]}
    for step in range(1, steps + 1):
        loss = compute_loss(model, clips)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % max(1, steps // 4) == 0:
            measured[step] = measure_latents(model, clips, "fp32")[0]
            sys.stderr.write(
                f"step {step}: " + ", ".join(f"{name} {measured[step][name]:.2f}" for name in BY_STEP) + "\n"
            )
    return measured


def format_value(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2g}" if abs(value) < 10 else f"{value:.1f}"


def join(by_precision: list[Values], name: str) -> str:
    """Join a value of each precision to a cell."""
    return " / ".join(format_value(values.get(name, math.nan)) for values in by_precision)


def print_measures(size: str, clips: Tensor, args: argparse.Namespace) -> None:
    """Measure all variants of a size before training, and print its tables."""
    summaries: dict[str, list[Values]] = {}
    gradients: dict[str, list[Values]] = {}
    numbers: dict[str, int] = {}
    for variant in args.variants:
        model = build(size, variant, args)
        numbers = {name: sum(p.numel() for p in part) for name, part in list_modules(model).items()}
        first = None
        for precision in args.precisions:
            sys.stderr.write(f"{size}, {variant}, {precision}\n")
            signals, norms = measure_pass(model, clips[:1], precision)
            values, reconstructed = measure_latents(model, clips, precision)
            first = reconstructed if first is None else first
            values["difference"] = compute_size(reconstructed - first) / compute_size(first)
            summaries.setdefault(variant, []).append(signals | values)
            gradients.setdefault(variant, []).append(norms)
        del model
    names = list(dict.fromkeys(name for values in summaries.values() for name in values[0]))
    header = [f"{size}, {' / '.join(args.precisions)}", *args.variants]
    print(as_markdown(header, [[name, *(join(summaries[v], name) for v in args.variants)] for name in names]))
    header = [
        f"{size}, gradient",
        "numbers",
        *(text for v in args.variants for text in (f"{v}: norm", f"{v}: per number")),
    ]
    rows = []
    for name, number in numbers.items():
        cells = [f"{number:,}"]
        for values in gradients.values():
            cells += [join(values, name), format_value(values[0][name] / math.sqrt(number))]
        rows.append([name, *cells])
    print("\n" + as_markdown(header, rows) + "\n", flush=True)


def print_training(size: str, clips: Tensor, args: argparse.Namespace) -> None:
    """Train all variants of a size, and print their measures by step."""
    rows = []
    for variant in args.variants:
        sys.stderr.write(f"{size}, {variant}, {args.steps} steps\n")
        for step, values in train(build(size, variant, args), clips, args.steps, args.lr).items():
            rows.append([variant, str(step), *(f"{values[name]:.2f}" for name in BY_STEP)])
    print(as_markdown(["variant", "step", *BY_STEP], rows) + "\n", flush=True)


def main(argv: list[str]) -> None:
    args = parse(argv)
    loaded = [load_clip(path, num_frames=args.frames, size=args.resolution, fps=8.0) for path in args.clips]
    clips = torch.cat(loaded)
    if len(clips) < 2:
        raise SystemExit(
            "Expected at least 2 clips, got 1; add another, since shares are of the variance between clips."
        )
    references = {"mean colour": (2, 3, 4), "temporal mean": (2,)}
    values = {n: psnr(clips.mean(axes, keepdim=True).expand_as(clips), clips) for n, axes in references.items()}
    print(f"{len(clips)} clips of {args.frames} frames at {args.resolution} px: ", end="")
    print(", ".join(f"{name} {value:.2f} dB" for name, value in values.items()) + "\n", flush=True)
    for size in args.sizes:
        if args.steps:
            print_training(size, clips, args)
        else:
            print_measures(size, clips, args)


if __name__ == "__main__":
    main(sys.argv[1:])
