"""Files that come from others write nothing outside of their folder, and have nothing imported (docs/security.md)."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from benchmark.fixture_results import write_results
from sweeping import Pool, checkpoint

from vidtwin import plugins
from vidtwin.apply.latent_reader import LatentReader
from vidtwin.apply.options import DecodeOptions, SessionOptions
from vidtwin.benchmark import pages, plots, rows
from vidtwin.benchmark.generation import Generated
from vidtwin.benchmark.plan import Job
from vidtwin.benchmark.players import Writer
from vidtwin.benchmark.row_folder import RowFolder
from vidtwin.cli import main
from vidtwin.cli.own_modules import admit
from vidtwin.datamodules.shards.cached import CachedClips
from vidtwin.datamodules.shards.format import Manifest
from vidtwin.datamodules.shards.sources import Record
from vidtwin.datamodules.ucf101 import archives, prepare
from vidtwin.datamodules.ucf101.lists import Lists
from vidtwin.errors import UserError
from vidtwin.files import inside
from vidtwin.storage.resumable import lock
from vidtwin.video import VideoError, VideoWriter, parse_rate, write_video

ATTACKS = {
    "absolute": "/tmp/outside/x",
    "upwards": "../outside/x",
    "upwards later": "a/../../outside/x",
    "NUL": "a\0b",
    "backslash": "..\\outside\\x",
    "not UTF-8": "a\udcff",
    "too long": "x" * 300,
    "many folders": "x/" * 1500 + "x",
    "empty": "",
    "the folder": ".",
    "through a link": "link/x",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with an empty folder beside it that nothing may be written to."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def link(folder: Path) -> Path:
    """A folder with a link that leads out of it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "link").symlink_to(Path.cwd().parent / "outside")
    return folder


def outside(here: Path) -> list[Path]:
    return list((here.parent / "outside").iterdir())


def read_shards(name: str) -> None:
    shard = {"file": name, "first": 0, "places": 1, "items": 1, "bytes": 3, "sha256": ""}
    folder = link(Path("cache"))
    text = Manifest("clips", "val", "val", {}, 1, 1, complete=True).to_json()
    (folder / "manifest.json").write_text(json.dumps(json.loads(text) | {"shards": [shard]}))
    CachedClips(folder)


def read_record(name: str) -> None:
    shard = {"file": name, "first": 0, "places": 1, "items": 1, "bytes": 3, "sha256": ""}
    (link(Path("cache")) / "chunk-0-0.json").write_text(json.dumps({"number": 0, "shard": shard}))
    Record.read(Path("cache"), 0)


def write_latents(**changed: Any) -> None:
    video = {"name": "a", "source": "a.mp4", "label": -1, "fps": "25", "planned_frames": 8, "bytes": 1, "changed": 1}
    model = {"class_path": "a.B", "weights_sha256": "0", "checkpoint": "last.ckpt", "config": None, "use_ema": False}
    content = {"schema_version": 1, "model": model | changed.pop("model", {}), "settings": {"num_frames": 8}}
    Path("latents").mkdir()
    content |= {"latents": {}, "videos": [video | changed], "shards": [], "complete": True}
    Path("latents/manifest.json").write_text(json.dumps(content))


def read_latents(name: str) -> None:
    write_latents(name=name)
    link(Path("decoded"))
    LatentReader("latents", DecodeOptions("decoded"), SessionOptions())


def read_row(name: str) -> None:
    folder = write_results(Path("results"), players=False)
    link(folder / "rows")
    path = folder / "rows" / "VidTwin" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"name": name}))
    rows.read(folder)


def put_row_aside(name: str) -> None:
    Path("results/rows/model").mkdir(parents=True)
    link(Path("results/rows/model/earlier"))
    row = {"schema_version": rows.SCHEMA_VERSION, "kind": "trained", "name": "model", "identity": name or "."}
    row |= {"num_clips": 1, "metrics": {}, "latents": {}, "compression_rate": 0.1}
    Path("results/rows/model/results.json").write_text(json.dumps(row))
    job = Job("model", {}, lambda: pytest.fail("built"))
    RowFolder(Path("results"), job, SimpleNamespace(), {}, [])._put_aside()  # type: ignore[arg-type]


def read_player(name: str) -> None:
    pages.read_strip(link(Path("results")), name)


def read_rar_archive(name: str) -> None:
    link(Path("scratch"))
    if archives._leads_outside(SimpleNamespace(filename=name, is_symlink=lambda: False), Path("scratch")):
        raise UserError("refused")


READERS = [
    read_shards, read_record, read_latents, read_row, put_row_aside, read_player, read_rar_archive,
    lambda name: inside(link(Path("folder")), name),
]  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_no_name_in_a_file_of_others_leads_out_of_its_folder(here, read: Callable[[str], None], attack):
    before = {path for path in here.parent.rglob("*") if here not in path.parents}
    with pytest.raises(UserError) as caught:
        read(ATTACKS[attack])
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()
    assert "weights" not in str(caught.value)  # nor is it refused for want of other files
    assert {path for path in here.parent.rglob("*") if here not in path.parents} == before


@pytest.mark.parametrize("name", ["..", "/tmp", "a/..\\b", "a\udcff", "x" * 300])
def test_no_class_in_ucfs_lists_leads_a_video_out(here, name):
    video = "v_YoYo_g01_c01.avi"
    Path("flat").mkdir()
    Path("flat", video).touch()
    with pytest.raises(UserError, match="stays inside root"):
        prepare._arrange(Path("flat"), Path("root"), Lists({}, {}, {(1, "train"): [f"{name}/{video}"]}))
    assert Path("flat", video).exists()


def test_names_inside_are_taken_as_they_are(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "near").symlink_to("other")
    for name in ("a", "a/b.mp4", "a..b", "near/x", "ä", "x" * 240):
        assert inside(tmp_path / "kept", name) == tmp_path / "kept" / name
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    assert inside(tmp_path / "link", "a") == tmp_path / "link" / "a"


def test_links_in_a_results_folder_lead_no_output_out(here):
    folder = write_results(Path("results"), players=False)
    for name in ("plots", ".players", "players"):
        (folder / name).symlink_to(here.parent / "outside")
    with pytest.raises(UserError, match="a symbolic link leads out"):
        plots.write(folder)
    with pytest.raises(UserError, match="a symbolic link leads out"):
        rows.read(folder)
    with pytest.raises(UserError, match="a symbolic link leads out"):
        Writer(folder, [], [torch.zeros(1, 3, 1, 8, 8)], 8)
    assert outside(here) == []


def test_a_lock_that_is_a_link_empties_no_other_file(here):
    kept = here.parent / "outside" / "kept"
    kept.write_text("content")
    Path("results").mkdir()
    Path("results/.lock").symlink_to(kept)
    with pytest.raises(UserError, match="a symbolic link leads out"), lock(Path("results"), "sweep"):
        pass
    assert kept.read_text() == "content"


@pytest.mark.parametrize("fps", ["1e-400", "1e400", "0", "nan", "-25", "inf", "1/0", "", "9" * 30, "1/9999999", 25])
def test_an_invalid_frame_rate_is_one_line(here, capsys, fps):
    write_latents(fps=fps)
    assert main(["decode", "latents", "--out", "decoded"]) == 2
    assert "latents/manifest.json is damaged" in capsys.readouterr().err
    assert not Path("decoded").exists()


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "x\0"])
def test_decode_refuses_a_name_that_leads_out_in_one_line(here, capsys, name):
    write_latents(name=name)
    assert main(["decode", "latents", "--out", "decoded"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("vidtwin: error: Expected a name that stays inside decoded, got ")
    assert said.count("\n") == 1


def test_no_generated_video_is_read_outside_of_its_folder(here):
    write_video(here.parent / "outside" / "x.mp4", np.zeros((2, 16, 16, 3), np.uint8), 8)
    manifest = {"num_frames": 2, "size": [16, 16], "samples": [{"file": "../outside/x.mp4"}]}
    with pytest.raises(UserError, match="Expected a name that stays inside"):
        list(Generated(here, manifest).clips())


def test_rates_that_files_have_are_read_and_written(tmp_path):
    assert parse_rate("30000/1001") * 1001 == 30000
    with VideoWriter(tmp_path / "a.mp4", 300.1234567, timed=False) as writer:  # a numerator beyond 31 bits
        writer.write(np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(VideoError, match="expected frames per second"):
        VideoWriter(tmp_path / "a.mp4", 1e-300)


# Classes.

EVIL = """
from pathlib import Path

from sweeping import Pool

Path("ran").touch()


class Model(Pool):
    pass
"""


@pytest.fixture
def evil(here: Path) -> Path:
    """A module in the current folder that writes a file when it is imported, and weights that name its class."""
    Path("evil_here.py").write_text(EVIL)
    spec = {"class_path": "evil_here.Model", "init_args": {}}
    checkpoint(here / "own.ckpt")
    held = torch.load("own.ckpt") | {"model_spec": spec}
    torch.save(held, "last.ckpt")
    Pool().save_pretrained("folder")
    config = json.loads(Path("folder/config.json").read_text()) | {"class_path": "evil_here.Model"}
    Path("folder/config.json").write_text(json.dumps(config))
    Path("other.yaml").write_text("model: {autoencoder: {class_path: evil_here.Model}}\n")
    write_latents(model={"checkpoint": "own.ckpt", "config": "other.yaml"})
    dump = {"reason": "", "batch": {}, "state_dict": {}, "precision": "32-true", "config": {"autoencoder": spec}}
    torch.save(dump, "dump.pt")
    write_video("a.mp4", np.zeros((8, 32, 32, 3), np.uint8), 8)
    yield here
    sys.modules.pop("evil_here", None)


@pytest.mark.parametrize(
    "words",
    [
        "convert last.ckpt out",
        "export --ckpt_path last.ckpt --out out",
        "export --ckpt_path folder --out out",
        "reconstruct a.mp4 --ckpt_path last.ckpt --accelerator cpu",
        "reconstruct a.mp4 --ckpt_path folder --accelerator cpu",
        "encode a.mp4 --ckpt_path last.ckpt --out out --accelerator cpu",
        "decode latents --out out --accelerator cpu",
        "test --ckpt_path last.ckpt --data synthetic",
        "predict --ckpt_path last.ckpt --data synthetic",
        "validate --ckpt_path folder --data synthetic",
        "replay dump.pt",
        "card --ckpt_path last.ckpt --out card.md",
    ],
)
def test_a_module_of_the_current_folder_is_not_imported_for_weights(evil, capsys, words):
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert "got evil_here.Model; if you trust the module, give --trust_module evil_here" in said
    assert not Path("ran").exists()
    assert "evil_here" not in sys.modules


def test_a_module_that_is_trusted_is_imported(evil):
    assert main(["convert", "last.ckpt", "out", "--trust_module=other", "--trust_module", "evil_here"]) == 0
    assert Path("ran").exists()
    assert str(evil) not in sys.path
    del sys.modules["evil_here"]
    assert main(["convert", "last.ckpt", "out2"]) == 2


def test_a_path_is_refused_as_a_trusted_module(here, capsys):
    assert main(["convert", "last.ckpt", "out", "--trust_module", "a/b.py"]) == 2
    assert "Expected --trust_module MODULE, as Python imports it, got 'a/b.py'" in capsys.readouterr().err


def test_the_current_folder_is_searched_for_modules_that_the_user_names(evil):
    Path("evil_here.mp4").touch()
    Path("sweep.yaml").write_text("autoencoders: [{name: x, config: other.yaml}]\n")
    words = {
        "check evil_here.Model": True,
        "fit --model.autoencoder=evil_here.Model": True,
        'fit --model={"autoencoder":{"class_path":"evil_here.Model"}}': True,
        "fit --config other.yaml": True,
        "test --config=sweep.yaml": True,
        "reconstruct evil_here.mp4": False,
        "test --ckpt_path ./evil_here.x --data.root x": False,
        "fit --config absent.yaml --data ucf101": False,
    }
    for line, expected in words.items():
        with admit(line.split()) as given:
            assert given == line.split()
            assert (str(evil) in sys.path) == expected, line


def test_the_current_folder_registers_no_plug_in(here, monkeypatch):
    Path("evil-1.0.dist-info").mkdir()
    Path("evil-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    Path("evil-1.0.dist-info/entry_points.txt").write_text("[vidtwin.autoencoders]\nevil = evil_here:Model\n")
    monkeypatch.syspath_prepend(here)
    assert "evil" not in plugins.available("vidtwin.autoencoders")
    monkeypatch.chdir(here.parent)
    assert "evil" in plugins.available("vidtwin.autoencoders")


@pytest.mark.parametrize(
    ("content", "trusted"),
    [
        ({"class_path": "vidtwin.models.vidtwin.VidTwin", "init_args": {"a": [1, "x"]}}, True),
        ({"class_path": "vidtwin.models.vidtwin.VidTwin", "init_args": {"a": {"class_path": "absent_x.B"}}}, False),
        ({"class_path": "vidtwin_x.B"}, False),
        ({"class_path": "vidtwinx.B"}, False),
        ({"class_path": "torch.optim.AdamW"}, True),
        ({"optimizer": "turtle.Turtle"}, False),
        ({"autoencoder": "{class_path: absent_x.B}"}, False),
        ({"autoencoder": '{"class_path": "absent_x.B"}'}, False),
        ({"loss": {"init_args": {"discriminator": "[{class_path: absent_x.B}]"}}}, False),
        ({"perceptual_backbone": "vgg16.pth"}, True),
        ([{"class_path": "VidTwin"}], True),
    ],
)
def test_every_class_that_a_file_names_is_looked_at(content, trusted):
    if trusted:
        plugins.check_trusted(content, "a file")
        return
    with pytest.raises(UserError, match=r"^Expected a class of vidtwin or of an installed plug-in in a file, got "):
        plugins.check_trusted(content, "a file")


@pytest.mark.parametrize("value", [["a"], 5, None])
def test_the_name_of_a_class_is_text(value):
    with pytest.raises(UserError, match=r"^Expected the name of a class in a file, got "):
        plugins.check_trusted({"class_path": value}, "a file")


def test_a_file_of_any_name_is_no_config_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("payload.txt").write_text("class_path: absent_x.B\n")
    with pytest.raises(UserError, match=r"Expected a file to name no other config, got payload\.txt"):
        plugins.check_trusted({"autoencoder": "payload.txt"}, "a file")


def test_folders_and_comments_name_no_module_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("runs").mkdir()
    Path("mine.py").touch()
    Path("a.yaml").write_text("# data.batch_size, mine.Model\nmodel: {}  # mine.Model\n")
    with admit(["test", "--config", "a.yaml", "--out", "runs.old", "--data.root", "data"]):
        assert str(tmp_path) not in sys.path
    Path("a.yaml").write_text("model: {class_path: mine.Model}\n")
    with admit(["test", "--config", "a.yaml"]):
        assert str(tmp_path) in sys.path


def test_a_config_that_a_file_names_is_not_read(evil):
    for content in ({"loss": "other.yaml"}, {"class_path": "cmd", "init_args": {"part": "other.yaml"}}):
        with pytest.raises(UserError, match=r"Expected dump\.pt to name no other config, got other\.yaml"):
            plugins.check_trusted(content, "dump.pt")


@pytest.mark.parametrize("key", ["name", "num_clips", "metrics", "latents", "compression_rate"])
def test_a_row_that_lacks_a_value_is_one_line(tmp_path, key):
    folder = write_results(tmp_path / "results", {"a": ("trained", 0.1, 20.0)})
    path = folder / "rows" / "a" / "results.json"
    row = json.loads(path.read_text())
    for value in ([], None):
        path.write_text(json.dumps(row | {key: value}))
        with pytest.raises(UserError, match=rf"^Expected {key} of a row in .*results\.json"):
            rows.read(folder)


def test_players_without_clips_are_one_line(tmp_path):
    folder = write_results(tmp_path / "results", {"a": ("trained", 0.1, 20.0)})
    (folder / "players").mkdir(exist_ok=True)
    (folder / "players" / "players.json").write_text('{"digest": "x"}')
    with pytest.raises(UserError, match="Expected a list of clips in "):
        rows.read(folder)
