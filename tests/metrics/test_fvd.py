"""Fréchet video distance: SciPy's formula, and files that are not run unless they are known."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidtwin.errors import UserError
from vidtwin.metrics.fvd import (
    FeatureNetwork,
    file_sha256,
    frechet_distance,
    frechet_video_distance,
    rfvd,
    statistics,
)

FEATURES = 12


class I3D(nn.Module):
    """Takes what StyleGAN-V's file takes; its features are means of 400 parts of the clip."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        if rescale:
            x = x / 127.5 - 1.0
        if resize:
            size = (x.shape[2], 224, 224)
            x = F.interpolate(x, size=size, mode="trilinear", align_corners=False)
        if not return_features:
            return x
        return F.adaptive_avg_pool3d(x, (4, 10, 10)).mean(1).flatten(1)


class Logits(nn.Module):
    """Takes what VideoGPT's network takes: a clip of 224x224."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == 224
        assert x.shape[-2] == 224
        return F.adaptive_avg_pool3d(x, (4, 10, 10)).mean(1).flatten(1)


class Few(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3, 4))


def script(module: nn.Module, path: Path) -> tuple[Path, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but it is what FVD's files are
        torch.jit.script(module).save(str(path))
    return path, file_sha256(path)


@pytest.fixture(scope="module")
def i3d(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return script(I3D(), tmp_path_factory.mktemp("i3d") / "i3d.pt")


def samples(number: int, seed: int, features: int = FEATURES, rank: int | None = None) -> Tensor:
    """Features (N, F) of unequal size that depend on each other; of a lower rank if it is given."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank or features, features, generator=generator)
    return (torch.randn(number, rank or features, generator=generator) @ mixing) * 3 + torch.arange(features) * 0.7


def scipys(real: Tensor, fake: Tensor) -> float:
    """The formula as StyleGAN-V's evaluation computes it."""
    x, y = real.double().numpy(), fake.double().numpy()
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b)
    return float(np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a + b - 2 * np.real(root)))


def of_data(real: Tensor, fake: Tensor) -> float:
    """The same distance from the data: tr((C₁C₂)^½) is the sum of the singular values of X Yᵀ / (N − 1)."""
    real, fake = ((each.double() * 2**20).round() / 2**20 for each in (real, fake))
    x, y = real - real.mean(0), fake - fake.mean(0)
    spread = x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.T).sum()
    return float((real.mean(0) - fake.mean(0)).square().sum() + spread / (len(real) - 1))


def distance_of(real: Tensor, fake: Tensor) -> float:
    return frechet_distance(*statistics(real), *statistics(fake)).item()


@pytest.mark.filterwarnings("ignore:Matrix is singular")
@pytest.mark.parametrize(("number", "rank"), [(200, None), (200, 5), (6, None), (2, None)])
def test_the_distance_is_scipys_also_of_singular_covariances(number: int, rank: int | None) -> None:
    real, fake = samples(number, 0, rank=rank), samples(number, 1, rank=rank)
    value = distance_of(real, fake)
    assert value == pytest.approx(scipys(real, fake), rel=1e-6)
    assert value == pytest.approx(of_data(real, fake), rel=1e-11)


def test_fewer_clips_than_features_lose_no_digits() -> None:
    real = samples(23, 0, features=400, rank=400)
    fake = real + samples(23, 1, features=400, rank=400) * 0.05
    assert distance_of(real, fake) == pytest.approx(of_data(real, fake), rel=1e-10)


def test_the_distance_of_axis_aligned_normals_is_that_of_their_deviations() -> None:
    first, second = torch.tensor([4.0, 9.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])
    value = frechet_distance(torch.zeros(3), first.diag(), torch.tensor([0.0, 1.0, 2.0]), second.diag())
    assert value.item() == pytest.approx(5.0 + (2 - 1) ** 2 + 3**2)


@pytest.mark.parametrize("number", [3, 100])
def test_equal_clips_have_no_distance(number: int) -> None:
    features = samples(number, 0)
    assert 0.0 <= distance_of(features, features) < 1e-9


def test_mean_and_covariance_are_numpys() -> None:
    features = np.round(samples(50, 0).double().numpy() * 2**20) / 2**20
    mean, covariance = statistics(torch.from_numpy(features))
    np.testing.assert_allclose(mean, features.mean(0), rtol=1e-14)
    np.testing.assert_allclose(covariance, np.cov(features, rowvar=False), rtol=1e-11, atol=1e-12)


def test_a_large_offset_does_not_cost_the_covariance_its_digits() -> None:
    steps = torch.randint(-8, 8, (40, FEATURES), generator=torch.Generator().manual_seed(0)).double() / 2**20
    near, far = (statistics(steps + offset)[1] for offset in (0.0, 2000.0))
    torch.testing.assert_close(near, far, rtol=1e-6, atol=1e-17)


def test_another_order_of_the_clips_moves_the_distance_by_rounding_alone() -> None:
    real, fake = samples(61, 0), samples(61, 1)
    order = torch.randperm(61, generator=torch.Generator().manual_seed(2))
    assert distance_of(real[order], fake[order]) == pytest.approx(distance_of(real, fake), rel=1e-12)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(UserError, match="finite features of clips"):
        statistics(torch.tensor([[0.0, value], [1.0, 1.0]]))


def test_another_number_of_real_clips_is_refused_and_one_clip_has_no_value() -> None:
    with pytest.raises(UserError, match=r"got \(2, 12\) and \(1, 12\)"):
        frechet_video_distance(samples(2, 0), samples(1, 0))
    assert frechet_video_distance(samples(1, 0), samples(1, 1)) == "unavailable"


def test_a_result_says_how_many_clips_it_is_of_and_whether_that_ranks() -> None:
    few, some, many = rfvd(10.0, 400), rfvd(10.0, 401), rfvd(10.0, 2048)
    assert few["value"] == 10.0
    assert [result["num_clips"] for result in (few, some, many)] == [400, 401, 2048]
    assert [result["ranked"] for result in (few, some, many)] == [False, True, True]
    assert "below 401" in few["note"]
    assert "below 2,048" in some["note"]
    assert many["note"] is None
    result = frechet_video_distance(samples(23, 0), samples(23, 1))
    assert isinstance(result, dict)
    assert (result["num_clips"], result["ranked"]) == (23, False)


def test_clips_reach_the_network_as_each_convention_says(i3d: tuple[Path, str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    clip = torch.rand(2, 3, 10, 32, 48) * 2 - 1
    pooled = nn.AdaptiveAvgPool3d((4, 10, 10))
    frames = clip.transpose(1, 2).flatten(0, 1)

    def expected(size: tuple[int, int], columns: slice) -> Tensor:
        resized = F.interpolate(frames, size, mode="bilinear", align_corners=False)[..., columns]
        return pooled(resized.unflatten(0, (2, 10)).transpose(1, 2)).mean(1).flatten(1)

    styleganv = FeatureNetwork(*i3d, convention="styleganv")
    torch.testing.assert_close(styleganv(clip), expected((224, 336), slice(56, 280)))
    torch.testing.assert_close(styleganv(clip * 3), styleganv((clip * 3).clamp(-1, 1)))
    internal = FeatureNetwork(*i3d, convention="internal")
    torch.testing.assert_close(internal(clip), expected((224, 224), slice(None)), atol=1e-5, rtol=0)
    videogpt = FeatureNetwork(*script(Logits(), tmp_path / "logits.pt"), convention="videogpt")
    torch.testing.assert_close(videogpt(clip), expected((224, 224), slice(None)))
    with pytest.raises(UserError, match=r"at least 10 frames.*got \(2, 3, 9, 32, 48\)"):
        styleganv(clip[:, :, :9])


def test_a_file_that_is_not_the_named_one_is_not_run(i3d: tuple[Path, str], tmp_path: Path) -> None:
    path, digest = i3d
    with pytest.raises(UserError, match=f"SHA-256 {'0' * 64} at .*got one with {digest}"):
        FeatureNetwork(path, "0" * 64)
    with pytest.raises(UserError, match=r"absent\.pt, got none"):
        FeatureNetwork(tmp_path / "absent.pt", digest)
    weights = tmp_path / "weights.pt"
    torch.save({"weight": torch.zeros(1)}, weights)
    with pytest.raises(UserError, match=r"Expected a TorchScript file.*torch\.jit\.script first"):
        FeatureNetwork(weights, file_sha256(weights))
    with pytest.raises(UserError, match="convention to be one of styleganv, videogpt, internal, got vgg"):
        FeatureNetwork(path, digest, "vgg")  # type: ignore[arg-type]


def test_a_network_other_than_i3d_is_refused_before_the_first_clip(tmp_path: Path, i3d: tuple[Path, str]) -> None:
    few = script(Few(), tmp_path / "few.pt")
    with pytest.raises(UserError, match=r"features of shape \(1, 400\) from .*, got \(1, 3\)"):
        FeatureNetwork(*few, convention="videogpt")
    with pytest.raises(UserError, match=r"called with \(clip, rescale=False, resize=False, return_features=True\)"):
        FeatureNetwork(*few, convention="styleganv")
    with pytest.raises(UserError, match=r"shape \(1, 400\)"):
        FeatureNetwork(*i3d, convention="videogpt")  # without return_features it gives something else
