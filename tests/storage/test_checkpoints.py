"""Checkpoints are whole or not there, run no code, and say how they differ."""

import errno
import os
import pickle
import resource
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vidtwin import weights
from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.errors import UserError
from vidtwin.posteriors import Deterministic, Encoding
from vidtwin.storage import checkpoints


class Toy(VideoAutoencoder):
    latent_names = ("clip",)

    def __init__(self, width=3, name="toy"):
        super().__init__()
        self.layer = nn.Conv3d(3, width, 1)
        self.back = nn.Conv3d(width, 3, 1)

    def _encode(self, clip):
        return Encoding(clip=Deterministic(self.layer(clip)))

    def _decode(self, latents):
        return self.back(latents["clip"])

    def _latent_shapes(self, clip_shape):
        return {"clip": (self.layer.out_channels, *clip_shape[1:])}

    @property
    def last_layer(self):
        return self.back.weight


class Bomb:
    """Unpickled as usual, it makes a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def checkpoint_of(model):
    state = {checkpoints.PREFIX + name: value for name, value in model.state_dict().items()}
    return {
        "state_dict": {**state, "loss.logvar": torch.zeros(())},
        "model_spec": {"class_path": f"{__name__}.Toy", "init_args": model.init_args},
        "global_step": 12,
    }


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = Toy(width=4)
    path = tmp_path / "last.ckpt"
    checkpoints.AtomicCheckpointIO().save_checkpoint(checkpoint_of(model), path)
    return model, path


@pytest.fixture
def importable(monkeypatch):
    """`Toy` by its class path, wherever pytest imported this file from."""
    monkeypatch.setitem(sys.modules, __name__, SimpleNamespace(Toy=Toy))


# Reading.


def test_a_saved_checkpoint_is_read_back(saved):
    model, path = saved
    read = checkpoints.AtomicCheckpointIO().load_checkpoint(path)
    assert read["global_step"] == 12
    torch.testing.assert_close(checkpoints.autoencoder_weights(read), dict(model.state_dict()))


def test_an_absent_file_is_named_with_its_neighbours(saved):
    path = saved[1]
    (path.parent / "best.ckpt").touch()
    (path.parent / "notes.txt").touch()
    with pytest.raises(UserError) as error:
        checkpoints.read(path.parent / "lst.ckpt")
    assert str(error.value) == (
        "Expected a checkpoint, a folder of weights or hf://owner/name, got none at "
        f"{path.parent / 'lst.ckpt'}; in its folder are best.ckpt, last.ckpt."
    )
    with pytest.raises(UserError, match=r"got none at \S+/absent/last\.ckpt\.$"):
        checkpoints.read(path.parent / "absent" / "last.ckpt")


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.9, -1])
def test_a_truncated_file_is_one_line_at_any_length(saved, kept):
    path = saved[1]
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(UserError) as error:
        checkpoints.read(path)
    assert f"got {path}: it is damaged or cut off" in str(error.value)
    assert "\n" not in str(error.value)


def test_text_under_a_checkpoints_name_is_one_line(tmp_path):
    (tmp_path / "a.ckpt").write_text("<html>404 Not Found</html>\n")
    with pytest.raises(UserError) as error:
        checkpoints.read(tmp_path / "a.ckpt")
    assert "it is damaged or cut off" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))])
def test_code_in_a_checkpoint_is_not_run(saved, tmp_path, write):
    marker = tmp_path / "executed"
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.is_dir()  # it is live
    marker.rmdir()
    path = tmp_path / "harmful.ckpt"
    write({**checkpoint_of(saved[0]), "callbacks": Bomb(marker)}, path)
    with pytest.raises(UserError) as error:
        checkpoints.read(path)
    assert str(error.value) == (
        f"Expected a file of tensors and plain values, got {path}: it holds pickled objects, whose code is never run."
    )
    assert not marker.exists()


def test_a_file_without_state_dict_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(1)}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"written by `vidtwin fit`, got .*a\.ckpt without a state_dict"):
        checkpoints.read(tmp_path / "a.ckpt")


# Writing.


@contextmanager
def file_size_limit(size):
    """Writes beyond it fail as on a full disk (Python ignores the signal that comes with it)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fail_as_a_full_disk(monkeypatch, code=errno.EIO):
    def save(checkpoint, file):
        file.write(b"PK half of it")
        try:
            raise OSError(code, os.strerror(code))
        finally:
            if code == errno.EDQUOT:  # as torch does: an error of its own over the one that says why
                raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", save)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("kept", [0, 1000, 0.5, -1])
def test_a_real_write_that_finds_no_room_names_what_is_whole(tmp_path, kept):
    writer, large = checkpoints.AtomicCheckpointIO(), checkpoint_of(Toy(width=9000))
    first, second = tmp_path / "step-00000012.ckpt", tmp_path / "step-00000024.ckpt"
    writer.save_checkpoint(large, first)
    size, before = first.stat().st_size, contents(tmp_path)
    assert size > 200_000
    limit = {float: int(size * kept), int: kept if kept >= 0 else size + kept}[type(kept)]
    with file_size_limit(limit), pytest.raises(UserError) as error:
        writer.save_checkpoint({**large, "global_step": 24}, second)
    assert str(error.value) == (
        f"Expected room to write {second}, got 'File too large'; {first} is intact. "
        "Free space and continue with --resume auto."
    )
    assert error.value.__cause__ is not None
    assert contents(tmp_path) == before
    assert checkpoints.newest(tmp_path) == first


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_users_error_in_whatever_torch_wraps_it(tmp_path, monkeypatch, code):
    fail_as_a_full_disk(monkeypatch, code)
    with pytest.raises(UserError) as error:
        checkpoints.AtomicCheckpointIO().save_checkpoint({}, tmp_path / "best.ckpt")
    assert str(error.value) == (
        f"Expected room to write {tmp_path / 'best.ckpt'}, got {os.strerror(code)!r}. "
        "Free space and continue with --resume auto."
    )
    assert contents(tmp_path) == {}


WRITE_AND_BE_KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from vidtwin.files import link, replacing

folder, version = Path(sys.argv[1]), 0
random.seed(0)
torch.set_num_threads(1)  # a fork has none of the others
for _ in range(10):
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        while True:
            version += 1
            step = folder / f"step-{version % 3:08d}.ckpt"
            with replacing(step) as temporary, temporary.open("wb") as file:
                torch.save({"version": version, "weights": torch.full((200_000,), version)}, file)
            link(folder / "last.ckpt", step)
            os.write(tell, b"%d " % version)
    os.close(tell)
    first = os.read(told, 20)
    time.sleep(random.random() * 0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    done = int((first + os.read(told, 100_000)).split()[-1])
    found = torch.load(folder / "last.ckpt", weights_only=True)
    version = found["version"]
    assert torch.equal(found["weights"], torch.full((200_000,), version))
    print(done, version)
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint_and_what_was_reported_as_written(tmp_path):
    command = [sys.executable, "-c", WRITE_AND_BE_KILLED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    rounds = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(rounds) == 10
    # The version that was told last, or the one after it, written but not told any more.
    assert all(version - told in (0, 1) for told, version in rounds)
    for path in tmp_path.glob("[!.]*"):
        checkpoints.check(path)


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("failure", ["broken disk", "interrupted in the middle of pickling"])
def test_a_failed_write_leaves_the_previous_checkpoint_and_nothing_else(tmp_path, monkeypatch, existed, failure):
    class Interrupting:
        def __reduce__(self):
            raise KeyboardInterrupt

    path, writer = tmp_path / "last.ckpt", checkpoints.AtomicCheckpointIO()
    if existed:
        writer.save_checkpoint(checkpoint_of(Toy()), path)
    before = contents(tmp_path)
    following = checkpoint_of(Toy())
    if failure == "broken disk":
        fail_as_a_full_disk(monkeypatch)
    else:
        following["callbacks"] = Interrupting()
    with pytest.raises((OSError, KeyboardInterrupt)):
        writer.save_checkpoint(following, path)
    assert contents(tmp_path) == before
    if existed:
        monkeypatch.undo()
        assert checkpoints.read(path)["global_step"] == 12


def test_a_removed_checkpoint_is_gone_and_a_missing_one_raises_no_error(saved):
    writer = checkpoints.AtomicCheckpointIO()
    writer.remove_checkpoint(saved[1])
    writer.remove_checkpoint(saved[1])
    assert not saved[1].exists()


# Finding the newest.


def save_step(folder, step, name=None):
    path = checkpoints.step_path(folder, step) if name is None else folder / name
    checkpoints.AtomicCheckpointIO().save_checkpoint({**checkpoint_of(Toy(width=500)), "global_step": step}, path)
    return path


def flip_a_byte(path, where=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 0xFF
    path.write_bytes(content)


def found(function, folder):
    """What a search finds, and what it reports."""
    reports: list[str] = []
    return function(folder, reports.append), reports


@pytest.mark.parametrize("folder", ["absent", "empty"])
def test_a_folder_without_checkpoints_has_no_newest(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").touch()
    assert found(checkpoints.newest, tmp_path / folder) == (None, [])
    assert found(checkpoints.history, tmp_path / folder) == ([], [])


def test_the_newest_holds_the_most_steps_whatever_its_name_and_age(tmp_path):
    third, _, second = save_step(tmp_path, 3000), save_step(tmp_path, 1000), save_step(tmp_path, 2000)
    save_step(tmp_path, 2500, "best.ckpt")
    (tmp_path / "last.ckpt").symlink_to(second.name)
    assert found(checkpoints.newest, tmp_path) == (third, [])
    save_step(tmp_path, 3500, "best.ckpt")  # from before a rollback
    assert found(checkpoints.newest, tmp_path) == (third, [])
    (tmp_path / "last.ckpt").unlink()
    last = save_step(tmp_path, 4000, "last.ckpt")  # a file, as older versions wrote it
    assert found(checkpoints.newest, tmp_path) == (last, [])
    assert found(checkpoints.history, tmp_path) == ([third, second, tmp_path / "step-00001000.ckpt"], [])


def test_of_equal_steps_it_is_the_one_that_last_points_at(tmp_path):
    save_step(tmp_path, 2000, "best.ckpt")
    save_step(tmp_path, 2000, "step-00009999.ckpt")
    step = save_step(tmp_path, 2000)
    (tmp_path / "last.ckpt").symlink_to(step.name)
    assert checkpoints.newest(tmp_path) == step
    step.unlink()
    (tmp_path / "step-00009999.ckpt").unlink()
    assert checkpoints.newest(tmp_path) == tmp_path / "best.ckpt"  # better than nothing


def test_temporary_and_foreign_files_are_no_candidates(tmp_path):
    step = save_step(tmp_path, 1000)
    for name in (".step-00002000-abcd1234.ckpt", ".last-abcd1234.ckpt", "epoch=3.ckpt", "step-2000.ckpt", "old.ckpt"):
        save_step(tmp_path, 2000, name)
    assert found(checkpoints.newest, tmp_path) == (step, [])
    assert found(checkpoints.history, tmp_path) == ([step], [])


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.9, -1])
def test_a_truncated_file_is_found_damaged_without_reading_its_tensors_too(saved, kept, lazily):
    path = saved[1]
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match="it is damaged or cut off"):
        checkpoints.read(path, lazily)
    with pytest.raises(UserError, match="it is damaged or cut off"):
        checkpoints.check(path)


def test_flipped_bytes_that_torch_reads_without_a_word_are_found(tmp_path):
    path = save_step(tmp_path, 1000)
    right = checkpoints.read(path)["state_dict"]
    checkpoints.check(path)
    flip_a_byte(path)
    wrong = checkpoints.read(path)["state_dict"]
    assert not all(torch.equal(wrong[name], right[name]) for name in right)
    with pytest.raises(UserError, match=rf"got {path}: it is damaged \(checksum of .*/data/\d+\)\.$"):
        checkpoints.check(path)


def test_damaged_ones_are_passed_over_and_named(tmp_path):
    whole, cut, flipped = (save_step(tmp_path, step) for step in (1000, 2000, 3000))
    (tmp_path / "last.ckpt").symlink_to(flipped.name)
    flip_a_byte(flipped)
    cut.write_bytes(cut.read_bytes()[:-1000])
    torch.save({"state_dict": {}}, tmp_path / "best.ckpt")
    path, reports = found(checkpoints.newest, tmp_path)
    assert path == whole
    assert all(str(name) in line for name, line in zip([cut, tmp_path / "best.ckpt", flipped], reports, strict=True))
    assert all(line.startswith("skipped: Expected ") for line in reports)
    assert "without its global_step" in reports[1]
    path, reports = found(checkpoints.history, tmp_path)
    assert path == [whole]
    assert len(reports) == 2
    with pytest.warns(UserWarning, match="skipped: ") as caught:
        assert checkpoints.newest(tmp_path) == whole
    assert len(caught) == 3
    whole.unlink()
    assert found(checkpoints.newest, tmp_path)[0] is None


def test_a_link_that_dangles_is_passed_over(tmp_path):
    step = save_step(tmp_path, 1000)
    (tmp_path / "last.ckpt").symlink_to("step-00002000.ckpt")
    path, reports = found(checkpoints.newest, tmp_path)
    assert path == step
    assert len(reports) == 1


# Rebuilding the model.


def test_a_model_is_rebuilt_from_its_checkpoint_alone(saved, importable):
    model, path = saved
    rebuilt = checkpoints.load_autoencoder(path)
    assert not rebuilt.training
    assert rebuilt.init_args == {"width": 4, "name": "toy"}
    clip = torch.rand(1, 3, 2, 4, 4)
    assert torch.equal(rebuilt(clip).clip, model.eval()(clip).clip)


@pytest.mark.parametrize("spec", [None, "vidtwin.models.vidtwin.VidTwin", {"init_args": {}}])
def test_a_checkpoint_without_spec_asks_for_the_config(spec):
    with pytest.raises(UserError, match=r"^Expected model_spec in last\.ckpt, .* give its --config too\.$"):
        checkpoints.model_spec({"state_dict": {}, "model_spec": spec}, "last.ckpt")


@pytest.mark.parametrize(
    "class_path", ["os.system", "builtins.exec", "torch.nn.Linear", "collections.OrderedDict", "vidtwin.errors"]
)
def test_only_an_autoencoder_is_built(class_path, tmp_path):
    marker = tmp_path / "executed"
    spec = {"class_path": class_path, "init_args": {"command": f"mkdir {marker}"}}
    with pytest.raises(UserError, match=f"^Expected a VideoAutoencoder, got {class_path}"):
        checkpoints.build(spec)
    assert not marker.exists()


@pytest.mark.parametrize("class_path", ["absent_package_x.Model", "vidtwin.models.vidtwin.Absent", "Model"])
def test_a_class_that_is_not_installed_is_named(class_path):
    with pytest.raises(UserError, match=f"^Expected the class {class_path} to be installed: "):
        checkpoints.build({"class_path": class_path})


def test_arguments_that_the_class_does_not_take_are_named():
    spec = {"class_path": "vidtwin.models.vidtwin.VidTwin", "init_args": {"num_heds": 4}}
    with pytest.raises(UserError, match=r"Expected arguments of vidtwin\.models\.vidtwin\.VidTwin.*'num_heds'"):
        checkpoints.build(spec)
    with pytest.raises(UserError, match="VideoAutoencoder"):
        checkpoints.build({"class_path": "vidtwin.autoencoder.VideoAutoencoder"})


def test_weights_of_another_size_are_one_line_and_change_nothing(saved):
    path, other = saved[1], Toy(width=5)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(UserError) as error:
        checkpoints.load_weights(other, path)
    assert str(error.value) == (
        f"{path} is of another model or size: layer.weight is (4, 3, 1, 1, 1), expected (5, 3, 1, 1, 1); "
        "layer.bias is (4,), expected (5,); back.weight is (3, 4, 1, 1, 1), expected (3, 5, 1, 1, 1)."
    )
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_missing_and_unexpected_tensors_are_named_and_a_long_list_is_cut():
    state = {f"{letter}.weight": torch.zeros(1) for letter in "abc"}
    with pytest.raises(
        UserError, match=r"^x\.pth is of another model or size: missing c\.weight; unexpected a\.weight"
    ):
        weights.check_fit(
            {k: state[k] for k in ("a.weight", "b.weight")}, {k: state[k] for k in ("b.weight", "c.weight")}, "x.pth"
        )
    many = {f"layer{index}": torch.zeros(1) for index in range(9)}
    with pytest.raises(UserError, match=r"missing layer5; and 3 more\.$"):
        weights.check_fit({}, many, "x.pth")
    weights.check_fit(many, dict(many), "x.pth")


def vidtwin(**arguments):
    return {"class_path": "vidtwin.models.vidtwin.VidTwin", "init_args": arguments}


def test_differences_of_two_specs_are_a_line_each():
    assert checkpoints.differences(vidtwin(depth=16, width=[1, 2]), vidtwin(depth=16, width=(1, 2))) == []
    assert checkpoints.differences(vidtwin(depth=16, num_heads=8), vidtwin(depth=2, num_heads=8, heads=4)) == [
        "depth: 16 in the config, 2 in the checkpoint",
        "heads: None in the config, 4 in the checkpoint",
    ]
    other = {"class_path": "models.B", "init_args": {"depth": 2}}
    assert checkpoints.differences(vidtwin(depth=16), other) == [
        "class_path: vidtwin.models.vidtwin.VidTwin in the config, models.B in the checkpoint"
    ]


def test_an_argument_that_a_stored_spec_lacks_has_its_default():
    assert checkpoints.differences(vidtwin(depth=2, structure_shortcut=0), vidtwin(depth=2)) == []
    assert checkpoints.differences(vidtwin(depth=2, structure_shortcut=1), vidtwin(depth=2)) == [
        "structure_shortcut: 1 in the config, 0 in the checkpoint"
    ]
