"""Curves of a sweep: real bytes at each number of bits, noise, resumption and identity."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sweeping
import torch
from sweeping import FRAMES, SIDE, Coded, Interruption, NumberedData, Pool, Two, checkpoint, contents, sweep

from vidtwin import entropy
from vidtwin.baselines.codecs import JPEG
from vidtwin.benchmark import curves, levels, plots, report, rows
from vidtwin.benchmark.latent_coder import ClipCoder, fit
from vidtwin.benchmark.options import RateDistortion
from vidtwin.benchmark.protocol import ProtocolSettings
from vidtwin.benchmark.sweep import Entry
from vidtwin.errors import UserError

CHOSEN = RateDistortion(bits=[2, 4, 8], noise=[0.1, 1.0], clips=4)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots and report are tested elsewhere."""
    monkeypatch.setattr(Interruption, "after", None)
    monkeypatch.setattr(plots, "write", lambda folder: [])
    monkeypatch.setattr(report, "write", lambda folder: Path(folder) / "report.html")


def entries(folder: Path) -> list[Entry]:
    return [
        Entry("Pool", checkpoint=checkpoint(folder / "pool.ckpt", 0.8)),
        Entry("Two", checkpoint=checkpoint(folder / "two.ckpt", model=Two())),
        Entry("Coded", checkpoint=checkpoint(folder / "coded.ckpt", model=Coded())),
        Entry("jpeg", model="vidtwin.baselines.codecs.JPEG"),
    ]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curves")
    patch = pytest.MonkeyPatch()
    patch.setattr(plots, "write", lambda folder: [])
    patch.setattr(report, "write", lambda folder: Path(folder) / "report.html")
    assert sweep(folder / "r", entries(folder), rate_distortion=CHOSEN).run() == 0
    patch.undo()
    return folder / "r"


def row(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "rows" / name / "results.json").read_text())


def read(folder: Path, name: str, curve: str, level: float) -> list[dict[str, Any]]:
    found = levels.read(folder / "rows" / name, row(folder, name))
    return [each for each in found if each["curve"] == curve and each["level"] == level]


def clip_of(index: int) -> torch.Tensor:
    frames = NumberedData().dataset("test").clip(0, index)["clip"]
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def psnr(made: torch.Tensor, clip: torch.Tensor) -> float:
    error = ((made.clamp(-1, 1) - clip) / 2).double().square().mean((0, 1, 3, 4)).numpy()
    return float((-10 * np.log10(error + 1e-8)).mean())


def test_a_level_is_the_clip_decoded_from_its_bytes(measured):
    model = Pool()
    model.scale.data.fill_(0.8)
    grids = [model.encode(clip_of(index))["grid"].mode()[0].flatten(1).double().numpy() for index in range(6)]
    fitted = fit({"grid": [grids[index] for index in (0, 2, 3, 5)]}, {})  # four of the six clips of the split
    with torch.no_grad():
        for bits in (2, 4, 8):
            for index, level in enumerate(read(measured, "Pool", "bits", bits)):
                coder = ClipCoder(fitted, bits)
                coded = coder.encode({"grid": grids[index]})
                _, values = coder.decode(coded.content, {"grid": grids[index].shape})
                grid = torch.from_numpy(values["grid"]).float().reshape(1, 3, FRAMES, SIDE // 4, SIDE // 4)
                assert level["bytes"] == len(coded.content)
                assert level["bpp"] == pytest.approx(8 * level["bytes"] / (FRAMES * SIDE * SIDE))
                by_hand = sum(
                    entropy.entropy(channel) for channel in coder.encode({"grid": grids[index]}).symbols["grid"]
                )
                assert level["entropy_bpp"] * FRAMES * SIDE * SIDE == pytest.approx(by_hand)
                assert level["psnr"] == pytest.approx(
                    psnr(model.decode({"grid": grid}, FRAMES), clip_of(index)), abs=1e-3
                )


@pytest.mark.parametrize("name", ["Pool", "Two"])
def test_more_bits_cost_more_and_come_closer_to_the_latents_as_they_are(measured, name):
    mean = {
        key: [np.mean([clip[key] for clip in read(measured, name, "bits", bits)]) for bits in (2, 4, 8)]
        for key in ("bpp", "mse")
    }
    exact = np.mean([clip["mse"] for clip in read(measured, name, "noise", 0)])
    assert mean["bpp"] == sorted(mean["bpp"])
    distances = [abs(mse - exact) for mse in mean["mse"]]
    assert distances == sorted(distances, reverse=True)
    assert mean["mse"][-1] == pytest.approx(exact, rel=0.05)
    own = rows.read_clips(measured / "rows" / name, row(measured, name))
    assert exact == pytest.approx(np.mean([clip["mse"] for clip in own]))


def test_codes_are_one_level_with_the_rows_own_quality(measured):
    found = read(measured, "Coded", "codes", 0)
    own = rows.read_clips(measured / "rows" / "Coded", row(measured, "Coded"))
    assert [clip["psnr"] for clip in found] == pytest.approx([clip["psnr"] for clip in own])
    assert not read(measured, "Coded", "bits", 2)
    codes = [Coded().encode(clip_of(index))["grid"].codes.flatten().numpy() for index in range(6)]
    shares = np.bincount(np.concatenate([codes[index] for index in (0, 2, 3, 5)])) / (4 * codes[0].size)
    for clip, own_codes in zip(found, codes, strict=True):
        assert 8 * clip["bytes"] == pytest.approx(-np.log2(shares[own_codes]).sum(), abs=40)


def test_more_noise_means_less_quality_and_it_is_in_units_of_the_channels(measured):
    for name in ("Pool", "Two", "Coded"):
        quality = [np.mean([clip["psnr"] for clip in read(measured, name, "noise", s)]) for s in (0, 0.1, 1.0)]
        assert quality == sorted(quality, reverse=True)
    model = Pool()
    model.scale.data.fill_(0.8)
    grids = torch.cat([model.encode(clip_of(index))["grid"].mode() for index in (0, 2, 3, 5)])
    std = grids.double().transpose(0, 1).flatten(1).numpy().std(1).reshape(1, 3, 1, 1, 1)
    for index in (0, 3):
        drawn = torch.randn(3, FRAMES, 8, 8, generator=torch.Generator().manual_seed(index))
        noisy = model.encode(clip_of(index))["grid"].mode() + torch.from_numpy(std).float() * drawn
        with torch.no_grad():
            expected = psnr(model.decode({"grid": noisy}, FRAMES), clip_of(index))
        assert read(measured, "Pool", "noise", 1.0)[index]["psnr"] == pytest.approx(expected, abs=1e-3)


def test_codecs_have_no_levels(measured):
    assert row(measured, "jpeg")["rate_distortion"] is None
    assert not (measured / "rows" / "jpeg" / levels.NAME).exists()


def test_a_codecs_row_stays_under_settings_of_other_models(tmp_path, measured, monkeypatch):
    shutil.copytree(measured, tmp_path / "r")
    monkeypatch.setattr(JPEG, "compress", lambda *_: pytest.fail("was measured again"))
    other = dataclasses.replace(CHOSEN, bits=[3])
    options = {"rate_distortion": other, "seed": 5, "compile": "default", "references": []}
    assert sweep(tmp_path / "r", entries(tmp_path)[3:], **options).run() == 0
    assert row(tmp_path / "r", "jpeg") == row(measured, "jpeg")


def test_a_level_that_is_not_finite_is_missing_alone_and_its_curve_has_no_point_there(tmp_path, monkeypatch):
    """With noise of 1 the values of clip 3 leave the range that the decoder can take."""
    decode = Pool._decode

    def overflow(self: Pool, latents: Any) -> torch.Tensor:
        made = decode(self, latents)
        return torch.where(latents["grid"].abs().amax() > 1.05, torch.inf, 1) * made

    monkeypatch.setattr(Pool, "_decode", overflow)
    data = NumberedData(eval_batch_size=1)
    chosen = dataclasses.replace(CHOSEN, noise=[0.001, 1.0])
    assert sweep(tmp_path / "r", entries(tmp_path)[:1], data, rate_distortion=chosen, references=[]).run() == 0
    assert row(tmp_path / "r", "Pool")["failed_clips"] == []
    last = read(tmp_path / "r", "Pool", "noise", 1.0)
    assert {clip.get("missing") for clip in last} == {"pixels not finite"}
    assert not any("psnr" in clip for clip in last)
    assert all("psnr" in clip for clip in read(tmp_path / "r", "Pool", "noise", 0.001))
    results = rows.read(tmp_path / "r")
    assert [point.level for point in curves.read_noise(results)[0].points] == [0, 0.001]
    table = curves.noise_table(results)
    assert table is not None
    assert table.notes[-1] == "Pool has no point at noise 1: pixels not finite in 6 of 6 clips."


def test_a_validation_video_of_another_content_is_another_fit(tmp_path, measured):
    class Replaced(NumberedData):
        def digests(self, split: str = "test") -> dict[str, str]:
            return {"v1.avi": "0f" * 32} if split == "val" else super().digests(split)

    sweep(tmp_path / "r", entries(tmp_path)[:1], Replaced(), rate_distortion=CHOSEN, references=[]).run()
    found = row(tmp_path / "r", "Pool")
    assert found["rate_distortion"]["fitted_on"] != row(measured, "Pool")["rate_distortion"]["fitted_on"]
    assert found["identity"] != row(measured, "Pool")["identity"]


@pytest.mark.parametrize("after", [0, 3])
def test_an_interrupted_sweep_has_the_same_curves_and_measures_the_rest_alone(tmp_path, measured, after):
    Interruption.after = after
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path / "r", entries(tmp_path)[:1], rate_distortion=CHOSEN).run()
    Interruption.after = None
    sweeping.calls.clear()
    assert sweep(tmp_path / "r", entries(tmp_path)[:1], rate_distortion=CHOSEN).run() == 0
    file = f"rows/Pool/{levels.NAME}"
    assert (tmp_path / "r" / file).read_text() == (measured / file).read_text()
    before = contents(tmp_path / "r")
    sweeping.calls.clear()
    assert sweep(tmp_path / "r", entries(tmp_path)[:1], rate_distortion=CHOSEN).run() == 0
    assert not sweeping.calls
    assert contents(tmp_path / "r") == before


def test_the_options_are_part_of_a_rows_identity_and_earlier_rows_come_back(tmp_path):
    entry = entries(tmp_path)[:1]
    few = RateDistortion(bits=[4], noise=[], tables="clip")
    assert sweep(tmp_path / "r", entry, rate_distortion=few).run() == 0
    first = row(tmp_path / "r", "Pool")
    table = (tmp_path / "r" / "rows" / "Pool" / levels.NAME).read_text()
    assert sweep(tmp_path / "r", entry).run() == 0
    assert row(tmp_path / "r", "Pool")["rate_distortion"] is None
    assert not (tmp_path / "r" / "rows" / "Pool" / levels.NAME).exists()
    sweeping.calls.clear()
    assert sweep(tmp_path / "r", entry, rate_distortion=few).run() == 0
    assert not sweeping.calls
    assert row(tmp_path / "r", "Pool") == first
    assert (tmp_path / "r" / "rows" / "Pool" / levels.NAME).read_text() == table


def test_a_file_of_levels_that_is_cut_off_is_measured_again(tmp_path, measured):
    entry = entries(tmp_path)[:1]
    assert sweep(tmp_path / "r", entry, rate_distortion=CHOSEN).run() == 0
    path = tmp_path / "r" / "rows" / "Pool" / levels.NAME
    whole = path.read_text()
    for damaged in (whole[: len(whole) // 2], ""):
        path.write_text(damaged)
        assert sweep(tmp_path / "r", entry, rate_distortion=CHOSEN).run() == 0
        assert path.read_text() == whole


def test_sent_tables_cost_their_bytes(tmp_path):
    sent = dataclasses.replace(CHOSEN, tables="clip")
    assert sweep(tmp_path / "r", entries(tmp_path)[:3], rate_distortion=sent, references=[]).run() == 0
    for clip in read(tmp_path / "r", "Coded", "codes", 0):
        assert clip["bytes"] == pytest.approx(3 * FRAMES * 8 * 8 / 8, abs=4)  # a bit a code
    assert min(clip["bytes"] for clip in read(tmp_path / "r", "Pool", "bits", 2)) > 3 * 6


def test_without_a_fit_noise_is_in_units_of_the_clips_own_channels(tmp_path):
    sent = dataclasses.replace(CHOSEN, tables="clip")
    data = NumberedData(eval_batch_size=6)
    assert sweep(tmp_path / "r", entries(tmp_path)[:1], data, rate_distortion=sent, references=[]).run() == 0
    model = Pool()
    model.scale.data.fill_(0.8)
    for index, found in enumerate(read(tmp_path / "r", "Pool", "noise", 1.0)):
        grid = model.encode(clip_of(index))["grid"].mode()
        drawn = torch.randn(3, FRAMES, 8, 8, generator=torch.Generator().manual_seed(index))
        std = grid[0].flatten(1).std(1, correction=0).reshape(1, 3, 1, 1, 1)
        with torch.no_grad():
            expected = psnr(model.decode({"grid": grid + std * drawn}, FRAMES), clip_of(index))
        assert found["psnr"] == pytest.approx(expected, abs=1e-3)


def test_windows_and_samples_have_curves_of_the_mode(tmp_path):
    path = checkpoint(tmp_path / "short.ckpt", 0.8, frames=4)
    entry = [
        Entry("short", checkpoint=path, windows=True),
        Entry("Pool", checkpoint=checkpoint(tmp_path / "p.ckpt", 0.8)),
    ]
    sampled = ProtocolSettings(posterior="sample", ssim="uniform7")
    assert sweep(tmp_path / "r", entry, protocol=sampled, rate_distortion=CHOSEN, references=[]).run() == 0
    for curve, level in (("bits", 8), ("bits", 2), ("noise", 0)):  # noise is drawn in another order
        short, whole = (read(tmp_path / "r", name, curve, level) for name in ("short", "Pool"))
        assert [clip["psnr"] for clip in short] == pytest.approx([clip["psnr"] for clip in whole])
        if curve == "bits":
            assert [clip["bytes"] for clip in short] == pytest.approx([clip["bytes"] for clip in whole], abs=3)
    own = rows.read_clips(tmp_path / "r" / "rows" / "Pool", row(tmp_path / "r", "Pool"))
    assert own[0]["psnr"] < read(tmp_path / "r", "Pool", "noise", 0)[0]["psnr"]  # a sample has noise of its own


class WithoutClips(NumberedData):
    def make_dataset(self, split: str) -> Any:
        return sweeping.NumberedClips(6 if split == "test" else 0, FRAMES, SIDE, [])


class WithoutSplit(NumberedData):
    def make_dataset(self, split: str) -> Any:
        if split == "val":
            raise UserError("Expected videos in split val, got none; change data.val_fraction.")
        return super().make_dataset(split)


@pytest.mark.parametrize("data", [WithoutClips, WithoutSplit])
def test_data_without_validation_clips_are_refused_with_what_to_give(tmp_path, data):
    with pytest.raises(UserError, match=r"^Expected v[^.]*\.?[^.]* give --rate_distortion.tables clip to send"):
        sweep(tmp_path / "r", entries(tmp_path)[:1], data(), rate_distortion=CHOSEN).run()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [({"bits": [0]}, "bits from 1 to 12"), ({"noise": [-1.0]}, "noise above 0"), ({"tables": "test"}, "of val or clip"),
     ({"clips": 0}, "clips of at least 1"), ({"bits": [4, 8, 4]}, "bits without repetition"),
     ({"noise": [0.5, 0.5]}, "noise without repetition")],
)  # fmt: skip
def test_wrong_options_are_refused(arguments, reason):
    with pytest.raises(UserError, match=reason):
        RateDistortion(**arguments)
