"""VidTwin's two branches between the encoder's features and the latents (paper 3.2 and 3.3).

    structure   features ─ Q-Former over time at each position ─ n_q maps ─ strided convolutions ─> (B, d_S, n_q, h, w)
    dynamics    features ─ strided convolutions per frame ─ mean over H | mean over W ─ one head ─> (B, d_D, T, w + h)

Each branch has `encode` (features → mean, log-variance) and `decode` (latent → features). Features are (B, C, T, H, W)
on the grid of patches.

`initialize` sets values for training from scratch (docs/training_from_scratch.md). With torch's defaults a random 3×3
kernel leaves a ninth of the energy at its position and each layer a third of the variance, so a branch loses the
position of a patch, and the remaining signal drowns in the sampling noise. Here the layers keep the variance (He et al.
2015 before a ReLU, LeCun elsewhere), kernels start as delta kernels (Xiao et al. 2018) and the noise starts small.
"""

import itertools
import math

import torch
from einops import rearrange
from torch import Tensor, nn

from vidtwin.models.qformer import QFormer
from vidtwin.models.shortcut import DynamicsShortcut, StructureShortcut


def downsample_size(size: int, times: int) -> int:
    """Return the length after `times` convolutions of kernel 3, stride 2, padding 1."""
    for _ in range(times):
        size = (size + 1) // 2
    return size


INITIAL_LOGVAR = -6.0  # a standard deviation of 0.05; that of the means is some tenths


def keep_variance(layer: nn.Linear | nn.Conv2d, relu: bool = False, local: bool = True) -> None:
    """Initialize a layer so that outputs have the root mean square of inputs, after a ReLU if `relu`.

    A `local` 3×3 kernel sets only its centre; with stride 2, the 2×2 taps that pass each input to one output.
    """
    nn.init.zeros_(layer.weight)
    taps = layer.weight
    if local and isinstance(layer, nn.Conv2d):
        taps = taps[:, :, 1:, 1:] if layer.stride == (2, 2) else taps[:, :, 1:2, 1:2]
    nn.init.normal_(taps, std=math.sqrt((2 if relu else 1) / taps[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _keep_variance_all(layers: nn.Sequential) -> None:
    """Apply `keep_variance` to layers that are each followed by a ReLU."""
    for layer in layers:
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            keep_variance(layer, relu=True)


def _initialize_head(head: nn.Conv2d) -> None:
    assert head.bias is not None
    keep_variance(head)
    channels = head.out_channels // 2
    nn.init.zeros_(head.weight[channels:])
    nn.init.constant_(head.bias[channels:], INITIAL_LOGVAR)


class _Halving(nn.Conv2d):
    """Strided convolution that halves height and width, rounded up."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out, 3, stride=2, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[-2:] != (1, 1):
            return super().forward(input)
        # Pad explicitly: with the convolution's own padding, oneDNN (torch 2.15, bfloat16) leaves uninitialized
        # gradients at the taps that never meet a pixel.
        bordered = nn.functional.pad(input, (1, 1, 1, 1))
        return nn.functional.conv2d(bordered, self.weight, self.bias, stride=2)


class StructureBranch(nn.Module):
    """Slow content: `num_queries` maps that summarize all frames, down-sampled.

    Args:
        hidden_size: C.
        num_frames: T.
        grid_size: H = W of the features.
        qformer: Q-Former over the T frames of each position.
        channels: Channels of the latent (paper: d_S).
        downsamples: Number of times that height and width are halved.
        width: Channels of the first convolution; doubled by each down-sampling.
        shortcut: Shortcut over the branch; None for none.
    """

    def __init__(
        self,
        hidden_size: int,
        num_frames: int,
        grid_size: int,
        qformer: QFormer,
        channels: int,
        downsamples: int,
        width: int = 128,
        shortcut: StructureShortcut | None = None,
    ) -> None:
        super().__init__()
        num_queries, query_size = qformer.queries.shape
        self.grid_size = grid_size
        self.shortcut = shortcut
        self.qformer = qformer
        widths = [width * 2**level for level in range(downsamples + 1)]
        self.conv_in = nn.Conv2d(query_size, width, 3, padding=1)
        self.downsample = nn.Sequential()
        for before, after in itertools.pairwise(widths):
            self.downsample.extend([_Halving(before, after), nn.ReLU()])
        self.head = nn.Conv2d(widths[-1], 2 * channels, 3, padding=1)

        self.embed = nn.Sequential(nn.Conv2d(channels, widths[-1], 3, padding=1), nn.ReLU())
        self.upsample = nn.Sequential()
        for before, after in zip(widths[:0:-1], widths[-2::-1], strict=True):
            self.upsample.extend([nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2)])
        self.conv_out = nn.Conv2d(width, query_size, 3, padding=1)
        self.to_features = nn.Sequential(nn.Linear(query_size, hidden_size), nn.ReLU())
        self.to_frames = nn.Linear(num_queries, num_frames)

    @torch.no_grad()
    def initialize(self) -> None:
        """Set initial values for training from scratch (see the top of this file)."""
        self.qformer.initialize()
        keep_variance(self.conv_in)
        for layers in (self.downsample, self.embed, self.to_features):
            _keep_variance_all(layers)
        # A kernel after an up-sampling needs all its taps: only its neighbours distinguish the positions that the
        # up-sampling made equal.
        for level, layer in enumerate(layer for layer in self.upsample if isinstance(layer, nn.Conv2d)):
            keep_variance(layer, relu=True, local=level == 0)
        keep_variance(self.conv_out, local=len(self.upsample) == 0)
        _initialize_head(self.head)
        # Every frame starts as the mean of the queries. Random weights would give each frame a different mixture,
        # partly negative and so dropped by the ReLU, and content common to all frames would be learned T times.
        nn.init.constant_(self.to_frames.weight, 1 / self.to_frames.in_features)
        nn.init.zeros_(self.to_frames.bias)

    def encode(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Encode features (B, C, T, H, W) as mean and log-variance (B, d_S, n_q, h, w)."""
        batch, _, _, height, _ = features.shape
        queries = self.qformer(rearrange(features, "b c t h w -> (b h w) t c"))
        maps = rearrange(queries, "(b h w) q c -> (b q) c h w", b=batch, h=height)
        moments = self.head(self.downsample(self.conv_in(maps)))
        mean, logvar = rearrange(moments, "(b q) c h w -> b c q h w", b=batch).chunk(2, dim=1)
        return mean if self.shortcut is None else mean + self.shortcut.average(features), logvar

    def decode(self, latent: Tensor) -> Tensor:
        """Decode (B, d_S, n_q, h, w) to features (B, C, T, H, W): those of the branch, which a final ReLU keeps
        non-negative, and those of the shortcut.
        """
        maps = self.upsample(self.embed(rearrange(latent, "b c q h w -> (b q) c h w")))
        maps = self.conv_out(maps)
        border = (maps.shape[-1] - self.grid_size) // 2  # halving an odd grid rounds up, so it comes back larger
        inside = slice(border, border + self.grid_size)
        features = self.to_features(rearrange(maps[..., inside, inside], "(b q) c h w -> b h w q c", b=latent.shape[0]))
        features = self.to_frames(features.movedim(3, -1)).relu().movedim((-2, -1), (1, 2))
        return features if self.shortcut is None else features + self.shortcut.repeat(latent)


class DynamicsBranch(nn.Module):
    """Motion: per-frame means over the height (a profile along the width) and over the width (one along the height).

    Args:
        hidden_size: C.
        grid_size: H = W of the features.
        channels: Channels of the latent (paper: d_D).
        downsamples: Number of times that height and width are halved before the means.
        shortcut: Shortcut over the branch; None for none.
    """

    def __init__(
        self,
        hidden_size: int,
        grid_size: int,
        channels: int,
        downsamples: int,
        shortcut: DynamicsShortcut | None = None,
    ) -> None:
        super().__init__()
        self.shortcut = shortcut
        size = downsample_size(grid_size, downsamples)
        self.size = size
        self.downsamples = downsamples
        self.grid_size = grid_size
        self.downsample = nn.Sequential()
        for _ in range(downsamples):
            self.downsample.extend([_Halving(hidden_size, hidden_size), nn.ReLU()])
        self.head = nn.Conv2d(hidden_size, 2 * channels, 3, padding=1)  # over (T, space), shared by both profiles

        self.embed = nn.Sequential(
            nn.Linear(channels, hidden_size), nn.ReLU(), nn.Linear(hidden_size, hidden_size), nn.ReLU()
        )
        self.upsample = nn.Sequential()
        if downsamples:
            self.upsample.extend([nn.Linear(size, grid_size), nn.ReLU(), nn.Linear(grid_size, grid_size), nn.ReLU()])

    @torch.no_grad()
    def initialize(self) -> None:
        """Set initial values for training from scratch (see the top of this file)."""
        for layers in (self.downsample, self.embed):
            _keep_variance_all(layers)
        _initialize_head(self.head)
        linears = [layer for layer in self.upsample if isinstance(layer, nn.Linear)]
        for linear in linears:
            nn.init.zeros_(linear.bias)
        if linears:  # each grid position starts as the latent position that covers it
            covering = torch.arange(self.grid_size) // 2**self.downsamples
            linears[0].weight.copy_(nn.functional.one_hot(covering, self.size))
            nn.init.eye_(linears[1].weight)

    def encode(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Encode features (B, C, T, H, W) as mean and log-variance (B, d_D, T, w + h), the width profile first."""
        batch, _, frames, _, _ = features.shape
        maps = self.downsample(rearrange(features, "b c t h w -> (b t) c h w"))
        maps = rearrange(maps, "(b t) c h w -> b c t h w", b=batch, t=frames)
        profiles = torch.cat([maps.mean(3), maps.mean(4)])  # one batch: the head must not see across the two
        moments = torch.cat(self.head(profiles).unflatten(0, (2, -1)).unbind(), dim=3)
        mean, logvar = moments.chunk(2, dim=1)
        return mean if self.shortcut is None else mean + self.shortcut.average(features), logvar

    def decode(self, latent: Tensor) -> Tensor:
        """Decode (B, d_D, T, w + h) to features (B, C, T, H, W)."""
        profiles = torch.cat(latent.split(self.size, dim=3))
        embedded = self.upsample(self.embed(profiles.movedim(1, -1)).movedim(-1, 1))
        along_width, along_height = embedded.unflatten(0, (2, -1)).unbind()
        features = along_width[:, :, :, None, :] + along_height[:, :, :, :, None]
        return features if self.shortcut is None else features + self.shortcut.repeat(latent)
