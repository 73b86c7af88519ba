"""The measurement of a clip: the metrics of a protocol that are available here, by name."""

import math
from collections.abc import Callable, Collection, Mapping
from os import PathLike
from typing import Literal, get_args

import torch
from torch import Tensor

from vidtwin.errors import UserError
from vidtwin.losses.frame_distance import FrameDistance
from vidtwin.losses.perceptual import LPIPS
from vidtwin.losses.st_lpips import STLPIPS
from vidtwin.metrics.compared import Compared, as_compared
from vidtwin.metrics.cvvdp import cvvdp, cvvdp_unavailable
from vidtwin.metrics.frames import (
    SSIMVariant,
    decibels,
    ms_ssim,
    ms_ssim_unavailable,
    mse,
    psnr,
    ssim,
    ssim_unavailable,
)
from vidtwin.metrics.registry import PER_CLIP
from vidtwin.metrics.temporal import flicker, flicker_unavailable
from vidtwin.metrics.vmaf import vmaf, vmaf_unavailable
from vidtwin.precision import full_precision

PSNROver = Literal["frame", "clip", "video"]
LPIPSNet = Literal["vgg", "alex", "alex_spatial"]
STLPIPSNet = Literal["vgg", "alex", "both"]

_Metric = Callable[[Tensor, Tensor], Tensor]  # one clip (1, 3, T, H, W) twice → (1,), or (1, T) to be averaged


class Measures:
    """Measure the metrics of one protocol on clips; unavailable ones are left out, with the reason.

    Each clip is measured by itself, in full precision independently of the model's, so that its numbers depend on no
    other clip and memory does not grow with the batch.

        measures = Measures(lpips="vgg")
        measures.setup(num_frames=16, height=224, width=224)
        measures(prediction, target)         # {"mse": (B,), "psnr": (B,), …}, in the order of `names`
        measures.unavailable                 # {"lpips": "Expected the VGG-16 backbone …"}

    Args:
        compared: The compared pictures: floats, both sides rounded to 8 bits, both written as an mp4v file and read
            back, or the prediction as an h264 file and the target in 8 bits.
        psnr: The range of one MSE. A video's is that of its clips together, which needs their "mse": here
            "video" is as "clip".
        psnr_epsilon: Added to the MSE of values in [0, 1].
        ssim: Variant, see `vidtwin.metrics.frames.ssim`.
        lpips: The protocol's network, in "lpips"; the others are "lpips_alex" and "lpips_vgg". alex_spatial is the
            mean of the map at the frame's size.
        fps: Frames per second of files that are compared, and at which ColorVideoVDP sees the clips.
        backbones: File with torchvision's weights, by "vgg" and "alex"; None or absent is torch hub's cache. Nothing is
            downloaded for a measurement.
        vmaf: Measure VMAF too; needs the extra `vmaf`.
        st_lpips: Measure ST-LPIPS too, as "st_lpips" (vgg), "st_lpips_alex" (alex) or both; needs the extra `offline`.
        cvvdp: Measure ColorVideoVDP too, on the display of this name; needs the extra `cvvdp`.
    """

    def __init__(
        self,
        compared: Compared = "floats",
        psnr: PSNROver = "frame",
        psnr_epsilon: float = 1e-8,
        ssim: SSIMVariant = "gaussian_pooled",
        lpips: LPIPSNet = "vgg",
        fps: float = 8.0,
        backbones: Mapping[str, str | PathLike[str] | None] | None = None,
        vmaf: bool = False,
        st_lpips: STLPIPSNet | None = None,
        cvvdp: str | None = None,
    ) -> None:
        backbones = backbones or {}
        for name, value, kinds in (
            ("compared", compared, Compared),
            ("psnr", psnr, PSNROver),
            ("lpips", lpips, LPIPSNet),
        ):
            if value not in get_args(kinds):
                raise UserError(f"Expected {name} to be one of {', '.join(get_args(kinds))}, got {value!r}.")
        if st_lpips is not None and st_lpips not in get_args(STLPIPSNet):
            raise UserError(f"Expected st_lpips to be one of {', '.join(get_args(STLPIPSNet))}, got {st_lpips!r}.")
        if ssim not in get_args(SSIMVariant):
            raise UserError(f"Expected ssim to be one of {', '.join(get_args(SSIMVariant))}, got {ssim!r}.")
        if not 0 < fps < math.inf:
            raise UserError(f"Expected fps above 0, got {fps}.")
        if not backbones.keys() <= {"vgg", "alex"}:
            raise UserError(f"Expected backbones of vgg and alex, got {', '.join(sorted(backbones))}.")
        decibels(torch.ones(()), psnr_epsilon)  # a wrong epsilon is refused before a clip is measured
        self.compared = compared
        self.psnr = psnr
        self.psnr_epsilon = psnr_epsilon
        self.ssim = ssim
        self.fps = fps
        self.vmaf = vmaf
        self.cvvdp = cvvdp
        self.unavailable: dict[str, str] = {}
        self._metrics: dict[str, _Metric] | None = None
        net, spatial = ("alex", True) if lpips == "alex_spatial" else (lpips, False)
        self._perceptual: dict[str, FrameDistance] = {
            "lpips": LPIPS(backbones.get(net), "alex" if net == "alex" else "vgg", spatial)
        }
        if lpips != "alex":
            self._perceptual["lpips_alex"] = LPIPS(backbones.get("alex"), "alex")
        if lpips != "vgg":
            self._perceptual["lpips_vgg"] = LPIPS(backbones.get("vgg"), "vgg")
        if st_lpips in ("vgg", "both"):
            self._perceptual["st_lpips"] = STLPIPS("vgg")
        if st_lpips in ("alex", "both"):
            self._perceptual["st_lpips_alex"] = STLPIPS("alex")

    def setup(self, num_frames: int, height: int, width: int) -> None:
        """Find out which metrics are available for clips of this shape: the smallest one, if they differ."""
        if self.compared == "mp4v" and (height % 2 or width % 2):
            raise UserError(f"Expected frames with an even height and width for mp4v, got {(height, width)}.")
        reasons = {
            "ssim": ssim_unavailable(height, width, self.ssim),
            "ms_ssim": ms_ssim_unavailable(height, width),
            **{name: _distance_unavailable(distance, height, width) for name, distance in self._perceptual.items()},
            "flicker": flicker_unavailable(num_frames),
        }
        metrics = self._all()
        if self.vmaf:
            reasons["vmaf"] = vmaf_unavailable(height, width)
        if self.cvvdp is not None:
            reasons["cvvdp"] = cvvdp_unavailable(self.cvvdp, height, width)
        self.unavailable = {name: reason for name, reason in reasons.items() if reason}
        self._metrics = {name: metrics[name] for name in PER_CLIP if name in metrics and name not in self.unavailable}

    @property
    def names(self) -> tuple[str, ...]:
        """List the available metrics in their order."""
        return tuple(self._ready())

    def __call__(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Measure clips (B, 3, T, H, W) in [-1, 1] → (B,) by the name of each available metric."""
        return self.values(*self.prepare(prediction, target))

    def prepare(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Convert both clips to the form that the protocol compares; FVD takes the same. See `as_compared`.

        With "h264" the target is only rounded to 8 bits: TokenBench compares the reconstruction's file to the file
        that the model got, which is not encoded a second time.
        """
        of_target: Compared = "8-bit" if self.compared == "h264" else self.compared
        return as_compared(prediction, self.compared, self.fps), as_compared(target, of_target, self.fps)

    @torch.no_grad()
    def values(self, prediction: Tensor, target: Tensor, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Measure prepared clips, (B,) by name; `names` are the metrics to measure if available, by default all."""
        metrics = {name: metric for name, metric in self._ready().items() if names is None or name in names}
        if prediction.shape != target.shape:
            raise UserError(f"Expected clips of one shape, got {tuple(prediction.shape)} and {tuple(target.shape)}.")
        with full_precision(prediction.device):
            pairs = list(zip(prediction.split(1), target.split(1), strict=True))
            return {
                name: torch.cat([metric(*pair).reshape(1, -1).mean(1) for pair in pairs])
                for name, metric in metrics.items()
            }

    def _ready(self) -> dict[str, _Metric]:
        if self._metrics is None:
            raise UserError("Expected setup(num_frames, height, width) before the first measurement.")
        return self._metrics

    def _all(self) -> dict[str, _Metric]:
        over: Literal["frame", "clip"] = "frame" if self.psnr == "frame" else "clip"
        metrics: dict[str, _Metric] = {
            "mse": mse,
            "psnr": lambda prediction, target: psnr(prediction, target, over, self.psnr_epsilon),
            "ssim": lambda prediction, target: ssim(prediction, target, self.ssim),
            "ms_ssim": ms_ssim,
            "flicker": flicker,
        }
        if self.vmaf:
            metrics["vmaf"] = vmaf
        if (display := self.cvvdp) is not None:
            metrics["cvvdp"] = lambda prediction, target: cvvdp(prediction, target, self.fps, display)
        return metrics | dict(self._perceptual)


def _distance_unavailable(distance: FrameDistance, height: int, width: int) -> str | None:
    try:
        distance.load(download=False)
    except UserError as error:
        return str(error)
    return distance.unavailable(height, width)
