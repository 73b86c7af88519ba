"""Clips depend on (seed, epoch, index) alone; ranks share them; evaluation sees each once; errors are one line."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from vidtwin.apply.windows import windows
from vidtwin.data import ClipSettings
from vidtwin.datamodules.clips import Video, VideoClips
from vidtwin.datamodules.data_module import ClipDataModule
from vidtwin.datamodules.sampler import ClipSampler
from vidtwin.datamodules.synthetic import Synthetic
from vidtwin.datamodules.ucf101 import UCF101
from vidtwin.errors import UserError
from vidtwin.video import survey, write_video
from vidtwin.video.convert import to_clip

Make = Callable[..., ClipDataModule]
SMALL: dict[str, Any] = {"num_frames": 4, "resolution": 16, "batch_size": 3}


@pytest.fixture
def make(small_ucf: Path) -> Make:
    return lambda **kwargs: UCF101(str(small_ucf), **(SMALL | {"num_workers": 0} | kwargs))


def epoch_of(data: ClipDataModule, epoch: int, loader: Any = None) -> list[dict[str, Any]]:
    loader = loader or data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def assert_same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    assert [batch["name"] for batch in a] == [batch["name"] for batch in b]
    assert all(torch.equal(x["clip"], y["clip"]) for x, y in zip(a, b, strict=True))


def test_workers_hand_out_bytes_and_the_device_makes_floats(make: Make) -> None:
    data = make(num_workers=1)
    batch = next(iter(data.train_dataloader()))
    assert batch["clip"].shape == (3, 4, 16, 16, 3)
    assert batch["clip"].dtype == torch.uint8
    batch = data.on_after_batch_transfer(batch, 0)
    assert batch["clip"].shape == (3, 3, 4, 16, 16)
    assert batch["clip"].dtype == torch.float32
    assert batch["clip"].is_contiguous()
    assert batch["label"].dtype == batch["start_frame"].dtype == torch.int64
    assert all(isinstance(name, str) for name in batch["name"])


def test_bytes_span_minus_one_to_one() -> None:
    frames = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1, 1).expand(1, 2, 1, 1, 3)
    assert to_clip(frames)[0, :, :, 0, 0].tolist() == [[-1.0, 1.0]] * 3


def test_the_number_of_workers_changes_no_clip(make: Make) -> None:
    assert_same(epoch_of(make(), 3), epoch_of(make(num_workers=2), 3))


def test_epochs_differ_and_come_back_with_persistent_workers(make: Make) -> None:
    data = make(num_workers=2)
    loader = data.train_dataloader()
    first, second, again = (epoch_of(data, epoch, loader) for epoch in (0, 1, 0))
    assert_same(first, again)
    assert [b["name"] for b in first] != [b["name"] for b in second]
    clips = [
        {n: c for batch in batches for n, c in zip(batch["name"], batch["clip"], strict=True)}
        for batches in (first, second)
    ]
    common = set(clips[0]) & set(clips[1])
    assert common
    assert any(not torch.equal(clips[0][name], clips[1][name]) for name in common)


def test_seeds_differ(make: Make) -> None:
    assert [b["name"] for b in epoch_of(make(seed=1), 0)] != [b["name"] for b in epoch_of(make(seed=2), 0)]


class Recorder(LightningModule):
    """Notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[int, list[str]] = {}
        self.inputs: list[Tensor] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.seen.setdefault(self.current_epoch, []).extend(batch["name"])
        self.inputs.append(batch["clip"])
        return self.weight.sum()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None: ...

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[str]:
        return batch["name"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(tmp_path: Path, **kwargs: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(
        accelerator="cpu", devices=1, default_root_dir=tmp_path, enable_model_summary=False, **(quiet | kwargs)
    )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_lightning_advances_the_epoch(make: Make, tmp_path: Path, num_workers: int) -> None:
    module = Recorder()
    trainer(tmp_path, max_epochs=3).fit(module, make(num_workers=num_workers))
    for epoch in range(3):
        expected = [name for batch in epoch_of(make(), epoch) for name in batch["name"]]
        assert module.seen[epoch] == expected
    assert module.inputs[0].shape == (3, 3, 4, 16, 16)


def test_a_resumed_run_begins_with_the_right_epoch(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    first = trainer(tmp_path, max_epochs=1)
    first.fit(Recorder(), make(num_workers=1))
    first.save_checkpoint(path)
    module = Recorder()
    trainer(tmp_path, max_epochs=2).fit(module, make(num_workers=1), ckpt_path=path)
    assert module.seen == {1: [name for batch in epoch_of(make(), 1) for name in batch["name"]]}


def test_predict_goes_through_the_test_clips(make: Make, tmp_path: Path) -> None:
    data = make()
    batches = trainer(tmp_path).predict(Recorder(), data)
    assert [name for batch in batches or [] for name in batch] == [video.name for video in data.videos("test")]


def test_ranks_share_the_training_clips_equally() -> None:
    shares = [ClipSampler(11, shuffle=True, rank=rank, world_size=3) for rank in range(3)]
    for epoch in range(2):
        for share in shares:
            share.set_epoch(epoch)
        keys = [list(share) for share in shares]
        assert [len(k) for k in keys] == [len(share) for share in shares] == [3, 3, 3]
        assert len({index for k in keys for _, index in k}) == 9
        assert {e for k in keys for e, _ in k} == {epoch}
    with pytest.raises(UserError, match="for each of 3 ranks, got 2"):
        ClipSampler(2, shuffle=True, world_size=3)


@pytest.mark.parametrize("world_size", [1, 2, 4, 16])
def test_evaluation_visits_each_clip_once_over_ranks(world_size: int) -> None:
    shares = [ClipSampler(11, shuffle=False, rank=rank, world_size=world_size) for rank in range(world_size)]
    shares[0].set_epoch(5)
    keys = [key for share in shares for key in share]
    assert sorted(keys) == [(0, index) for index in range(11)]
    assert sum(len(share) for share in shares) == 11


def test_the_loader_asks_the_trainer_for_its_rank(make: Make) -> None:
    class SecondOfTwo:
        global_rank, world_size, num_devices = 1, 2, 2

        class strategy:  # noqa: N801
            root_device = torch.device("cpu")

    data = make(eval_batch_size=1)
    data.trainer = SecondOfTwo()  # type: ignore[assignment]
    names = [batch["name"][0] for batch in data.test_dataloader()]
    assert names == [video.name for video in data.videos("test")][1::2]


def test_evaluation_takes_the_middle_of_each_video(make: Make) -> None:
    data = make(num_frames=16, fps=8.0)
    batch = next(iter(data.test_dataloader()))
    # 50 frames hold starts 0 to 3: the last of 16 frames at 8 fps is 46 frames after the first.
    assert batch["start_frame"].tolist() == [1, 1, 1]
    assert data.protocol()["num_clips"] == 4
    assert data.protocol() == make(num_frames=16, fps=8.0, seed=9, num_workers=1).protocol()
    assert data.protocol()["clips_sha256"] != make(num_frames=15).protocol()["clips_sha256"]


def test_null_fps_takes_every_frame(make: Make) -> None:
    assert make(fps=None, num_frames=50).dataset("test")[0]["start_frame"] == 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"num_frames": 17},
            r"got none of 4; .*_c01\.avi: too short: .* 17 at 8 frames per second spans 51, it has 50; .*short_videos",
        ),
        ({"fps": 30.0}, r"_g01_c01\.avi: expected at least data\.fps=30 .* got 25.*4 of them among 4"),
        ({"fps": [30.0, 8.0]}, r"expected at least data\.fps=30 .* got 25"),
    ],
)
def test_evaluation_is_refused_where_all_videos_are_too_short_or_one_too_slow(
    make: Make, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make(**kwargs).test_dataloader()


def test_training_repeats_frames_above_the_rate_of_the_video(make: Make) -> None:
    clip = make(fps=100.0, num_frames=8).dataset("train")[0]["clip"]
    assert any(torch.equal(a, b) for a, b in pairwise(clip))


def test_half_of_the_training_clips_are_mirrored(tmp_path: Path) -> None:
    picture = torch.zeros(32, 32, 3, dtype=torch.uint8).numpy()
    picture[:, 16:] = 255
    path = write_video(tmp_path / "a.avi", [picture] * 8, 8, "mpeg4")

    def mirrored(split: str, flip: bool = True) -> int:
        dataset = VideoClips([Video(path, "a")], ClipSettings(4, 16, 8.0, horizontal_flip=flip), split)
        return sum(int(dataset[epoch, 0]["clip"][0, 8, 0, 0]) > 128 for epoch in range(40))

    assert 10 < mirrored("train") < 30
    assert mirrored("train", flip=False) == mirrored("test") == 0


def test_without_augment_training_takes_the_clip_that_evaluation_would_take(make: Make) -> None:
    data = make(augment=False, num_frames=8)
    train = data.dataset("train")
    evaluation = VideoClips(data.videos("train"), ClipSettings(8, 16, 8.0))
    for index in range(len(train)):
        expected = evaluation[index]
        for epoch in (0, 5):
            item = train[epoch, index]
            assert torch.equal(item.pop("clip"), expected["clip"])
            assert item == {key: value for key, value in expected.items() if key != "clip"}
    first, second = epoch_of(data, 0), epoch_of(data, 1)
    assert [b["name"] for b in first] != [b["name"] for b in second]  # still shuffled


def test_windows_are_those_of_encode_from_a_random_multiple_of_their_length(make: Make) -> None:
    data = make(augment="windows", fps=None)
    train = data.dataset("train")
    info = survey(data.videos("train")[0].path)
    every = {window.start_frame: window.frames for window in windows(info.path, 4, 16) if window.num_frames == 4}
    drawn = [train[epoch, 0] for epoch in range(150)]
    assert len({item["start_frame"] for item in drawn}) == len(every) > 1
    assert all((item["clip"].numpy() == every[item["start_frame"]]).all() for item in drawn)
    assert data.describe("train") != make(fps=None).describe("train")  # a cache of other clips is refused


def test_impossible_arguments_are_named() -> None:
    cases: list[tuple[dict[str, Any], str]] = [({"num_frames": 0}, "data.num_frames"), ({"fps": -1.0}, "data.fps")]
    cases.append(({"augment": "window"}, "data.augment to be true, false or windows, got 'window'"))
    cases.append(({"augment": "false"}, "data.augment to be true, false or windows, got 'false'"))
    for kwargs, message in cases:
        with pytest.raises(UserError, match=message):
            UCF101("anywhere", **kwargs)


def test_evaluation_with_fewer_clips_than_ranks_is_refused(monkeypatch):
    # A rank without a clip would leave the others waiting for it.
    data = Synthetic(num_frames=2, resolution=16, num_test=1, num_workers=0)
    trainer = SimpleNamespace(global_rank=1, world_size=2, num_devices=2)
    monkeypatch.setattr(data, "trainer", trainer)
    with pytest.raises(UserError, match=r"at least one clip of the test split for each of 2 ranks, got 1"):
        data.test_dataloader()
