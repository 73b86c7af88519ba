"""ColorVideoVDP is the package's value at the clip's rate on one display."""

import sys
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vidtwin.errors import UserError
from vidtwin.metrics import Measures
from vidtwin.metrics import cvvdp as metric
from vidtwin.metrics.cvvdp import cvvdp, cvvdp_unavailable, describe_display


def clips(frames: int = 4, size: int = 24) -> tuple[Tensor, Tensor]:
    """Two clips of 8-bit values, the second distorted twice as much as the first."""
    draw = torch.Generator().manual_seed(0)
    smooth = F.avg_pool3d(torch.rand(1, 3, frames, size + 4, size + 4, generator=draw), (1, 5, 5), 1)
    target = (smooth.expand(2, -1, -1, -1, -1) * 255).round() / 127.5 - 1
    noise = torch.tensor([0.05, 0.1]).view(2, 1, 1, 1, 1) * torch.randn(target.shape, generator=draw)
    return ((target + noise).clamp(-1, 1) * 127.5).round() / 127.5, target


def test_it_is_the_packages_value_of_the_same_frames_as_bytes() -> None:
    package = pytest.importorskip("pycvvdp")
    prediction, target = (((clip + 1) * 127.5).round() / 127.5 - 1 for clip in clips())
    values = cvvdp(prediction, target, 8.0, "standard_fhd")
    metric = package.cvvdp(display_name="standard_fhd", device=torch.device("cpu"), quiet=True)
    pairs = [
        [((each + 1) * 127.5).round().permute(1, 2, 3, 0).numpy().astype(np.uint8) for each in pair]
        for pair in zip(prediction, target, strict=True)
    ]
    expected = torch.stack([metric.predict(*pair, dim_order="FHWC", frames_per_second=8.0)[0] for pair in pairs])
    torch.testing.assert_close(values, expected, rtol=0, atol=2e-3)
    assert values[0] > values[1] + 0.1
    assert abs(cvvdp(prediction, target, 60.0, "standard_fhd")[0] - values[0]) > 1e-3  # the rate counts


def test_distortions_of_a_real_clip_have_the_anchors_values_and_order(shared: Path) -> None:
    """Values of the same distortions that specs/anchors_2026.md has for another clip of this size."""
    pytest.importorskip("pycvvdp")
    with av.open(str(shared / "data" / "clips" / "carphone_pristine.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in islice(video.decode(video=0), 16)]
    target = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)[None] / 255
    assert target.shape == (1, 3, 16, 144, 176)
    edges = F.pad(target[0].transpose(0, 1), (3,) * 4, mode="replicate")
    sign = 1 - 2 * (torch.arange(16) % 2).view(16, 1, 1)
    made = {
        "same": target,
        "blur": F.avg_pool2d(edges, 7, 1).transpose(0, 1)[None],
        "noise": target + 0.02 * torch.randn(target.shape, generator=torch.Generator().manual_seed(0)),
        "mean": target.mean(2, keepdim=True).expand_as(target),
        "flicker": target + 0.05 * sign,
    }
    found = {name: float(cvvdp(clip * 2 - 1, target * 2 - 1, 29.97)) for name, clip in made.items()}
    assert found["same"] == pytest.approx(10.0, abs=5e-4)
    for name, value in {"blur": 5.71, "noise": 9.90, "mean": 7.51}.items():
        assert found[name] == pytest.approx(value, abs=0.2), name
    # The flicker's error is 2.5 times the noise's, and its loss of JOD over 20 times.
    assert 10 - found["flicker"] > 20 * (10 - found["noise"])


def test_measures_have_it_where_it_is_asked_for_and_leave_the_path_alone() -> None:
    pytest.importorskip("pycvvdp")
    measures = Measures(cvvdp="standard_4k", psnr="clip", fps=8.0)
    path = list(sys.path)
    measures.setup(4, 24, 24)
    assert measures.names[-1] == "cvvdp"
    torch.testing.assert_close(measures(*clips())["cvvdp"], cvvdp(*clips(), 8.0))
    assert sys.path == path
    measures.setup(4, 7, 24)
    assert "at least 8x8 pixels for ColorVideoVDP, got (7, 24)" in measures.unavailable["cvvdp"]
    with pytest.raises(UserError, match="at least 8x8 pixels"):
        cvvdp(*(clip[..., :7] for clip in clips()), 8.0)


def test_the_display_is_described_and_one_that_clips_are_not_made_for_is_refused() -> None:
    pytest.importorskip("pycvvdp")
    described = describe_display("standard_4k", 25.0)
    assert described["pixels_per_degree"] == pytest.approx(75.402, abs=1e-3)  # 30 inches, 3840 px, 0.7472 m
    assert described["description"].startswith("30-inch 4K monitor, peak luminance 200 cd/m^2")
    assert (described["display"], described["frames_per_second"]) == ("standard_4k", 25.0)
    with pytest.raises(UserError, match=r"got 'standard_4'; did you mean 'standard_4k'\?"):
        describe_display("standard_4", 25.0)
    assert "got 'standard_hdr_pq'" in str(cvvdp_unavailable("standard_hdr_pq"))


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycvvdp", None)
    for cached in (metric._displays, metric._package):
        monkeypatch.setattr(metric, cached.__name__, cached.__wrapped__)
    assert str(cvvdp_unavailable("standard_4k")).startswith("pip install 'vidtwin[cvvdp]'")
    with pytest.raises(UserError, match="vidtwin"):
        cvvdp(*clips(), 8.0)
