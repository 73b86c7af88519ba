"""Weights that travel: what a folder holds, who can read it, and that nothing else is taken for one."""

import hashlib
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
import yaml
from safetensors.torch import load_file, save_file
from sweeping import Coded, NumberedData, Pool, checkpoint, sweep
from tiny import BASELINES, Clips, tiny_model, tiny_task, trainer, write_config
from torch import nn

from vidtwin import VideoAutoencoder, VidTwin, hub, plugins, weights
from vidtwin.autoencoder import TemporalSpec
from vidtwin.benchmark.sweep import Entry
from vidtwin.cli import main
from vidtwin.datamodules.synthetic import write_ucf_like
from vidtwin.errors import UserError
from vidtwin.storage import checkpoints
from vidtwin.video import COLOURS, RESIZE_FILTER, RESIZE_FILTERS, write_video


def saved(folder, model=None):
    (model or tiny_model()).save_pretrained(folder)
    return folder


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def same_weights(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ["vidtwin", *BASELINES, "mean_colour"])
def test_every_autoencoder_comes_back_with_its_class_arguments_and_weights(name, tmp_path):
    if name == "vidtwin":
        model = tiny_model()
    else:
        model = plugins.load(name, "vidtwin.autoencoders")(**BASELINES.get(name, {"num_frames": 4, "resolution": 32}))
    model.training_record = {"step": 7, "data": {"fps": 8.0}}
    model.save_pretrained(tmp_path / "out")
    for cls in (VideoAutoencoder, type(model)):
        loaded = cls.from_pretrained(tmp_path / "out")
        assert type(loaded) is type(model)
        assert loaded.spec() == model.spec()
        assert not loaded.training
        assert same_weights(loaded, model)
        assert loaded.training_record == model.training_record
    frames, side = model.temporal.usual_length, model.resolution or 32
    clip = torch.rand(1, 3, frames, side, side) * 2 - 1
    with torch.no_grad():
        expected, got = model.eval()(clip), loaded(clip)
    assert torch.equal(got.clip, expected.clip)


def test_the_config_describes_preprocessing_and_weights(tmp_path):
    model = plugins.load("magvit2", "vidtwin.autoencoders")(**BASELINES["magvit2"])
    model.training_record = {"step": 3, "data": {"fps": 12.5}}
    config = config_of(saved(tmp_path, model))
    assert config["class_path"] == "vidtwin.baselines.magvit2.MAGVIT2"
    assert config["init_args"] == model.init_args
    assert config["format_version"] == 1
    assert config["training"] == model.training_record
    contract = config["preprocessing"]
    assert (contract["value_range"], contract["channels"], contract["fps"]) == ([-1.0, 1.0], "RGB", 12.5)
    assert TemporalSpec(**contract["legal_lengths"]) == model.temporal
    assert contract["num_frames"] == model.temporal.usual_length
    assert (contract["resolution"], contract["spatial_multiple"]) == (None, model.spatial_multiple)
    assert contract["resize"] == RESIZE_FILTER
    model.training_record = {"data": {"resize": "bilinear"}}
    trained = config_of(saved(tmp_path / "bilinear", model))["preprocessing"]
    assert trained["resize"] == RESIZE_FILTERS["bilinear"]
    assert trained["colour"] == COLOURS["bilinear"]
    assert trained["crop"] == "the largest square in the middle, after the resizing"
    digest = hashlib.sha256()  # of names, types, shapes and bytes, told without our own function
    for name, value in sorted(load_file(tmp_path / "model.safetensors").items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode() + value.numpy().tobytes())
    assert config["weights_sha256"] == digest.hexdigest()


def test_the_card_says_how_to_load_it(tmp_path):
    card = (saved(tmp_path / "my_model") / "README.md").read_text()
    assert "library_name: vidtwin" in card
    assert 'VideoAutoencoder.from_pretrained("my_model")' in card
    assert "`structure` and `dynamics`" in card
    (tmp_path / "my_model" / "README.md").write_text("mine")
    saved(tmp_path / "my_model")
    assert (tmp_path / "my_model" / "README.md").read_text() == "mine"


def test_arguments_may_differ_from_the_saved_ones(tmp_path):
    folder = saved(tmp_path, tiny_model(qformer_dropout=0.1))
    assert VidTwin.from_pretrained(folder, qformer_dropout=0.5).init_args["qformer_dropout"] == 0.5
    with pytest.raises(UserError, match=r"Expected arguments of .*VidTwin.*'dropuot'"):
        VidTwin.from_pretrained(folder, dropuot=0.5)


def test_tuples_and_half_precision_and_tied_and_sliced_tensors_come_back(tmp_path, monkeypatch):
    source = """
import torch
from torch import nn
from sweeping import Pool

class Tied(Pool):
    def __init__(self, sides=(1, 2), names=None, **others):
        super().__init__(**others)
        self.first = nn.Linear(4, 4).bfloat16()
        self.second = self.first
        whole = torch.arange(12.0)
        self.register_buffer("left", whole[:6])
        self.register_buffer("right", whole.view(3, 4).t())
        self.register_buffer("count", torch.tensor(5))
"""
    (tmp_path / "users_own_tokenizer.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    import users_own_tokenizer

    model = users_own_tokenizer.Tied((3, 4), names={"a": [1]}, pool=8)
    loaded = VideoAutoencoder.from_pretrained(saved(tmp_path / "out", model))
    assert type(loaded) is users_own_tokenizer.Tied
    assert loaded.init_args == {"sides": [3, 4], "names": {"a": [1]}, "pool": 8}
    assert same_weights(loaded, model)
    assert loaded.first is loaded.second


def test_a_model_with_a_codebook_gives_the_same_codes(tmp_path):
    model = Coded()
    loaded = Coded.from_pretrained(saved(tmp_path, model))
    clip = torch.rand(1, 3, 8, 32, 32)
    assert torch.equal(loaded.encode(clip)["grid"].codes, model.encode(clip)["grid"].codes)


def test_arguments_that_json_cannot_hold_are_named_and_leave_no_folder_that_loads(tmp_path):
    model = tiny_model()
    model.init_args["activation"] = nn.ReLU
    with pytest.raises(UserError, match=r"arguments that JSON can hold, got .*ReLU"):
        model.save_pretrained(tmp_path / "out")
    with pytest.raises(UserError, match=r"without config\.json"):
        VidTwin.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("moment", ["save_file", "write_text"])
def test_a_save_that_is_ended_leaves_no_folder_that_loads(moment, tmp_path, monkeypatch):
    folder = saved(tmp_path / "out", tiny_model(num_queries=2))

    def killed(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, moment, killed)
    with pytest.raises(KeyboardInterrupt):
        tiny_model(num_queries=3).save_pretrained(folder)
    with pytest.raises(UserError, match=r"without config\.json"):
        VidTwin.from_pretrained(folder)


def test_a_folder_of_another_class_is_refused_by_name(tmp_path):
    folder = saved(tmp_path / "cmd", plugins.load("cmd", "vidtwin.autoencoders")(**BASELINES["cmd"]))
    with pytest.raises(UserError, match=r"Expected a VidTwin, got vidtwin.baselines.cmd.CMD\."):
        VidTwin.from_pretrained(folder)


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_bit(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def of_another_model(folder):
    state = load_file(folder / "model.safetensors")
    state["extra"] = state.pop("decoder.linear.bias")
    save_file(state, folder / "model.safetensors")
    change(folder, weights_sha256=weights.sha256(state))


def pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"a": Path}, folder / "pytorch_model.bin")


def change(folder, **values):
    (folder / "config.json").write_text(json.dumps(config_of(folder) | values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_weights, "damaged or cut off"),
        (flip_a_bit, r"Expected weights of SHA-256 \w{12}….*changed or is damaged"),
        (of_another_model, "missing decoder.linear.bias; unexpected extra"),
        (pickled, "Expected a file of weights, got none at .*model.safetensors"),
        (
            lambda folder: (folder / "config.json").unlink(),
            "without config.json: it holds README.md, model.safetensors",
        ),
        (lambda folder: (folder / "config.json").write_text('{"class'), "Expected JSON in .*config.json"),
        (lambda folder: (folder / "config.json").write_text("{}"), "vidtwin convert"),
        (lambda folder: change(folder, format_version=9), "Expected format_version 1 .* got 9"),
        (lambda folder: change(folder, init_args={"depht": 1}), "depht"),
        (lambda folder: change(folder, class_path="no_such.Model"), "a class of vidtwin or of an installed plug-in in"),
        (lambda folder: change(folder, class_path="os.getcwd"), "Expected a VideoAutoencoder, got os.getcwd"),
    ],
)
def test_an_invalid_folder_is_refused_with_the_reason(damage, message, tmp_path):
    folder = saved(tmp_path)
    damage(folder)
    with pytest.raises(UserError, match=message) as told:
        VideoAutoencoder.from_pretrained(folder)
    assert "\n" not in str(told.value)


def test_a_name_that_is_neither_folder_nor_id_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = {"cache_dir": tmp_path}
    with pytest.raises(UserError, match=r"nobody/nothing at revision v2, which is not in its cache: .*offline") as told:
        VidTwin.from_pretrained("nobody/nothing", revision="v2", **options)
    assert "\n" not in str(told.value)
    with pytest.raises(UserError, match=r"id of the Hub \(owner/name\), got ./a/b/c"):
        VidTwin.from_pretrained("./a/b/c", **options)
    path = checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"`vidtwin convert .*last.ckpt OUT` makes one"):
        VidTwin.from_pretrained(path)
    with pytest.raises(UserError, match="Expected no revision of the folder"):
        VidTwin.from_pretrained(saved(tmp_path / "a"), revision="v2")


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """owner/name in the cache of the Hub, of which the network is not there."""
    repo = tmp_path / "hub" / "models--owner--name"
    commit = "0123456789" * 4
    saved(repo / "snapshots" / commit)
    for name in ("main", "v1"):
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return repo


def test_an_id_of_the_hub_is_read_from_its_cache_without_the_network(cached):
    assert VidTwin.from_pretrained("owner/name").spec() == tiny_model().spec()
    assert VidTwin.from_pretrained("owner/name", revision="v1").spec() == tiny_model().spec()
    for address in ("hf://owner/name", "hf://owner/name@v1", Path("hf://owner/name")):
        assert checkpoints.load_autoencoder(address).spec() == tiny_model().spec()
    with pytest.raises(UserError, match="owner/name at revision v9"):
        checkpoints.read("hf://owner/name@v9")


def test_push_to_hub_uploads_the_folder(monkeypatch):
    uploaded = {}

    class Api:
        def __init__(self, token=None):
            uploaded["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            uploaded.update(private=private, exist_ok=exist_ok)
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, revision, **others):
            files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
            uploaded.update(repo_id=repo_id, revision=revision, files=files)
            return "address of the commit"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    model = tiny_model()
    assert model.push_to_hub("me/mine", private=True, branch="v1", token="secret") == "address of the commit"
    assert {key: uploaded[key] for key in ("repo_id", "private", "exist_ok", "revision", "token")} == {
        "repo_id": "me/mine",
        "private": True,
        "exist_ok": True,
        "revision": "v1",
        "token": "secret",
    }
    assert set(uploaded["files"]) == {"config.json", "model.safetensors", "README.md"}
    assert json.loads(uploaded["files"]["config.json"])["init_args"] == model.init_args
    state = safetensors.torch.load(uploaded["files"]["model.safetensors"])
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    card = uploaded["files"]["README.md"].decode()
    assert 'from_pretrained("me/mine")' in card
    assert "--ckpt_path hf://me/mine" in card


def test_a_generated_card_has_the_training_and_one_of_vidtwin_card_is_sent_instead(tmp_path, monkeypatch):
    model = tiny_model()
    model.training_record = {"checkpoint": "a|b.ckpt", "data": {"class_path": "<b>", "fps": 8.0}}
    text = (saved(tmp_path / "first", model) / "README.md").read_text()
    assert "| `checkpoint` | `a\\|b.ckpt` |\n| `data.class_path` | `<b>` |\n| `data.fps` | `8.0` |" in text
    model.training_record = {}
    assert "Training" not in str(model.generate_model_card())
    assert 'from_pretrained("a\\"\\nb")' in str(model.generate_model_card(address='a"\nb'))

    own = tmp_path / "own" / "README.md"
    own.parent.mkdir()
    own.write_text("# Mine\n![Curves](training_curves.png) ![elsewhere](https://example.com/x.png) ![up](../x.png)\n")
    with pytest.raises(UserError, match=r"the picture training_curves\.png of .*README\.md beside it"):
        model.save_pretrained(tmp_path / "second", card=own)
    own.with_name("training_curves.png").write_bytes(b"picture")
    uploaded = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path, **others):
            uploaded.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})
            return "address of the commit"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    model.push_to_hub("me/mine", card=own)
    assert uploaded["README.md"] == own.read_bytes()
    assert uploaded["training_curves.png"] == b"picture"
    assert set(uploaded) == {"config.json", "model.safetensors", "README.md", "training_curves.png"}
    with pytest.raises(UserError, match=r"a card at .*absent\.md, got no such file; `vidtwin card` writes one"):
        model.push_to_hub("me/mine", card=tmp_path / "absent.md")


def test_saving_takes_no_other_config(tmp_path):
    with pytest.raises(UserError, match="set its training_record"):
        tiny_model().save_pretrained(tmp_path, config={"a": 1})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Expected a folder to save in, got the file"):
        tiny_model().save_pretrained(tmp_path / "file")


def test_a_folder_reads_as_a_checkpoint_of_the_weights(tmp_path):
    model = tiny_model()
    folder = saved(tmp_path, model)
    held = checkpoints.read(folder)
    assert held["model_spec"] == model.spec()
    assert same_weights(checkpoints.load_autoencoder(folder), model)
    other = tiny_model()
    checkpoints.load_weights(other, folder)
    assert same_weights(other, model)
    with pytest.raises(UserError, match="is of another model or size"):
        checkpoints.load_weights(tiny_model(hidden_size=48), folder)
    flip_a_bit(folder)
    with pytest.raises(UserError, match="changed or is damaged"):
        checkpoints.check(folder)


@pytest.mark.usefixtures("without_pictures")
def test_the_commands_of_the_trainer_take_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "model")
    argv = ["--ckpt_path", "model", "--data", "tiny.Clips", "--trainer.accelerator=cpu"]
    quiet = ["--trainer.enable_progress_bar=false"]
    assert main(["test", *argv, *quiet, "--results_dir=results", "--references=[]", "--cost=false", "--players=0"]) == 0
    row = json.loads((tmp_path / "results" / "rows" / "VidTwin" / "results.json").read_text())
    assert row["kind"] == "trained"
    assert row["fingerprint"]
    assert row["checkpoint"] == "model"
    assert main(["predict", *argv, *quiet, "--out", "predictions"]) == 0
    assert len(list((tmp_path / "predictions").glob("*.safetensors"))) == 6
    capsys.readouterr()
    assert main(["test", *argv[2:], "--ckpt_path", "modle"]) == 2
    assert "got none at modle" in capsys.readouterr().err


def test_the_numbers_are_those_of_the_checkpoint(tmp_path):
    task = tiny_task()
    path = checkpoint(tmp_path / "last.ckpt", model=task.autoencoder)
    saved(tmp_path / "model", task.autoencoder)
    means = [
        trainer(tmp_path).validate(tiny_task(), datamodule=Clips(), ckpt_path=given, verbose=False)
        for given in (with_version(path), tmp_path / "model")
    ]
    assert means[0] == means[1]


def with_version(path):
    held = torch.load(path)
    torch.save(held | {"pytorch-lightning_version": "2.6.0"}, path)
    return path


def test_a_training_starts_from_a_folder_but_does_not_resume_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path)
    saved(tmp_path / "model")
    assert main(["fit", "--config", str(config), "--init_from", "model"]) == 0
    own = len(tiny_model().state_dict())
    assert f"model: {own} of {own} tensors, weights" in capsys.readouterr().err
    assert main(["fit", "--config", str(config), "--ckpt_path", "model"]) == 2
    assert "--init_from starts a new training" in capsys.readouterr().err


@pytest.mark.usefixtures("without_pictures")
def test_a_sweep_measures_a_folder_and_knows_it_again(tmp_path):
    model = Pool()
    saved(tmp_path / "weights" / "pool", model)
    given = {"checkpoints_dir": str(tmp_path / "weights")}
    entries = [Entry("pool", checkpoint="pool")]
    assert sweep(tmp_path / "results", entries, NumberedData(), **given).run() == 0
    path = tmp_path / "results" / "rows" / "pool" / "results.json"
    first = json.loads(path.read_text())
    assert first["kind"] == "trained"
    written = path.stat().st_mtime_ns
    assert sweep(tmp_path / "results", entries, NumberedData(), **given).run() == 0
    assert path.stat().st_mtime_ns == written
    model.scale.data.fill_(0.5)
    saved(tmp_path / "weights" / "pool", model)
    assert sweep(tmp_path / "results", entries, NumberedData(), **given).run() == 0
    assert json.loads(path.read_text())["fingerprint"] != first["fingerprint"]


def test_a_class_of_ones_own_module_is_found_if_the_module_is_trusted(tmp_path, monkeypatch):
    (tmp_path / "mine_here.py").write_text("from sweeping import Pool\nclass Mine(Pool):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import mine_here

    saved(tmp_path / "out", mine_here.Mine())
    del sys.modules["mine_here"]
    with pytest.raises(UserError, match=r"give --trust_module mine_here \(in Python trust_modules=\['mine_here'\]\)"):
        VideoAutoencoder.from_pretrained(tmp_path / "out")
    assert "mine_here" not in sys.modules
    model = VideoAutoencoder.from_pretrained(tmp_path / "out", trust_modules=["mine_here"])
    assert type(model).__name__ == "Mine"
    del sys.modules["mine_here"]
    assert type(checkpoints.load_autoencoder(tmp_path / "out", trust_modules=["mine_here"])).__name__ == "Mine"


@pytest.mark.usefixtures("without_pictures")
def test_the_commands_of_the_page_on_weights_run(shared, tmp_path, monkeypatch):
    """docs/weights.md from its first command to its last, with small models."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "weights.md").read_text()
    model = tiny_model(num_frames=16, resolution=64, patch_size=16)
    checkpoint(tmp_path / "runs" / "vidtwin" / "checkpoints" / "last.ckpt", model=model)
    Pool(frames=16).save_pretrained(tmp_path / "pool")
    with_version(tmp_path / "runs" / "vidtwin" / "checkpoints" / "last.ckpt")
    golden = load_file(shared / "golden" / "golden_a.safetensors")
    state = {k.removeprefix("state_dict."): v for k, v in golden.items() if k.startswith("state_dict.")}
    torch.save({"state_dict": state}, tmp_path / "released_vidtwin.ckpt")
    golden = load_file(shared / "golden" / "golden_ivideogpt.safetensors")
    source = tmp_path / "ivideogpt-oxe-64-act-free"
    source.mkdir()
    state = {k.removeprefix("sd."): v.float() for k, v in golden.items() if k.startswith("sd.")}
    save_file(state, source / "diffusion_pytorch_model.safetensors")
    described = json.loads((shared / "golden" / "golden_ivideogpt.json").read_text())
    (source / "config.json").write_text(json.dumps(described["config"]))
    write_ucf_like(tmp_path / "data", classes=2, groups=8, clips=1, size=(80, 64), frames=60)
    write_video(tmp_path / "a.mp4", np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), np.uint8), 8)
    config = yaml.safe_load(write_config(tmp_path, "ucf101").read_text())
    config["model"]["autoencoder"]["init_args"] = model.init_args
    config["data"] = {
        "class_path": "vidtwin.datamodules.ucf101.UCF101",
        "init_args": {"resolution": 64, "num_frames": 16, "num_workers": 0},
    }
    config["trainer"]["max_steps"] = 2
    (tmp_path / "my_config.yaml").write_text(yaml.safe_dump(config))
    blocks = re.findall(r"(<!-- not run.*?-->\n)?```(bash|python)\n(.*?)```", page, re.DOTALL)
    assert [kind for skipped, kind, _ in blocks if not skipped] == ["bash", "python", "bash", "bash", "python"]
    for skipped, kind, text in blocks:
        if skipped:
            continue
        if kind == "python":
            exec(compile(text, "docs/weights.md", "exec"), {})
            continue
        for line in text.splitlines():
            words = shlex.split(line.replace("--num_heads 12", "--num_heads 4"))[1:]
            if words[0] == "export":  # which takes long for VidTwin; tests/apply/test_export.py does so
                words = [word.replace("my_vidtwin", "pool") for word in words] + ["--resolution=64"]
            if words[0] in ("test", "fit"):
                words += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
            if words[0] == "test":
                words += ["--data.num_workers=0", "--data.resolution=64", "--references=[]"]
                words += ["--cost=false", "--downstream=false", "--players=0"]
            assert main(words) == 0, line


def test_weights_of_the_hub_do_not_import_other_modules(tmp_path, monkeypatch):
    saved(tmp_path / "folder")
    config = config_of(tmp_path / "folder") | {"class_path": "not_asked_for.X"}
    (tmp_path / "folder/config.json").write_text(json.dumps(config))
    (tmp_path / "not_asked_for.py").write_text("raise AssertionError('this was run')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(hub, "hf_hub_download", lambda repo, file, **options: str(tmp_path / "folder" / file))
    with pytest.raises(UserError, match="a class of vidtwin or of an installed plug-in in owner/name, got not_asked"):
        VideoAutoencoder.from_pretrained("owner/name")
    with pytest.raises(UserError, match="give --trust_module not_asked_for"):
        checkpoints.load_autoencoder("hf://owner/name")


def test_a_disk_that_fills_up_is_one_line(tmp_path, monkeypatch):
    def full(*given, **named):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(hub, "save_file", full)
    with pytest.raises(UserError, match=r"Expected to write .*folder, got: .*No space left"):
        saved(tmp_path / "folder")
