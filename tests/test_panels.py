"""Pictures: the right pixels in the right places, and files that decode back."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from vidtwin import panels
from vidtwin.autoencoder import Reconstruction
from vidtwin.models.vidtwin import VidTwin


def frames(seed=0, length=5, height=71, width=95):
    return np.random.default_rng(seed).integers(0, 256, (length, height, width, 3), dtype=np.uint8)


def test_pixels_are_rounded_and_values_outside_the_range_clipped():
    values = torch.tensor([-2.0, -1.0, 0.0, 1 / 255, 1.0, 7.0])
    clip = values.expand(3, 1, 1, 6)
    shown = panels.to_uint8(clip.to(torch.float32))
    assert shown.shape == (1, 1, 6, 3)
    assert shown.dtype == np.uint8
    assert shown[0, 0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]
    levels = torch.arange(256).expand(3, 1, 1, 256) / 127.5 - 1
    assert panels.to_uint8(levels)[0, 0, :, 0].tolist() == list(range(256))


def test_axes_are_time_height_width_colour():
    clip = torch.full((3, 2, 4, 6), -1.0)
    clip[1, 0, 2, 5] = 1.0
    shown = panels.to_uint8(clip)
    assert shown.shape == (2, 4, 6, 3)
    assert np.argwhere(shown).tolist() == [[0, 2, 5, 1]]


def test_a_clip_is_shown_with_its_reconstruction_and_each_latent_alone():
    torch.manual_seed(0)
    model = VidTwin(
        num_frames=2, resolution=16, patch_size=8, hidden_size=24, depth=1, num_heads=2, structure_width=4
    ).eval()
    clip = torch.rand(3, 3, 2, 16, 16) * 2 - 1
    reconstruction = model(clip)
    shown = panels.views(model, clip, reconstruction)
    assert [list(views) for views in shown] == [["input", "reconstruction", "structure only", "dynamics only"]] * 3
    assert {view.shape for views in shown for view in views.values()} == {(2, 16, 16, 3)}
    with torch.no_grad():
        dynamics = model.decode({"dynamics": reconstruction.latents["dynamics"]})
    for index, views in enumerate(shown):
        np.testing.assert_array_equal(views["input"], panels.to_uint8(clip[index]))
        np.testing.assert_array_equal(views["reconstruction"], panels.to_uint8(reconstruction.clip[index]))
        difference = views["dynamics only"].astype(int) - panels.to_uint8(dynamics[index])
        assert abs(difference).max() <= 1  # another batch may round the other way


def test_a_model_that_needs_all_its_latents_is_shown_without_parts():
    model = VidTwin(num_frames=2, resolution=16, patch_size=8, hidden_size=24, depth=1, num_heads=2)
    model.partial_latents = False
    clip = torch.zeros(1, 3, 2, 16, 16)
    shown = panels.views(model, clip, Reconstruction(clip, {"structure": torch.zeros(1)}))
    assert [list(views) for views in shown] == [["input", "reconstruction"]]


@pytest.mark.parametrize(("height", "width"), [(70, 96), (71, 97)])
def test_views_stand_side_by_side_on_even_sides(height, width):
    first, second, third = (frames(seed, height=height, width=width) for seed in range(3))
    joined = panels.side_by_side({"input": first, "reconstruction": second, "structure only": third})
    assert joined.shape[1] % 2 == joined.shape[2] % 2 == 0
    assert joined.shape[0] == 5
    title = 14
    for index, view in enumerate((first, second, third)):
        inside = joined[:, title : title + height, index * width : (index + 1) * width]
        np.testing.assert_array_equal(inside, view)


def test_small_views_are_shown_enlarged_pixel_by_pixel():
    view = frames(height=32, width=32)
    shown = panels.side_by_side({"input": view})[:, 14:]
    np.testing.assert_array_equal(shown[:, ::4, ::4], view)
    np.testing.assert_array_equal(shown[:, 3::4, 3::4], view)


def test_each_view_carries_its_own_name():
    view = frames(width=66)
    titles = [panels.side_by_side({name: view})[0, :14] for name in ("input", "reconstruction", "input")]
    np.testing.assert_array_equal(titles[0], titles[2])
    assert (titles[0] != titles[1]).any()
    assert (titles[0] < 128).any()


@pytest.mark.parametrize(("length", "chosen"), [(16, [0, 3, 6, 9, 12, 15]), (6, [0, 1, 2, 3, 4, 5]), (2, [0, 1])])
def test_a_filmstrip_shows_frames_evenly_over_the_clip(length, chosen):
    first, second = frames(0, length), frames(1, length)
    strip = panels.filmstrip({"input": first, "reconstruction": second})
    label = strip.shape[1] - len(chosen) * 95
    assert label > 0
    assert strip.shape[0] == 2 * 71
    for row, view in enumerate((first, second)):
        expected = np.concatenate([view[index] for index in chosen], axis=1)
        np.testing.assert_array_equal(strip[row * 71 : (row + 1) * 71, label:], expected)


def test_png_decodes_to_the_same_pixels():
    image = frames()[0]
    decoded = Image.open(io.BytesIO(panels.png(image)))
    assert decoded.format == "PNG"
    np.testing.assert_array_equal(np.asarray(decoded.convert("RGB")), image)


def test_gif_decodes_to_every_frame_at_its_time():
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [128, 128, 128]], dtype=np.uint8)
    clip = np.broadcast_to(colours[:, None, None], (4, 12, 16, 3)).copy()
    decoded = Image.open(io.BytesIO(panels.gif(clip, fps=5)))
    assert (decoded.format, decoded.size, decoded.n_frames) == ("GIF", (16, 12), 4)
    for index, colour in enumerate(colours):
        decoded.seek(index)
        assert decoded.info["duration"] == 200
        assert abs(np.asarray(decoded.convert("RGB")).astype(int) - colour).max() <= 8
