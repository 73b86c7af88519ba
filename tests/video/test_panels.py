"""Pictures: the right pixels in the right places, and files that decode back."""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from vidtwin import clips
from vidtwin.autoencoder import Reconstruction
from vidtwin.models.vidtwin import VidTwin
from vidtwin.video import panels
from vidtwin.video.convert import to_uint8


def frames(seed=0, length=5, height=71, width=95):
    return np.random.default_rng(seed).integers(0, 256, (length, height, width, 3), dtype=np.uint8)


def test_a_clip_is_shown_with_its_reconstruction_and_each_latent_alone():
    torch.manual_seed(0)
    model = VidTwin(
        num_frames=2, resolution=16, patch_size=8, hidden_size=24, depth=1, num_heads=2, structure_width=4
    ).eval()
    clip = torch.rand(3, 3, 2, 16, 16) * 2 - 1
    reconstruction = model(clip)
    shown = clips.views(model, clip, reconstruction)
    assert [list(views) for views in shown] == [["input", "reconstruction", "structure only", "dynamics only"]] * 3
    assert {view.shape for views in shown for view in views.values()} == {(2, 16, 16, 3)}
    with torch.no_grad():
        dynamics = model.decode({"dynamics": reconstruction.latents["dynamics"]})
    for index, views in enumerate(shown):
        np.testing.assert_array_equal(views["input"], to_uint8(clip[index]))
        np.testing.assert_array_equal(views["reconstruction"], to_uint8(reconstruction.clip[index]))
        difference = views["dynamics only"].astype(int) - to_uint8(dynamics[index])
        assert abs(difference).max() <= 1  # another batch may round the other way


def test_a_model_that_needs_all_its_latents_is_shown_without_parts():
    model = VidTwin(num_frames=2, resolution=16, patch_size=8, hidden_size=24, depth=1, num_heads=2)
    model.partial_latents = False
    clip = torch.zeros(1, 3, 2, 16, 16)
    shown = clips.views(model, clip, Reconstruction(clip, {"structure": torch.zeros(1)}))
    assert [list(views) for views in shown] == [["input", "reconstruction"]]


@pytest.mark.parametrize(("height", "width"), [(70, 96), (71, 97)])
def test_views_stand_side_by_side_on_even_sides(height, width):
    first, second, third = (frames(seed, height=height, width=width) for seed in range(3))
    joined = panels.side_by_side({"input": first, "reconstruction": second, "structure only": third})
    assert joined.shape[1] % 2 == joined.shape[2] % 2 == 0
    assert joined.shape[0] == 5
    title = panels.LINE_HEIGHT
    for index, view in enumerate((first, second, third)):
        inside = joined[:, title : title + height, index * width : (index + 1) * width]
        np.testing.assert_array_equal(inside, view)


def test_small_views_are_shown_enlarged_pixel_by_pixel():
    view = frames(height=32, width=32)
    shown = panels.side_by_side({"input": view})[:, panels.LINE_HEIGHT :]
    np.testing.assert_array_equal(shown[:, ::4, ::4], view)
    np.testing.assert_array_equal(shown[:, 3::4, 3::4], view)


def test_each_view_carries_its_own_name():
    view = frames(width=96)
    titles = [
        panels.side_by_side({name: view})[0, : panels.LINE_HEIGHT] for name in ("input", "reconstruction", "input")
    ]
    np.testing.assert_array_equal(titles[0], titles[2])
    assert (titles[0] != titles[1]).any()
    assert (titles[0] < 128).any()


def test_a_column_grows_as_wide_as_its_name_and_a_title_as_high_as_its_lines():
    view = frames(height=70, width=66)
    name = "a name that is wider than its frames"
    wide = panels.side_by_side({name: view, "b": view})
    column = panels._measure(name) + 2 * panels.MARGIN
    title = panels.LINE_HEIGHT
    assert column > 66
    np.testing.assert_array_equal(wide[:, title:, :66], view)
    assert (wide[:, title:, 66:column] == 255).all()
    np.testing.assert_array_equal(wide[:, title:, column : column + 66], view)
    assert (wide[0, :title, column - 2 : column] == 255).all(), "the end of the name is margin: nothing is cut off"
    high = panels.side_by_side({"two\nlines": view, "b": view})
    assert high.shape == (5, 2 * title + 70, 2 * 66, 3)
    np.testing.assert_array_equal(high[:, 2 * title :, 66:], view)


def test_rows_of_views_are_a_grid_with_a_caption_below():
    first, second, third = (frames(seed, height=70, width=96) for seed in range(3))
    title = panels.LINE_HEIGHT
    shown = panels.grid([{"a": first, "b": second}, {"c": third}], caption="what it is")
    row = title + 70
    assert shown.shape == (5, 2 * row + title, 192, 3)
    np.testing.assert_array_equal(shown[:, title:row, :96], first)
    np.testing.assert_array_equal(shown[:, title:row, 96:], second)
    np.testing.assert_array_equal(shown[:, row + title : 2 * row, :96], third)
    assert (shown[:, row : 2 * row, 96:] == 255).all()
    assert (shown[:, 2 * row :] < 128).any()
    long = panels.grid([{"a": first}], caption="a caption of more words than one line has room for")
    assert long.shape[2] == 96
    assert (long.shape[1] - row) % title == 0
    assert long.shape[1] > row + title


@pytest.mark.parametrize(("length", "width"), [(17, 40), (3, 1), (9, 500)])
def test_text_is_wrapped_between_words_and_keeps_them_all(length, width):
    text = " ".join("word" * (1 + k % 3) for k in range(length))
    wrapped = panels.wrap(text, width)
    assert wrapped.replace("\n", " ") == text
    lines = wrapped.split("\n")
    assert all(panels._measure(line) <= width or " " not in line for line in lines)
    for line, following in itertools.pairwise(lines):
        assert panels._measure(f"{line} {following.split()[0]}") > width, "a line holds as many words as it can"


def test_names_of_a_filmstrip_are_never_cut():
    view = frames(height=20)
    name = "a name of many words that is wider than the column of the others"
    strip = panels.filmstrip({"input": view, name: view})
    label = strip.shape[1] - 5 * 95
    assert label > panels.LABEL_WIDTH
    assert (strip[:, label - 2 : label] == 255).all()
    lines = panels.filmstrip({"one\ntwo\nthree": view})
    assert lines.shape[0] == 3 * panels.LINE_HEIGHT, "the row grows as high as its name"


def test_frames_are_shrunk_to_their_longer_side():
    same = frames()
    assert panels.shrink(same, 95) is same
    grey = np.full((2, 100, 300, 3), 77, np.uint8)
    small = panels.shrink(grey, 60)
    assert small.shape == (2, 20, 60, 3)
    assert (small == 77).all()
    assert panels.shrink(np.zeros((1, 2, 400, 3), np.uint8), 20).shape == (1, 1, 20, 3)


@pytest.mark.parametrize("length", [1, 5, 64, 65, 1000])
@pytest.mark.parametrize("window", [1, 16])
def test_moments_are_evenly_over_a_video_of_any_length(length, window):
    moments = panels.StillSampler(6)
    video = np.broadcast_to(np.arange(length)[:, None, None, None], (length, 1, 1, 3))
    numbered = np.concatenate([video % 256, video // 256], axis=2).astype(np.uint8)
    for start in range(0, length, window):
        moments.add({"input": numbered[start : start + window]})
    stills = moments.stills()["input"].astype(int)
    shown = stills[:, 0, 0, 0] + 256 * stills[:, 0, 1, 0]
    wanted = np.linspace(0, length - 1, min(6, length))
    assert len(shown) == len(wanted)
    assert shown[0] == 0
    assert shown[-1] == length - 1
    slack = length / 64 if length > 64 else 0  # up to 64 frames it is exact
    assert abs(shown - wanted).max() <= 0.5 + slack
    assert len(moments.kept) <= moments.room + 1


def test_no_frames_have_no_moments():
    assert panels.StillSampler().stills() == {}


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
