"""A loaded model: windows, and the description of its latents in a row."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sweeping import FRAMES, SIDE, Coded, Pool, checkpoint

from vidtwin.autoencoder import TemporalSpec
from vidtwin.baselines.references import MeanColour
from vidtwin.benchmark.loaded_model import LoadedModel, add_latents, fingerprint
from vidtwin.errors import UserError

CLIP = torch.rand(2, 3, FRAMES, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
CPU = torch.device("cpu")


def whole(loaded: LoadedModel, clip: torch.Tensor) -> torch.Tensor:
    return loaded.decode(loaded.encode(clip).mode(), clip.shape[2])


def test_a_clip_in_windows_is_its_parts_done_one_by_one():
    model = Pool(frames=4)
    loaded = LoadedModel("a", "untrained", model, window=4)
    parts = [model.decode(model.encode(part).mode()) for part in CLIP.split(4, dim=2)]
    torch.testing.assert_close(whole(loaded, CLIP), torch.cat(parts, 2), rtol=0, atol=0)


def test_latents_of_windows_count_for_the_whole_clip():
    loaded = LoadedModel("a", "untrained", Coded(frames=4), window=4)
    found = loaded.describe_latents(loaded.encode(CLIP).mode(), tuple(CLIP.shape[1:]))["grid"]
    assert found == {"shape": [2, 3, 4, 8, 8], "numbers": 1536, "rate": 1 / 16, "bits": 1536.0}
    row = loaded.describe({"grid": found}, tuple(CLIP.shape[1:]), {}, CPU)
    assert row["windows"] == {"num_frames": 4, "windows": 2}
    assert row["compression_rate"] == 1 / 16
    assert row["bits_per_pixel"] == 1536 / (FRAMES * SIDE * SIDE)


def test_bits_are_unknown_without_codes():
    loaded = LoadedModel("a", "untrained", Pool())
    latents = loaded.describe_latents(loaded.encode(CLIP).mode(), tuple(CLIP.shape[1:]))
    assert latents["grid"]["bits"] is None
    row = loaded.describe(latents, tuple(CLIP.shape[1:]), {}, CPU)
    assert row["bits_per_pixel"] is None
    assert row["windows"] is None


@pytest.mark.parametrize(
    ("claimed", "agrees"), [(1 / 16, True), (0.06, True), (0.0596, True), (0.059, False), (0.07, False)]
)
def test_a_claimed_rate_agrees_within_a_twentieth(claimed, agrees):
    loaded = LoadedModel("a", "untrained", Pool(), claimed_rate=claimed)
    latents = loaded.describe_latents(loaded.encode(CLIP).mode(), tuple(CLIP.shape[1:]))
    row = loaded.describe(latents, tuple(CLIP.shape[1:]), {}, CPU)
    assert row["claimed"] == {"rate": claimed, "agrees": agrees}


@pytest.mark.parametrize(
    ("frames", "window", "text"), [(4, None, "windows: true"), (3, 3, "multiple of the windows of 3")]
)
def test_clips_that_a_model_does_not_take_are_refused_with_what_to_do(frames, window, text):
    with pytest.raises(UserError, match=text):
        LoadedModel("a", "untrained", Pool(frames=frames), window=window).check(FRAMES, SIDE, SIDE)


def test_windows_are_no_advice_for_another_resolution():
    with pytest.raises(UserError, match="multiples of 5") as caught:
        LoadedModel("a", "untrained", Pool(pool=5)).check(FRAMES, SIDE, SIDE)
    assert "windows" not in str(caught.value)


def test_a_clip_that_fits_goes_through_whole_whatever_the_window():
    model = Pool()
    model.temporal = TemporalSpec(maximum=16)
    assert LoadedModel("a", "untrained", model, window=16).count_windows(FRAMES) == 1
    assert LoadedModel("a", "untrained", model, window=8).count_windows(FRAMES) == 1
    assert LoadedModel("a", "untrained", model, window=4).count_windows(FRAMES) == 2


def test_whole_videos_go_through_in_windows_and_pictures_are_padded_with_black_at_all_sides():
    """The peer's steps by numpy: windows, black around the pictures, and the last frame again at the end."""
    clip = torch.rand(1, 3, 11, 10, 23, generator=torch.Generator().manual_seed(0)) * 2 - 1
    loaded = LoadedModel("a", "untrained", Coded(frames=4), window=4, pads=True)
    pieces = loaded.cut(clip)
    assert [piece.shape[2] for piece in pieces] == [4, 4, 3]
    latents = [loaded.encode(piece).mode() for piece in pieces]
    found = torch.cat([loaded.decode(z, p.shape[2], (10, 23)) for z, p in zip(latents, pieces, strict=True)], 2)
    padded = np.pad(clip.numpy(), ((0, 0), (0, 0), (0, 0), (1, 1), (0, 1)), constant_values=-1)
    padded = np.concatenate([padded, padded[:, :, -1:]], 2)
    model = loaded.model
    parts = [model.decode(model.encode(part).mode()) for part in torch.from_numpy(padded).split(4, 2)]
    assert torch.equal(found, torch.cat(parts, 2)[:, :, :11, 1:11, :23])
    # Latents of the padded frames and pixels count; the rate is of the video's own.
    total = loaded.sum_latents(latents, tuple(clip.shape[1:]))
    assert total == {
        "grid": {
            "shape": None,
            "numbers": 3 * 12 * 3 * 6,
            "rate": 3 * 12 * 3 * 6 / (3 * 11 * 10 * 23),
            "bits": 3.0 * 12 * 3 * 6,
            "values": 3 * 11 * 10 * 23,
        }
    }
    row = loaded.describe(add_latents(total, total), (3, 11, 10, 23), {}, CPU)
    assert row["compression_rate"] == total["grid"]["rate"]
    assert row["bits_per_pixel"] == 3 * 12 * 3 * 6 / (11 * 10 * 23)
    assert row["windows"] == {"num_frames": 4, "windows": None}


def test_a_model_of_one_size_takes_no_videos_of_their_own_size():
    model = MeanColour(4, 32)
    with pytest.raises(UserError, match=r"got \(1, 3, 4, 20, 32\) .*set data.num_frames=4 and data.resolution=32"):
        LoadedModel("a", "untrained", model, window=4, pads=True).check(9, 20, 32)


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
