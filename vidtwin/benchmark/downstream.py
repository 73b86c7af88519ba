"""Cost of a diffusion transformer on a model's latents: the DiT of VidTwin's appendix C.2.

    each latent ── patches of 2 on every axis ── Linear ──> its tokens
    all tokens, one after the other ── 6 × (attention, FFN) ── Linear of each latent ──> the noise in it

6 layers, 8 heads, width 512, FFN 2048, "a total of 12,610,560 parameters". PyTorch's `TransformerEncoderLayer` has as
many in its FFNs and norms: profilers that know only certain modules leave out its attention, 1,050,624 parameters per
layer. All six layers have 18,914,304. The paper's count leaves no room for an embedding of the time step or a
modulation by it, so there are none here.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vidtwin.benchmark.cost import device_name, seconds, spread
from vidtwin.benchmark.memory import counter_name, peak_memory, within_memory
from vidtwin.errors import UserError
from vidtwin.layers.patches import sincos_1d

WIDTH, HEADS, FFN, DEPTH, PATCH = 512, 8, 2048, 6, 2

LatentShapes = Mapping[str, Sequence[int]]


class LatentDiT(nn.Module):
    """Six plain transformer layers on the tokens of all latents of a clip.

    Attention runs without dropout, as DiTs have it. Positions are fixed sines and cosines over the one sequence.

    Args:
        latent_shapes: Shapes by name, see `VideoAutoencoder.latent_shapes`.
    """

    positions: Tensor

    def __init__(self, latent_shapes: LatentShapes) -> None:
        super().__init__()
        self.latent_shapes = {name: tuple(shape) for name, shape in latent_shapes.items()}
        self.tokens_by_latent = count_tokens(latent_shapes)
        sizes = {name: shape[0] * PATCH ** len(shape[1:]) for name, shape in self.latent_shapes.items()}
        # In lists, since a latent's name may be no name of a module.
        self.embeddings = nn.ModuleList(nn.Linear(size, WIDTH) for size in sizes.values())
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, FFN, dropout=0.0, batch_first=True) for _ in range(DEPTH)
        )
        self.heads = nn.ModuleList(nn.Linear(WIDTH, size) for size in sizes.values())
        positions = sincos_1d(WIDTH, torch.arange(sum(self.tokens_by_latent.values())))
        self.register_buffer("positions", positions.float(), persistent=False)

    def forward(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map latents by name, each (B, C, ...), to as many numbers of the same shapes."""
        patches = [fold(latents[name]) for name in self.latent_shapes]
        embedded = [embed(part) for embed, part in zip(self.embeddings, patches, strict=True)]
        x = torch.cat(embedded, dim=1) + self.positions
        for layer in self.layers:
            x = layer(x)
        parts = x.split(list(self.tokens_by_latent.values()), dim=1)
        return {
            name: unfold(head(part), shape)
            for (name, shape), head, part in zip(self.latent_shapes.items(), self.heads, parts, strict=True)
        }

    def num_parameters(self, count: Literal["layers", "ffn_norm_only", "embeddings"] = "layers") -> int:
        """Count parameters, all of which are trainable.

        Args:
            count: Those of the six layers (18,914,304); those of their FFNs and norms alone (12,610,560, as the paper
                prints); or those that map latents to tokens and back, which depend on the latents.
        """
        ffn_and_norms = [m for layer in self.layers for name, m in layer.named_children() if name != "self_attn"]
        modules: dict[str, Iterable[nn.Module]] = {
            "layers": self.layers,
            "ffn_norm_only": ffn_and_norms,
            "embeddings": [self.embeddings, self.heads],
        }
        if count not in modules:
            raise UserError(f"Expected count to be one of {', '.join(modules)}, got {count!r}.")
        return sum(p.numel() for module in modules[count] for p in module.parameters())


def count_tokens(latent_shapes: LatentShapes) -> dict[str, int]:
    """Count each latent's tokens: patches of 2 on every axis but the first, an odd axis padded; a vector is one."""
    for name, shape in latent_shapes.items():
        if not shape or any(size < 1 for size in shape):
            raise UserError(f"Expected a latent of shape (channels, ...), got {name} of {tuple(shape)}.")
    if not latent_shapes:
        raise UserError("Expected at least one latent, got none.")
    return {name: math.prod(-(-size // PATCH) for size in shape[1:]) for name, shape in latent_shapes.items()}


def fold(latent: Tensor) -> Tensor:
    """Fold a latent (B, C, A1, ..., Ak) to patches (B, N, C·2^k); odd axes are padded by a zero."""
    axes = latent.ndim - 2
    padding = [(0, -size % PATCH) for size in reversed(latent.shape[2:])]
    latent = F.pad(latent, tuple(chain.from_iterable(padding)))
    for axis in range(axes):
        latent = latent.unflatten(2 + 2 * axis, (-1, PATCH))  # (B, C, A1/2, 2, ..., Ak/2, 2)
    places, inside = range(2, 2 + 2 * axes, 2), range(3, 2 + 2 * axes, 2)
    latent = latent.permute(0, *places, 1, *inside)
    return latent.reshape(len(latent), math.prod(latent.shape[1 : 1 + axes]), -1)


def unfold(patches: Tensor, shape: Sequence[int]) -> Tensor:
    """Unfold patches (B, N, C·2^k) to the latent (B, *shape) that they were cut from."""
    axes = len(shape) - 1
    grid = [-(-size // PATCH) for size in shape[1:]]
    latent = patches.reshape(len(patches), *grid, shape[0], *[PATCH] * axes)
    pairs = chain.from_iterable((1 + axis, 2 + axes + axis) for axis in range(axes))
    latent = latent.permute(0, 1 + axes, *pairs)
    latent = latent.reshape(len(patches), shape[0], *(PATCH * size for size in grid))
    return latent[(slice(None), slice(None), *(slice(size) for size in shape[1:]))]


@torch.inference_mode(False)
@torch.enable_grad()
def measure(
    latent_shapes: LatentShapes,
    device: torch.device | str,
    warmup: int = 1,
    repeats: int = 3,
    max_tokens: int = 20_000,
) -> dict[str, Any]:
    """Measure tokens, FLOPs, peak memory and time of one training step on one clip: `downstream` of results.json.

    The objective is denoising: noise is added to random latents, and the DiT predicts it, by the mean squared error
    over all numbers of all latents; forward pass, backward pass, Adam, in single precision. Attention is PyTorch's for
    the device, which does not store N² scores. Its N² products count in the FLOPs, once forward and twice backward;
    that kernels repeat the forward ones in the backward pass does not.

    Memory includes weights, gradients, both of Adam's moments, activations and the latents.

    Args:
        latent_shapes: Shapes by name, without batch axis, channels first.
        device: Device of the training.
        warmup: Steps before the one whose memory is counted, which comes before the timed ones; the first makes Adam's
            moments.
        repeats: Timed steps.
        max_tokens: Maximum number of tokens: attention's time grows with its square.
    """
    device = torch.device(device)
    for name, value in (("warmup", warmup), ("repeats", repeats), ("max_tokens", max_tokens)):
        if value < 1:
            raise UserError(f"Expected {name} of at least 1, got {value}.")
    tokens_by_latent = count_tokens(latent_shapes)
    tokens = sum(tokens_by_latent.values())
    if tokens > max_tokens:
        raise UserError(
            f"Expected at most {max_tokens:,} tokens for a DiT to be timed, got {tokens:,}; attention's time grows "
            "with their square: raise max_tokens if it may take that long."
        )
    tried = f"a training step of a DiT on {tokens:,} tokens"
    return {
        **counts(latent_shapes),
        **within_memory(lambda: _train(latent_shapes, device, warmup, repeats), device, tried),
        "memory_counter": counter_name(device),
        "device": device_name(device),
    }


def counts(latent_shapes: LatentShapes) -> dict[str, Any]:
    """Count tokens, parameters and FLOPs, which need no run."""
    with torch.device("meta"):
        model = LatentDiT(latent_shapes)
    return {
        "tokens": sum(model.tokens_by_latent.values()),
        "tokens_by_latent": model.tokens_by_latent,
        "parameters": model.num_parameters(),
        "parameters_ffn_norm_only": model.num_parameters("ffn_norm_only"),
        "embedding_parameters": model.num_parameters("embeddings"),
        **flops(model),
    }


def flops(model: LatentDiT) -> dict[str, int]:
    """Count floating-point operations of a forward pass and of a training step on one clip, on the meta device.

    It is in training mode, in which no fused layer hides products from the counter, with attention as plain products.
    """
    noise = {name: torch.empty(1, *shape, device="meta") for name, shape in model.latent_shapes.items()}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = compute_loss(model.train(), noise, noise)
        forward = counter.get_total_flops()
        loss.backward()
    return {"flops_forward": forward, "flops_training_step": counter.get_total_flops()}


def compute_loss(model: LatentDiT, latents: dict[str, Tensor], noise: dict[str, Tensor]) -> Tensor:
    """Compute the mean squared error of the predicted noise in latents that are half noise."""
    noisy = {name: (latent + noise[name]) / math.sqrt(2) for name, latent in latents.items()}
    found = model(noisy)
    errors = [(found[name] - noise[name]).square().sum() for name in found]
    return torch.stack(errors).sum() / sum(part.numel() for part in noise.values())


def _train(latent_shapes: LatentShapes, device: torch.device, warmup: int, repeats: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU
        torch.default_generator.manual_seed(0)
        model = LatentDiT(latent_shapes).to(device).train()
    optimizer = torch.optim.Adam(model.parameters())
    latents, noise = (
        {name: torch.randn(1, *shape, generator=generator).to(device) for name, shape in latent_shapes.items()}
        for _ in range(2)
    )

    def step() -> None:
        optimizer.zero_grad()
        compute_loss(model, latents, noise).backward()
        optimizer.step()

    seconds(step, device, warmup - 1, 1)
    held = [list(model.parameters()), list(model.buffers()), list(optimizer.state.values()), latents, noise]
    memory = peak_memory(step, device, held)
    return {"seconds_per_step": spread(seconds(step, device, 0, repeats)), "peak_memory_bytes": memory}
