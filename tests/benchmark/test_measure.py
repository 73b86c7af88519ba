"""One model on clips: windows, and what a row says of its latents."""

import shutil
from pathlib import Path

import pytest
import torch
from sweeping import FRAMES, SIDE, Coded, Pool, checkpoint

from vidtwin.autoencoder import TemporalSpec
from vidtwin.benchmark.measure import Subject, describe, fingerprint, seeded
from vidtwin.errors import UserError
from vidtwin.metrics.latents import LatentStatistics

CLIP = torch.rand(2, 3, FRAMES, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
CPU = torch.device("cpu")


def whole(subject: Subject, clip: torch.Tensor) -> torch.Tensor:
    return subject.decode(subject.encode(clip).mode(), clip.shape[2])


def test_a_clip_in_windows_is_its_parts_done_one_by_one():
    model = Pool(frames=4)
    subject = Subject("a", "untrained", model, window=4)
    parts = [model.decode(model.encode(part).mode()) for part in CLIP.split(4, dim=2)]
    torch.testing.assert_close(whole(subject, CLIP), torch.cat(parts, 2), rtol=0, atol=0)


def test_latents_of_windows_count_for_the_whole_clip():
    subject = Subject("a", "untrained", Coded(frames=4), window=4)
    found = subject.latents(subject.encode(CLIP).mode(), tuple(CLIP.shape[1:]))["grid"]
    assert found == {"shape": [2, 3, 4, 8, 8], "numbers": 1536, "rate": 1 / 16, "bits": 1536.0}
    row = describe(subject, {"grid": found}, tuple(CLIP.shape[1:]), LatentStatistics(), CPU)
    assert row["windows"] == {"num_frames": 4, "windows": 2}
    assert row["compression_rate"] == 1 / 16
    assert row["bits_per_pixel"] == 1536 / (FRAMES * SIDE * SIDE)


def test_bits_are_unknown_where_a_latent_is_no_choice_of_codes():
    subject = Subject("a", "untrained", Pool())
    latents = subject.latents(subject.encode(CLIP).mode(), tuple(CLIP.shape[1:]))
    assert latents["grid"]["bits"] is None
    row = describe(subject, latents, tuple(CLIP.shape[1:]), LatentStatistics(), CPU)
    assert row["bits_per_pixel"] is None
    assert row["windows"] is None


@pytest.mark.parametrize(
    ("claimed", "agrees"), [(1 / 16, True), (0.06, True), (0.0596, True), (0.059, False), (0.07, False)]
)
def test_a_claimed_rate_agrees_within_a_twentieth(claimed, agrees):
    subject = Subject("a", "untrained", Pool(), claimed_rate=claimed)
    latents = subject.latents(subject.encode(CLIP).mode(), tuple(CLIP.shape[1:]))
    row = describe(subject, latents, tuple(CLIP.shape[1:]), LatentStatistics(), CPU)
    assert row["claimed"] == {"rate": claimed, "agrees": agrees}


@pytest.mark.parametrize(
    ("frames", "window", "text"), [(4, None, "windows: true"), (3, 3, "multiple of the windows of 3")]
)
def test_clips_that_a_model_does_not_take_are_refused_with_what_to_do(frames, window, text):
    with pytest.raises(UserError, match=text):
        Subject("a", "untrained", Pool(frames=frames), window=window).check(FRAMES, SIDE)


def test_windows_are_no_advice_for_another_resolution():
    with pytest.raises(UserError, match="multiples of 5") as caught:
        Subject("a", "untrained", Pool(pool=5)).check(FRAMES, SIDE)
    assert "windows" not in str(caught.value)


def test_a_clip_that_fits_goes_through_whole_whatever_the_window():
    model = Pool()
    model.temporal = TemporalSpec(maximum=16)
    assert Subject("a", "untrained", model, window=16).windows(FRAMES) == 1
    assert Subject("a", "untrained", model, window=8).windows(FRAMES) == 1
    assert Subject("a", "untrained", model, window=4).windows(FRAMES) == 2


def test_a_fingerprint_is_of_what_the_file_holds_not_of_its_name(tmp_path):
    first = checkpoint(tmp_path / "one.ckpt", 0.9)
    again = checkpoint(tmp_path / "other name.ckpt", 0.9)
    shutil.copy(first, tmp_path / "copy.ckpt")
    other = checkpoint(tmp_path / "three.ckpt", 0.8)
    assert fingerprint(first) == fingerprint(again) == fingerprint(tmp_path / "copy.ckpt") != fingerprint(other)


@pytest.mark.parametrize("kept", [0, 0.3, 0.9, 0.99])
def test_a_file_that_is_cut_off_has_no_fingerprint(tmp_path, kept):
    path = Path(checkpoint(tmp_path / "a.ckpt"))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(UserError, match="damaged or cut off"):
        fingerprint(path)


def test_seeded_numbers_are_the_same_and_leave_those_outside_alone():
    before = torch.get_rng_state()
    first = seeded(5, CPU, lambda: torch.rand(3))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(first, seeded(5, CPU, lambda: torch.rand(3)))
    assert not torch.equal(first, seeded(6, CPU, lambda: torch.rand(3)))
