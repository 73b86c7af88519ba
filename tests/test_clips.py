"""A clip of a file in Python, and back."""

import numpy as np
import pytest
import torch

from vidtwin import UserError, load_clip, save_clip
from vidtwin.video import VideoError, iter_frames, write_video


def pictures(count: int) -> np.ndarray:
    ramp = np.linspace(0, 150, 48)[None, None, :, None]
    return np.broadcast_to(ramp + 3 * np.arange(count)[:, None, None, None], (count, 32, 48, 3)).astype(np.uint8)


def test_a_clip_goes_to_a_file_and_back(tmp_path):
    clip = torch.from_numpy(pictures(12)).permute(3, 0, 1, 2)[None] / 127.5 - 1
    path = save_clip(tmp_path / "a.mp4", clip, 12)
    again = load_clip(path, num_frames=12)
    assert again.shape == (1, 3, 12, 32, 48)
    assert float((again - clip).abs().mean()) < 0.02
    later = load_clip(path, start=0.5, fps=6, num_frames=3)
    assert torch.equal(later, again[:, :, [6, 8, 10]])


def test_a_model_says_length_size_and_multiples(tmp_path):
    from sweeping import Pool
    from tiny import tiny_model

    write_video(tmp_path / "a.mp4", pictures(20), 12)
    model = tiny_model()
    assert load_clip(tmp_path / "a.mp4", model).shape[2:] == (model.num_frames, model.resolution, model.resolution)
    clip = load_clip(tmp_path / "a.mp4", Pool(pool=5, frames=8))
    assert clip.shape == (1, 3, 8, 35, 50)
    assert torch.equal(clip[..., 48:], clip[..., 47:48].expand(-1, -1, -1, -1, 2))
    frames = np.stack(list(iter_frames(tmp_path / "a.mp4")))[:8]
    assert torch.equal(
        ((clip[0, :, :, :32, :48] + 1) * 127.5).round().byte().permute(1, 2, 3, 0), torch.from_numpy(frames)
    )


def test_invalid_and_short_clips_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"one clip .* got \(2, 3, 4, 8, 8\)"):
        save_clip(tmp_path / "a.mp4", torch.zeros(2, 3, 4, 8, 8))
    write_video(tmp_path / "b.mp4", pictures(5), 12)
    with pytest.raises(VideoError, match="ends after 5 frames"):
        load_clip(tmp_path / "b.mp4")
