"""Streamed clips are those of the files, in an order that ranks and workers do not change; storage may fail."""

import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from vidtwin.datamodules.shards import streamed as streaming
from vidtwin.datamodules.shards.streamed import InterleavedShuffle, RemoteShards
from vidtwin.datamodules.shards.writer import write_cache
from vidtwin.datamodules.streaming import Streamed
from vidtwin.datamodules.ucf101 import UCF101
from vidtwin.errors import UserError
from vidtwin.video import VideoError

SMALL: dict[str, Any] = {"num_frames": 4, "resolution": 16, "batch_size": 2, "num_workers": 0}

Out = Callable[[str], Path]
Make = Callable[..., Streamed]


@pytest.fixture(scope="module")
def files(small_ucf: Path) -> UCF101:
    """8 training clips, 4 of validation, 4 of test."""
    return UCF101(str(small_ucf), **SMALL)


@pytest.fixture(scope="module")
def out(files: UCF101, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `clips` (two epochs of 3 shards) and `videos` (4 shards of training videos)."""
    folder = tmp_path_factory.mktemp("shards")
    write_cache(files, folder / "clips", epochs=2, shard_bytes=10_000)
    write_cache(files, folder / "videos", format="videos", shard_bytes=65_000)
    return folder


@pytest.fixture
def make(out: Path, tmp_path: Path) -> Make:
    def make(what: str = "videos", **kwargs: Any) -> Streamed:
        kwargs = {"url": str(out / what), "cache_dir": str(tmp_path / "here"), "lanes": 2} | SMALL | kwargs
        return Streamed(**kwargs)

    return make


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    a, b = dict(a), dict(b)
    assert np.array_equal(np.asarray(a.pop("clip")), np.asarray(b.pop("clip")))
    assert a == b


@pytest.mark.parametrize("prefix", ["", "local:"])
@pytest.mark.parametrize("what", ["clips", "videos"])
def test_streamed_clips_are_those_of_the_files_bit_for_bit(make, out, files, what, prefix):
    if prefix:
        pytest.importorskip("litdata")
    data = make(what, url=f"{prefix}{out / what}")
    for split, epochs in (("train", 2), ("val", 1), ("test", 1)):
        here, there = files.dataset(split), data.dataset(split)
        assert len(here) == len(there)
        for index in range(len(here)):
            assert split == "train" or here.identity(index) == there.identity(index)
            for epoch in range(epochs):
                assert_equal(here[epoch, index], there[epoch, index])
    assert data.protocol() == files.protocol()


def test_videos_are_decoded_by_any_arguments(make, small_ucf):
    arguments = {"num_frames": 6, "resolution": 24, "fps": [4.0, 12.0], "seed": 3, "horizontal_flip": False}
    here = UCF101(str(small_ucf), **(SMALL | arguments)).dataset("train")
    there = make(**arguments).dataset("train")
    for index in range(len(here)):
        assert_equal(here[5, index], there[5, index])


@pytest.mark.parametrize(
    ("arguments", "difference"), [({"fps": 4.0}, "fps=8.0, not fps=4.0"), ({"seed": 1}, "seed=0, not seed=1")]
)
def test_decoded_clips_want_the_arguments_they_were_made_with(make, arguments, difference):
    with pytest.raises(UserError, match=difference):
        make("clips", **arguments).dataset("train")


def test_an_order_is_a_shuffle_of_all_clips():
    for clips, shards, lanes in ((1, 1, 4), (7, 3, 2), (100, 10, 4), (64, 8, 8), (50, 7, 48)):
        numbers = np.sort(np.random.default_rng(0).integers(0, shards, clips))
        orders = [InterleavedShuffle(numbers, lanes, 5).order(epoch) for epoch in range(3)]
        for order in orders:
            assert sorted(order) == list(range(clips))
        if clips > 10:
            assert not np.array_equal(orders[0], orders[1])
        assert np.array_equal(orders[2], InterleavedShuffle(numbers, lanes, 5).order(2))


def test_neighbours_come_from_different_shards_and_ranks_read_shards_of_their_own():
    shards = np.repeat(np.arange(32), 25)
    order = InterleavedShuffle(shards, lanes=8, seed=0).order(0)
    for place in range(0, 800, 8):
        assert len(set(shards[order[place : place + 8]])) == 8
    for ranks in (2, 4, 8):
        read = [set(shards[order[rank::ranks]].tolist()) for rank in range(ranks)]
        assert all(a.isdisjoint(b) for i, a in enumerate(read) for b in read[:i])
    # Of lanes that are not as long as a whole number of shards, neighbours share one.
    uneven = np.repeat(np.arange(30), 24)
    order = InterleavedShuffle(uneven, lanes=4, seed=0).order(0)
    assert sum(len(set(uneven[order[rank::4]].tolist())) for rank in range(4)) <= 30 + 3


def test_a_lane_knows_the_shard_that_follows():
    shards = np.repeat(np.arange(6), 4)
    lanes = InterleavedShuffle(shards, lanes=1, seed=0)
    visited = list(dict.fromkeys(shards[lanes.order(3)].tolist()))
    assert [lanes.following(3, shard) for shard in visited] == [*visited[1:], None]


def on_rank(rank: int, ranks: int, data: Streamed, batches: int = 0) -> Streamed:
    """The data as one of several processes sees them, each of which has trained so many batches."""
    loop = SimpleNamespace(
        epoch_progress=SimpleNamespace(current=SimpleNamespace(processed=0)),
        epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=SimpleNamespace(processed=batches))),
    )
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank, world_size=ranks, num_devices=ranks, strategy=strategy, fit_loop=loop,
        state=SimpleNamespace(fn="fit"), is_global_zero=rank == 0,
    )  # fmt: skip
    return data


def names_of(data: Streamed, batches: int = 99) -> list[str]:
    return [name for batch in islice(data.train_dataloader(), batches) for name in batch["name"]]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_ranks_and_workers_change_no_order(make, workers):
    small = {"batch_size": 1, "num_workers": workers}
    one = names_of(on_rank(0, 1, make(**small)))
    two = [names_of(on_rank(rank, 2, make(**small))) for rank in (0, 1)]
    assert len(one) == 8
    assert [len(names) for names in two] == [4, 4]
    assert [name for pair in zip(*two, strict=True) for name in pair] == one
    assert names_of(on_rank(0, 1, make(batch_size=4, num_workers=workers))) == one


def test_ranks_have_equally_many_batches_where_clips_are_left(make):
    shares = [names_of(on_rank(rank, 3, make(batch_size=2))) for rank in range(3)]
    assert [len(share) for share in shares] == [2, 2, 2]
    assert len({name for share in shares for name in share}) == 6


def test_ranks_see_each_evaluation_clip_once(make):
    for what in ("clips", "videos"):
        shares = [make(what, batch_size=1) for _ in range(3)]
        names = [b["name"] for rank in range(3) for b in on_rank(rank, 3, shares[rank]).val_dataloader()]
        assert sorted(name for batch in names for name in batch) == [
            f"{name}/v_{name}_g25_c0{k}.avi" for name in ("Bounce", "Drift") for k in (1, 2)
        ]


@pytest.mark.parametrize(("ranks", "then"), [(1, 1), (2, 2), (1, 2), (2, 1)])
def test_every_place_of_two_epochs_is_gone_on_from_by_any_number_of_ranks(make, ranks, then):
    batch = 2 if ranks == 1 else 1  # two clips a step, over all ranks
    after = 2 if then == 1 else 1
    whole = []
    for epoch in range(3):
        state = {"epoch": epoch, "clips": 0, "batches": 0}
        parts = []
        for rank in range(ranks):
            data = make("clips", batch_size=batch)
            data.load_state_dict(state)
            parts.append(names_of(on_rank(rank, ranks, data)))
        whole += [name for step in zip(*parts, strict=True) for name in step] if ranks == 2 else parts[0]
    for steps in range(9):
        first = on_rank(0, ranks, make("clips", batch_size=batch))
        first.train_dataloader()  # notes where it begins
        on_rank(0, ranks, first, batches=steps)  # trained, whatever was loaded
        state = first.state_dict()
        assert state == {"epoch": steps // 4, "clips": steps % 4 * 2, "batches": steps} or steps % 4 == 0
        parts = []
        for rank in range(then):
            data = make("clips", batch_size=after)
            data.load_state_dict(state)
            parts.append(names_of(on_rank(rank, then, data, batches=steps), 2 if then == 2 else 1))
        rest = [name for step in zip(*parts, strict=True) for name in step] if then == 2 else parts[0]
        assert rest == whole[2 * steps : 2 * steps + len(rest)]


class Model(LightningModule):
    """One number that learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Diary(Callback):
    """Names and sums of the clips of each batch; a checkpoint after each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: list[Any] = []

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        self.steps.append((batch["name"], batch["clip"].double().sum((1, 2, 3, 4)).mul(1000).long().tolist()))
        trainer.save_checkpoint(self.folder / f"{len(self.steps)}.ckpt")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_resumes_with_the_very_next_batch_from_every_step_of_two_epochs(make, tmp_path, workers):
    def run(diary: Diary, path: Path | None = None) -> list[Any]:
        trainer = Trainer(
            accelerator="cpu", devices=1, max_steps=8, logger=False, enable_checkpointing=False, callbacks=[diary],
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(Model(), datamodule=make(num_workers=workers), ckpt_path=path)
        return diary.steps

    (tmp_path / "again").mkdir()
    whole = run(Diary(tmp_path))
    assert len(whole) == 8
    assert len({str(step) for step in whole}) == 8
    for steps in range(1, 8) if workers == 0 else (3, 5):
        assert run(Diary(tmp_path / "again"), tmp_path / f"{steps}.ckpt") == whole[steps:]


@pytest.fixture
def broken(small_ucf: Path, tmp_path: Path) -> tuple[UCF101, Path]:
    """One training and one test video whose pictures are damaged, and one training video that is cut off."""
    root = Path(shutil.copytree(small_ucf, tmp_path / "broken"))
    for name in ("Drift/v_Drift_g17_c01.avi", "Bounce/v_Bounce_g01_c02.avi"):
        path = root / "UCF-101" / name
        content = bytearray(path.read_bytes())
        with av.open(str(path)) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
        for packet in packets[5:]:
            first, length = packet.pos + packet.size // 3, packet.size // 2
            content[first : first + length] = np.random.default_rng(0).bytes(length)
        path.write_bytes(content)
    half = root / "UCF-101/Bounce/v_Bounce_g09_c01.avi"
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    data = UCF101(str(root), max_broken=1.0, **SMALL)
    write_cache(data, tmp_path / "shards", ["train", "test"], format="videos", shard_bytes=65_000)
    return data, tmp_path / "shards"


def test_unreadable_clips_are_named_and_treated_as_with_files(make, broken, capfd):
    files, shards = broken
    data = make(url=str(shards), max_broken=1.0)
    assert data.shards("train").manifest.skipped[0][0] == "Bounce/v_Bounce_g09_c01.avi"
    here, there = files.dataset("train"), data.dataset("train")
    assert len(here) == len(there) == 7
    skipped = set()
    for epoch in range(3):
        for index in range(7):
            a, b = here[epoch, index], there[epoch, index]
            assert_equal(a, b)
            assert b["name"] not in {name for name, _ in b.get("skipped", [])}
            skipped |= {name for name, _ in b.get("skipped", [])}
    assert skipped == {"Drift/v_Drift_g17_c01.avi"}
    assert [len(batch["name"]) for batch in data.train_dataloader()] == [2, 2, 2]
    here, there = files.dataset("test"), data.dataset("test")
    items = [there[0, index] for index in range(4)]
    assert [item.get("name") for item in items].count(None) == 1
    for a, b in zip([here[0, index] for index in range(4)], items, strict=True):
        assert a == b if "skipped" in a else np.array_equal(a["clip"], b["clip"])
    told = "skipped Bounce/v_Bounce_g09_c01.avi: truncated: its header promises 50 frames, it holds"
    assert capfd.readouterr().err.count(told) == 2  # of the files and of the shards
    with pytest.raises(UserError, match=r"at most a share of data\.max_broken=0 broken videos in split train"):
        make(url=str(shards), max_broken=0.0).dataset("train")


def test_broken_videos_that_are_excluded_are_not_held_against_the_data(make, broken, tmp_path, capfd):
    (tmp_path / "exclude.txt").write_text("Bounce/v_Bounce_g09_c01.avi\n")
    capfd.readouterr()
    assert len(make(url=str(broken[1]), max_broken=0.0, exclude=str(tmp_path / "exclude.txt")).dataset("train")) == 7
    assert "skipped" not in capfd.readouterr().err


def test_videos_may_be_excluded(make, tmp_path):
    (tmp_path / "exclude.txt").write_text("Drift/v_Drift_g17_c01.avi\tdull\n")
    dataset = make(exclude=str(tmp_path / "exclude.txt")).dataset("train")
    names = [dataset[0, index]["name"] for index in range(len(dataset))]
    assert len(names) == 7
    assert "Drift/v_Drift_g17_c01.avi" not in names


class Store:
    """Object storage that may fail."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.failures: list[Exception | bytes] = []


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    downloader = pytest.importorskip("litdata.streaming.downloader")
    storage = Store()

    class Fake(downloader.LocalDownloader):  # type: ignore[name-defined, misc]
        def download_file(self, remote_filepath: str, local_filepath: str) -> None:
            storage.asked.append(Path(remote_filepath).name)
            if storage.failures and remote_filepath.endswith("chunk-0-0.bin"):
                failure = storage.failures.pop(0)
                if isinstance(failure, Exception):
                    raise failure
                Path(local_filepath).write_bytes(failure)
                return
            super().download_file(remote_filepath.removeprefix("fake:/"), local_filepath)

    downloader.register_downloader("fake://", Fake, overwrite=True)
    monkeypatch.setattr(streaming, "_PAUSE", 0.0)
    yield storage
    downloader.unregister_downloader("fake://")


def test_a_shard_is_fetched_once_and_then_read_here(make, out, store):
    for _ in range(2):
        dataset = make("clips", url=f"fake:/{out}/clips").dataset("val")
        for index in range(4):
            dataset[0, index]
    assert sorted(store.asked) == ["chunk-0-0.bin", "chunk-0-1.bin", "manifest.json", "manifest.json"]


def test_a_failing_storage_is_asked_again_and_damage_is_not_taken(make, out, store, files):
    whole = (out / "clips/val/chunk-0-0.bin").read_bytes()
    store.failures = [ConnectionError("reset"), whole[:-1], whole[:-1] + b"?"]
    assert_equal(make("clips", url=f"fake:/{out}/clips").dataset("val")[0, 0], files.dataset("val")[0, 0])
    assert store.asked.count("chunk-0-0.bin") == 4


def test_a_storage_that_keeps_failing_is_one_line(make, out, store):
    store.failures = [ConnectionError("reset by\npeer")] * 9
    dataset = make("clips", url=f"fake:/{out}/clips").dataset("val")
    with pytest.raises(UserError, match=r"chunk-0-0\.bin: .* could not get it: ConnectionError: reset by$"):
        dataset[0, 0]
    assert len(store.failures) == 5


def test_a_missing_cache_is_refused_at_once(make, store):
    with pytest.raises(UserError, match=r"fake://nowhere/val/manifest\.json: expected a file written by `vidtwin"):
        make(url="fake://nowhere").dataset("val")
    assert len(store.asked) == 1
    with pytest.raises(UserError, match=r"/nowhere/val/manifest\.json, got no such file"):
        make(url="/nowhere").dataset("val")


@pytest.fixture
def s3(out: Path) -> Iterator[tuple[str, list[str]]]:
    """An S3 server on this machine with the folder `out` as a bucket, and the files it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> bytes:
            path = out / self.path.partition("?")[0].removeprefix("/bucket/")
            content = path.read_bytes() if path.is_file() else b""
            self.send_response(200 if content else 404)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", '"1"')
            self.send_header("Last-Modified", "Tue, 24 Nov 2026 12:00:00 GMT")
            self.end_headers()
            return content

        def do_GET(self) -> None:
            asked.append(self.path.rpartition("/")[2])
            self.wfile.write(self.do_HEAD())

        def log_message(self, *arguments: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.mark.parametrize("workers", [0, 2])
def test_from_s3_each_shard_comes_once_for_all_workers(make, files, s3, workers):
    pytest.importorskip("litdata")
    address, asked = s3
    key = {"aws_access_key_id": "k", "aws_secret_access_key": "s", "region_name": "us-east-1"}
    options = {"endpoint_url": address, **key}
    data = make("clips", url="s3://bucket/clips", storage_options=options, num_workers=workers, batch_size=1)
    for batch in data.train_dataloader():
        names = [video.name for video in files.videos("train")]
        assert np.array_equal(batch["clip"][0], files.dataset("train")[0, names.index(batch["name"][0])]["clip"])
    assert sorted(asked) == ["chunk-0-0.bin", "chunk-0-1.bin", "chunk-0-2.bin", "manifest.json"]
    with pytest.raises(UserError, match=r"s3://bucket/absent/val/manifest\.json: expected a file .*404"):
        make(url="s3://bucket/absent", storage_options=options).dataset("val")


def test_a_limit_holds_and_what_was_taken_away_comes_again(out, store, tmp_path):
    remote = RemoteShards(f"fake:/{out}/clips/train", tmp_path / "here", limit=20_000)
    for _ in range(2):
        for shard in remote.manifest.shards:
            assert remote(shard).stat().st_size == shard.bytes
            assert sum(path.stat().st_size for path in remote.folder.glob("*.bin")) <= 20_000
    assert store.asked.count("chunk-0-0.bin") == 2


def test_a_limit_below_what_is_read_at_a_time_is_refused(make, out, store):
    with pytest.raises(
        UserError, match=r"Expected data\.cache_gb of at least .* for data\.lanes=2, .* got 1e-05; raise"
    ):
        make(url=f"fake:/{out}/clips", cache_gb=1e-5).dataset("train")


def test_the_shard_that_follows_is_fetched_ahead(make, out, store):
    dataset: Any = make("clips", url=f"fake:/{out}/clips", lanes=1).dataset("train")
    shards = dict.fromkeys(int(index) // 3 for index in dataset.lanes.order(0))
    first = int(dataset.lanes.order(0)[0])
    dataset[0, first]
    second = list(shards)[1]
    waited = threading.Event()
    for _ in range(500):
        if f"chunk-0-{second}.bin" in store.asked:
            break
        waited.wait(0.01)
    assert store.asked == ["manifest.json", f"chunk-0-{first // 3}.bin", f"chunk-0-{second}.bin"]


def test_without_litdata_the_error_names_the_extra_to_install(make, out, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "litdata"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "litdata", None)
    assert len(make().dataset("train")) == 8  # a folder needs none
    with pytest.raises(UserError, match=r"Expected litdata to stream from s3://bucket/val, .*pip install 'vidtwin\[st"):
        make(url="s3://bucket").dataset("val")


def test_a_clip_that_is_not_in_the_shards_raises(broken, make):
    _, shards = broken
    items = make(url=str(shards), max_broken=1.0).dataset("train").items  # type: ignore[attr-defined]
    with pytest.raises(VideoError, match="truncated"):
        items.video(0)
