"""Shift-tolerant LPIPS, with the weights of the installed package `stlpips-pytorch`."""

import re
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidtwin import weights
from vidtwin.errors import UserError
from vidtwin.losses.frame_distance import FrameDistance, normalize_channels

Net = Literal["vgg", "alex"]


@dataclass(frozen=True)
class _Trunk:
    name: str
    sha256: str
    smallest: int  # side in pixels: a reflected border of 2 needs maps of 3

    def file(self, net: Net) -> weights.PackagedFile:
        path = f"stlpips_pytorch/weights/vST0.0/{net}_shift_tolerant.pth"
        return weights.PackagedFile("stlpips-pytorch", path, self.sha256, extra="offline")


TRUNKS: dict[Net, _Trunk] = {
    "vgg": _Trunk("VGG-16", "44597da68f49c1837c100ff52299050f274d102eb102e5837178c79be6f0e250", 18),
    "alex": _Trunk("AlexNet", "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee", 21),
}


class STLPIPS(FrameDistance):
    """Shift-tolerant LPIPS of frames (Ghildyal and Liu 2022, arXiv 2207.13686), version ST0.0.

    The formula is that of LPIPS (Zhang et al. 2018, eq. 1), the sum over five layers of
    mean over positions of w_l · (f̂_l(x) − f̂_l(y))² with features f̂ of length 1 and learned heads w_l. Network and heads
    were trained together on human judgements of similarity (BAPPS), with blur pooling in place of strides, so that a
    shift by a pixel hardly counts. Its values are not those of LPIPS.

    The weights come with the package `stlpips-pytorch` (BSD 2-clause), which the extra `offline` installs; its code is
    never run.

    Args:
        net: VGG-16 or AlexNet.
    """

    key = "st_lpips"

    def __init__(self, net: Net = "vgg") -> None:
        if net not in TRUNKS:
            raise UserError(f"Expected the network of ST-LPIPS to be one of {', '.join(TRUNKS)}, got {net!r}.")
        super().__init__(f"ST-LPIPS with {TRUNKS[net].name}", TRUNKS[net].smallest)
        self.net = net

    def _build(self, download: bool) -> nn.Module:
        path = TRUNKS[self.net].file(self.net).locate()
        with torch.device("meta"):
            network = _Network(self.net)
        # net.slice2.6.weight in the package is layers.6.weight here, lin0.model.1.weight is heads.0
        names = {r"net\.slice\d\.": "layers.", r"lin(\d)\.model\.1\.weight": r"heads.\1", r"scaling_layer\.": ""}
        state = weights.read(path)
        for theirs, ours in names.items():
            state = {re.sub(f"^{theirs}", ours, key): tensor for key, tensor in state.items()}
        weights.check_fit(state, network.state_dict(), f"Expected {self.title}, but {path}")
        network.load_state_dict(state, assign=True)
        return network


class _Network(nn.Module):
    shift: Tensor
    scale: Tensor

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.layers, self.taps, widths = _make_vgg() if net == "vgg" else _make_alex()
        self.heads = nn.ParameterList(torch.empty(1, width, 1, 1) for width in widths)
        for name in ("shift", "scale"):  # the mean and deviation of ImageNet's colours in [-1, 1]
            self.register_buffer(name, torch.empty(1, 3, 1, 1))

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Compare (N, 3, H, W) in [-1, 1] → (N,)."""
        x, y = ((frames - self.shift) / self.scale for frames in (prediction, target))
        total = prediction.new_zeros(len(prediction))
        heads = iter(self.heads)
        for index, layer in enumerate(self.layers):
            x, y = layer(x), layer(y)
            if index in self.taps:
                difference = (normalize_channels(x) - normalize_channels(y)).square()
                # A product instead of a convolution, which autocast would round to bf16.
                total = total + (next(heads) * difference).sum(1).mean((1, 2))
        return total


class _BlurPool(nn.Module):
    """Halve height and width (Zhang 2019): a 1-2-1 filter on both axes, then stride 2.

    The border is reflected by 2, twice the filter's need, as the paper does.
    """

    filt: Tensor  # the name in the package's file

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("filt", torch.empty(width, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Downsample (N, C, H, W) → (N, C, ⌊(H + 1)/2⌋ + 1, ⌊(W + 1)/2⌋ + 1)."""
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), self.filt.to(x.dtype), stride=2, groups=len(self.filt))


def _make_vgg() -> tuple[nn.Sequential, list[int], list[int]]:
    """Return VGG-16's layers up to relu5_3, the indices of those that are compared, and their widths."""
    layers: list[nn.Module] = []
    taps: list[int] = []
    widths, before = [64, 128, 256, 512, 512], 3
    for depth, width in zip((2, 2, 3, 3, 3), widths, strict=True):
        if taps:
            layers += [nn.MaxPool2d(2, stride=1), _BlurPool(before)]
        for _ in range(depth):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            before = width
        taps.append(len(layers) - 1)
    return nn.Sequential(*layers), taps, widths


def _make_alex() -> tuple[nn.Sequential, list[int], list[int]]:
    """Return AlexNet's layers up to relu5, the indices of those that are compared, and their widths."""
    layers = nn.Sequential(
        *(nn.Conv2d(3, 64, 11, padding=2), _BlurPool(64), nn.ReLU()),
        *(nn.MaxPool2d(3, stride=1), _BlurPool(64), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()),
        *(nn.MaxPool2d(3, stride=1), _BlurPool(192), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    )
    return layers, [2, 6, 10, 12, 14], [64, 192, 384, 256, 256]
