"""Latents on disk as the data of a training."""

import hashlib
import json
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from vidtwin.datamodules.latents import LatentClips, LatentDataModule
from vidtwin.errors import UserError
from vidtwin.storage.latent_files import (
    Latent,
    Manifest,
    Piece,
    Shard,
    StoredPiece,
    VideoEntry,
    channel_statistics,
    code_dtype,
    shard_path,
    tensor_name,
    write_shard,
)

T = 8
VIDEOS = {"a": 20, "b": 3, "c": 17, "d": 40, "e": 8}  # frames: 3, 1, 3, 5 and 1 windows


def write(
    folder: Path,
    videos: dict[str, int] = VIDEOS,
    kind: str = "gaussian",
    moments: bool = True,
    per_shard: int = 4,
    shapes: dict[str, tuple[int, ...]] | None = None,
    weights: str = "ab",
    dtype: torch.dtype = torch.float32,
) -> dict[tuple[str, int], torch.Tensor]:
    """Latents "grid" of random numbers → by video and start frame what is stored."""
    random = torch.Generator().manual_seed(len(weights))
    entries = [
        VideoEntry(name, f"{name}.mp4", index % 2, "25", frames, 1, 1, frames, 16, 16)
        for index, (name, frames) in enumerate(videos.items())
    ]
    places = [(video, first) for video, entry in enumerate(entries) for first in range(-(-entry.planned_frames // T))]
    shards: list[list[Piece]] = []
    for start in range(0, len(places), per_shard):
        of_video: dict[int, list[int]] = {}
        for video, window in places[start : start + per_shard]:
            of_video.setdefault(video, []).append(window)
        shards.append([Piece(video, rows[0], len(rows), len(rows)) for video, rows in of_video.items()])
    shape = None if shapes else (2, 3, 4)
    latents = {"grid": Latent(kind, shape, 512 if kind == "codes" else None)}  # type: ignore[arg-type]
    model = {"class_path": "some.Model", "init_args": {}, "weights_sha256": weights}
    settings = {"num_frames": T, "posterior": "moments" if moments else "mean"}
    manifest = Manifest(model, settings, latents, entries, shards, ["x", "y"], complete=True)
    held: dict[tuple[str, int], torch.Tensor] = {}
    sums = []
    for number, pieces in enumerate(shards):
        tensors, stored = {}, []
        for place, piece in enumerate(pieces):
            entry = entries[piece.video]
            size = (piece.windows, *(shapes or {}).get(entry.name, (2, 3, 4)))
            scale = torch.tensor([1.0, 50.0]).reshape(2, 1, 1)
            value = (torch.randn(size, generator=random) * scale + scale).to(dtype)
            if kind == "codes":
                value = torch.randint(512, size, generator=random).to(code_dtype(512))
            tensors[tensor_name(place, "grid")] = value
            if moments and kind == "gaussian":
                tensors[tensor_name(place, "grid", "logvar")] = torch.full(size, 2 * np.log(3.0)).to(dtype)
            starts = [T * (piece.first_window + row) for row in range(piece.windows)]
            held |= {(entry.name, start): row for start, row in zip(starts, value, strict=True)}
            real = [min(T, entry.planned_frames - start) for start in starts]
            stored.append(StoredPiece(entry.name, piece.first_window, real, 16, 16))
        write_shard(shard_path(folder, number), manifest.digest, stored, tensors)
        sums.append(Shard(shard_path(folder, number), manifest.digest).sums)
    manifest.statistics = channel_statistics(sums)
    manifest.write(folder)
    return held


def made(folder: Path, **arguments: Any) -> LatentDataModule:
    return LatentDataModule(str(folder), **{"num_workers": 0, "batch_size": 2, **arguments})


def batches(data: LatentDataModule, split: str = "train", epoch: int = 0) -> list[dict[str, Any]]:
    """As a training gets them, without a trainer."""
    loader: Any = data.train_dataloader() if split == "train" else data.val_dataloader()
    loader.sampler.set_epoch(epoch)
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


def keys(found: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [key for batch in found for key in zip(batch["name"], batch["start_frame"].tolist(), strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_window_comes_once_as_it_is_stored(tmp_path, dtype):
    held = write(tmp_path, dtype=dtype)
    found = batches(made(tmp_path, normalize=False, batch_size=1))
    assert sorted(keys(found)) == sorted(held)
    for batch in found:
        key = (batch["name"][0], int(batch["start_frame"]))
        assert batch["latents"]["grid"].dtype == torch.float32
        assert torch.equal(batch["latents"]["grid"][0], held[key].float())
        assert int(batch["num_frames"]) == min(T, VIDEOS[key[0]] - key[1])
        assert int(batch["label"]) == list(VIDEOS).index(key[0]) % 2
        assert "codes" not in batch


def test_codes_come_as_integers_and_are_not_normalized(tmp_path):
    held = write(tmp_path, kind="codes", moments=False)
    for batch in batches(made(tmp_path)):
        assert "latents" not in batch
        for row, key in zip(batch["codes"]["grid"], keys([batch]), strict=True):
            assert row.dtype == torch.int64
            assert torch.equal(row, held[key].long())


def test_normalized_channels_have_mean_zero_and_deviation_one_and_come_back(tmp_path):
    held = write(tmp_path)
    data = made(tmp_path, batch_size=1)
    found = batches(data)
    channels = torch.cat([batch["latents"]["grid"] for batch in found]).double().transpose(0, 1).flatten(1)
    assert torch.allclose(channels.mean(1), torch.zeros(2).double(), atol=1e-6)
    assert torch.allclose(channels.std(1, correction=0), torch.ones(2).double(), atol=1e-6)
    for batch, key in zip(found, keys(found), strict=True):
        assert torch.allclose(data.denormalize(batch["latents"])["grid"][0], held[key], atol=1e-4)


def test_samples_have_the_posteriors_spread_and_depend_on_seed_and_epoch_alone(tmp_path):
    held = write(tmp_path, {"a": 8 * 400})
    first, again = (batches(made(tmp_path, posterior="sample", normalize=False, batch_size=1)) for _ in range(2))
    noise = torch.stack([b["latents"]["grid"][0] - held[k] for b, k in zip(first, keys(first), strict=True)])
    assert noise.std() == pytest.approx(3.0, rel=0.03)
    assert noise.mean() == pytest.approx(0.0, abs=0.1)
    assert all(torch.equal(a["latents"]["grid"], b["latents"]["grid"]) for a, b in zip(first, again, strict=True))
    other = batches(made(tmp_path, posterior="sample", normalize=False, batch_size=1), epoch=1)
    by_key = dict(zip(keys(other), other, strict=True))
    assert not torch.equal(by_key[keys(first)[0]]["latents"]["grid"], first[0]["latents"]["grid"])
    whitened = torch.cat([b["latents"]["grid"] for b in batches(made(tmp_path, posterior="sample", batch_size=1))])
    assert whitened.transpose(0, 1).flatten(1).std(1).tolist() == pytest.approx([1, 1], rel=0.03)


def test_the_order_is_another_one_in_each_epoch_and_the_same_for_any_number_of_workers(tmp_path):
    write(tmp_path)
    first, second = (keys(batches(made(tmp_path), epoch=epoch)) for epoch in (0, 1))
    assert first != second
    assert keys(batches(made(tmp_path, num_workers=2))) == first
    assert keys(batches(made(tmp_path, seed=1))) != first


def test_validation_takes_a_share_of_the_videos_that_their_names_decide(tmp_path):
    videos = {f"class/video{n}": 8 for n in range(40)}
    write(tmp_path, videos)
    data = made(tmp_path, val_share=0.25)
    trained, validated = ({video.name for video in data.dataset(split).videos} for split in ("train", "val"))
    digests = {name: hashlib.sha256(name.encode()).digest() for name in videos}
    assert validated == {name for name, digest in digests.items() if digest[0] < 64}
    assert trained | validated == set(videos)
    assert not trained & validated
    assert sorted(name for name, _ in keys(batches(data, "val"))) == sorted(validated)
    more = tmp_path / "more"
    more.mkdir()
    write(more, videos | {"class/new": 8})
    assert {v.name for v in made(more, val_share=0.25).dataset("val").videos} - {"class/new"} == validated


def test_validation_has_a_folder_of_its_own(tmp_path):
    for name in ("train", "val", "other"):
        (tmp_path / name).mkdir()
    write(tmp_path / "train")
    held = write(tmp_path / "val", {"x": 30})
    data = made(tmp_path / "train", val_root=str(tmp_path / "val"))
    found = batches(data, "val")
    assert keys(found) == sorted(held)
    back = data.denormalize(found[0]["latents"])["grid"]  # by the statistics of the training data
    assert torch.allclose(back[0], held[("x", 0)], atol=1e-4)
    write(tmp_path / "other", {"x": 30}, weights="abc")
    with pytest.raises(UserError, match="Expected latents of the same weights in"):
        made(tmp_path / "train", val_root=str(tmp_path / "other")).setup("fit")
    manifest = Manifest.read(tmp_path / "val")
    manifest.classes = ["w", "x", "y"]  # label 1 is another class there
    manifest.write(tmp_path / "val")
    with pytest.raises(UserError, match=r"Expected the same classes in .*; only one has w. Set data.val_share"):
        made(tmp_path / "train", val_root=str(tmp_path / "val")).setup("fit")


class Model(lightning.LightningModule):
    """Notes the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[str, int]] = []
        self.validated: list[tuple[str, int]] = []

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        self.seen += keys([batch])
        return (self.weight * batch["latents"]["grid"].mean()).square().sum()

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        self.validated += keys([batch])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, data: LatentDataModule, steps: int, ckpt: Path | None = None) -> tuple[Model, Path]:
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    model = Model()
    trainer.fit(model, data, ckpt_path=str(ckpt) if ckpt else None)
    path = folder / f"{steps}.ckpt"
    trainer.save_checkpoint(path)
    return model, path


def test_a_resumed_training_starts_with_the_very_next_batch(tmp_path):
    folder = tmp_path / "latents"
    folder.mkdir()
    write(folder)
    whole, _ = fit(tmp_path, made(folder, val_share=0.3), 11)
    first, ckpt = fit(tmp_path, made(folder, val_share=0.3), 4)
    second, _ = fit(tmp_path, made(folder, val_share=0.3), 11, ckpt)
    assert first.seen + second.seen == whole.seen
    assert whole.validated
    plain, _ = fit(tmp_path, made(folder), 3)
    assert len(plain.seen) == 6
    assert plain.validated == []


def test_ranks_have_equal_shares_of_one_order(tmp_path, monkeypatch):
    write(tmp_path)
    whole = keys(batches(made(tmp_path, batch_size=4)))
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(LatentDataModule, "_ranks", lambda self, rank=rank: (rank, 2))
        shares.append(keys(batches(made(tmp_path))))
    assert len(shares[0]) == len(shares[1]) == 6
    assert [key for pair in zip(*shares, strict=True) for key in pair] == whole[:12]


def test_a_window_reads_no_more_of_its_shard_than_itself(tmp_path):
    write(tmp_path)
    clips = LatentClips(tmp_path)
    path = shard_path(tmp_path, 0)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the last number of another window
    path.write_bytes(content)
    assert clips[0]["name"] == "a"  # no checksum over the whole


def test_constant_channels_are_moved_and_not_divided(tmp_path):
    write(tmp_path)
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    content["statistics"]["grid"]["std"][0] = 0.0
    path.write_text(json.dumps(content))
    assert all(torch.isfinite(batch["latents"]["grid"]).all() for batch in batches(made(tmp_path)))


def test_a_truncated_shard_is_named_before_training(tmp_path):
    write(tmp_path)
    path = shard_path(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"shard-00001\.safetensors: expected a whole shard"):
        made(tmp_path).setup("fit")


def test_latents_that_are_not_complete_are_refused(tmp_path):
    write(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"complete": true', '"complete": false'))
    with pytest.raises(UserError, match="got unfinished ones; run `vidtwin encode` again"):
        made(tmp_path).setup("fit")


def test_shapes_that_differ_are_an_error_with_advice(tmp_path):
    write(tmp_path, shapes={"b": (2, 3, 5)})
    with pytest.raises(UserError, match=r"Expected grid of one shape .* encode with --size"):
        made(tmp_path).setup("fit")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"batch_size": 0}, "data.batch_size of at least 1"),
        ({"num_workers": -1}, "data.num_workers of at least 0"),
        ({"val_share": 1.0}, "data.val_share from 0 to below 1"),
        ({"val_share": 0.1, "val_root": "x"}, "data.val_root or data.val_share, got both"),
        ({"posterior": "mode"}, "data.posterior to be mean or sample"),
        ({"posterior": "sample"}, "Expected moments of grid for data.posterior=sample"),
        ({"val_share": 1e-9}, "got none of the 5 in .* by data.val_share=1e-09"),
        ({"val_share": 1 - 1e-9}, "Expected latents to train on"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, arguments, expected):
    write(tmp_path, moments=False)
    with pytest.raises(UserError, match=expected):
        made(tmp_path, **arguments).setup("fit")


def test_latents_may_be_links_as_in_a_snapshot_of_the_hub(tmp_path):
    held = write(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{path.name}")
    clips = LatentClips(tmp_path / "snapshot")
    assert len(clips) == len(held)
    assert torch.equal(clips[0]["latents"]["grid"], held["a", 0].float())
