"""Cost of a diffusion transformer on a model's latents: the DiT of VidTwin's appendix C.2.

    each latent ── patches of 2 on every axis ── Linear ──> its tokens
    all tokens, one after the other ── 6 × (attention, FFN) ── Linear of each latent ──> the noise in it

6 layers, 8 heads, width 512, FFN 2048, "a total of 12,610,560 parameters". PyTorch's `TransformerEncoderLayer` has as
many in its FFNs and norms: profilers that know only certain modules leave out its attention, 1,050,624 parameters per
layer. All six layers have 18,914,304. The paper's count leaves no room for an embedding of the time step or a
modulation by it, so there are none here.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vidtwin.benchmark.cost import device_name, seconds, spread
from vidtwin.benchmark.memory import counter_name, peak_memory, within_memory
from vidtwin.diffusion.tokens import LatentShapes, LatentTokens, count_tokens
from vidtwin.errors import UserError
from vidtwin.layers.patches import sincos_1d

WIDTH, HEADS, FFN, DEPTH = 512, 8, 2048, 6


class LatentDiT(nn.Module):
    """Six plain transformer layers on the tokens of all latents of a clip.

    Attention runs without dropout, as DiTs have it. Positions are fixed sines and cosines over the one sequence.

    Args:
        latent_shapes: Shapes by name, see `VideoAutoencoder.latent_shapes`.
    """

    positions: Tensor

    def __init__(self, latent_shapes: LatentShapes) -> None:
        super().__init__()
        self.tokens = LatentTokens(latent_shapes, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, FFN, dropout=0.0, batch_first=True) for _ in range(DEPTH)
        )
        positions = sincos_1d(WIDTH, torch.arange(self.tokens.total))
        self.register_buffer("positions", positions.float(), persistent=False)

    def forward(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map latents by name, each (B, C, ...), to as many numbers of the same shapes."""
        x = self.tokens.embed(latents) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.tokens.restore(x)

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
            "embeddings": [self.tokens],
        }
        if count not in modules:
            raise UserError(f"Expected count to be one of {', '.join(modules)}, got {count!r}.")
        return sum(p.numel() for module in modules[count] for p in module.parameters())


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
        "tokens": model.tokens.total,
        "tokens_by_latent": model.tokens.counts,
        "parameters": model.num_parameters(),
        "parameters_ffn_norm_only": model.num_parameters("ffn_norm_only"),
        "embedding_parameters": model.num_parameters("embeddings"),
        **flops(model),
    }


def flops(model: LatentDiT) -> dict[str, int]:
    """Count floating-point operations of a forward pass and of a training step on one clip, on the meta device.

    It is in training mode, in which no fused layer hides products from the counter, with attention as plain products.
    """
    noise = {name: torch.empty(1, *shape, device="meta") for name, shape in model.tokens.latent_shapes.items()}
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
