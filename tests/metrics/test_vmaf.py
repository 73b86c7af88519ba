"""VMAF is the package's value of 8-bit luma."""

import sys

import pytest
import torch
from torch import Tensor

from vidtwin.errors import UserError
from vidtwin.metrics import Measures
from vidtwin.metrics.vmaf import vmaf, vmaf_unavailable


def clips(size: int = 48) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    target = torch.nn.functional.avg_pool3d(torch.rand(2, 3, 3, size + 4, size + 4), (1, 5, 5), 1) * 2 - 1
    return target + torch.tensor([0.02, 0.1]).view(2, 1, 1, 1, 1) * torch.randn_like(target), target


def test_it_is_the_packages_mean_over_frames_of_luma_as_swscale_makes_it() -> None:
    network = pytest.importorskip("vmaf_torch").VMAF(clip_score=True)
    prediction, target = clips()
    values = vmaf(prediction, target)

    def luma(clip: Tensor) -> Tensor:
        red, green, blue = (clip.clamp(-1, 1) / 2 + 0.5).double().unbind(0)
        # ITU-R BT.601: Kr 0.299, Kb 0.114; black at 16 and white at 235
        return (16 + 219 * (0.299 * red + 0.587 * green + 0.114 * blue)).round().float().unsqueeze(1)

    expected = [network(luma(y), luma(x)).mean() for x, y in zip(prediction, target, strict=True)]
    torch.testing.assert_close(values, torch.stack(expected), rtol=1e-4, atol=1e-3)
    assert values[0] > values[1]


def test_equal_clips_score_high_and_the_smallest_frames_have_a_value() -> None:
    pytest.importorskip("vmaf_torch")
    _, target = clips(32)
    assert (vmaf(target, target) > 85).all()
    with pytest.raises(UserError, match="at least 32x32 pixels for VMAF"):
        vmaf(target[..., :31], target[..., :31])


def test_measures_have_it_where_it_is_asked_for() -> None:
    pytest.importorskip("vmaf_torch")
    measures = Measures(vmaf=True, psnr="clip")
    measures.setup(3, 48, 48)
    assert measures.names[-1] == "vmaf"
    torch.testing.assert_close(measures(*clips())["vmaf"], vmaf(*clips()))


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vmaf_torch", None)
    assert str(vmaf_unavailable(64, 64)).startswith("pip install 'vidtwin[vmaf]'")
    with pytest.raises(UserError, match="vidtwin"):
        vmaf(*clips())
