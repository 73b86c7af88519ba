"""`vidtwin check` in process: promises by name, exit codes, one line per mistake."""

import sys
from pathlib import Path

import pytest
import torch
from test_contract import TINY

from vidtwin import testing
from vidtwin.cli import main
from vidtwin.testing import check_promises

ROOT = Path(__file__).resolve().parents[2]
GOOD = """
import torch
from torch import nn
from vidtwin import Encoding, TemporalSpec, UserError, VideoAutoencoder
from vidtwin.posteriors import Deterministic, Quantized


class Good(VideoAutoencoder):
    latent_names = ("patches",)
    spatial_multiple = 8

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        if channels < 1:
            raise UserError(f"Expected channels above 0, got {channels}.")
        self.channels = channels
        self.down = nn.Conv3d(3, channels, (1, 8, 8), stride=(1, 8, 8))
        self.up = nn.ConvTranspose3d(channels, 3, (1, 8, 8), stride=(1, 8, 8))

    def _encode(self, clip):
        return Encoding(patches=Deterministic(self.down(clip)))

    def _decode(self, latents):
        return self.up(latents["patches"])

    def _latent_shapes(self, clip_shape):
        _, frames, height, width = clip_shape
        return {"patches": (self.channels, frames, height // 8, width // 8)}

    @property
    def last_layer(self):
        return self.up.weight
"""
BROKEN = """

class Raises(Good):
    def _decode(self, latents):
        return self.up(latents["patches"] @ torch.zeros(3, 3))


class NoRange(Good):
    value_range = (0.0, 1.0)

    def encode(self, clip):
        self.check_clip(clip)
        return self._encode(clip)


class NoRangeBack(Good):
    value_range = (0.0, 1.0)

    def decode(self, latents, num_frames=None):
        return super().decode(latents, num_frames) / 2 + 0.5


class EvenFramesOnly(Good):
    def _encode(self, clip):
        assert clip.shape[2] % 2 == 0, "odd"
        return super()._encode(clip)


class AnySize(Good):
    spatial_multiple = 1


class HalfPrecision(Good):
    def _decode(self, latents):
        frames = super()._decode(latents)
        return frames * float("nan") if frames.dtype == torch.bfloat16 else frames


class Counts(Good):
    def __init__(self):
        super().__init__()
        self.register_buffer("clips", torch.zeros(()))

    def _encode(self, clip):
        self.clips += len(clip)
        return super()._encode(clip)


class Hidden(Good):
    def _encode(self, clip):
        latent = self.down(clip)
        return Encoding(patches=Quantized(latent, torch.zeros(latent.shape).long(), 8))


class Mixed(Good):
    latent_names = ("signs", "patches")

    def _encode(self, clip):
        latent = self.down(clip)
        signs = latent + (latent.sign() - latent).detach()
        return Encoding(signs=Quantized(signs, (latent > 0).long(), 2), patches=Deterministic(latent))

    def _decode(self, latents):
        return self.up(latents["signs"] + latents["patches"])

    def dequantize(self, codes):
        return {"signs": 2.0 * codes["signs"] - 1}

    def code_shapes(self, clip_shape):
        return {"signs": (self.latent_shapes(clip_shape)["signs"], 2)}

    def _latent_shapes(self, clip_shape):
        return dict.fromkeys(self.latent_names, super()._latent_shapes(clip_shape)["patches"])


class MixedNeedsAll(Mixed):
    def dequantize(self, codes):
        return {"signs": 2.0 * codes["signs"] - 1, "patches": codes["patches"]}


class OneFrameFewer(Good):
    temporal = TemporalSpec(multiple=2, pad="last")

    def decode(self, latents, num_frames=None):
        clip = super().decode(latents)
        return clip[:, :, :num_frames] if num_frames != 5 else clip


class ShortClips(Good):
    temporal = TemporalSpec(maximum=8)


class LongClips(Good):
    temporal = TemporalSpec(minimum=17)


class KnowsNoMeta(Good):
    def _encode(self, clip):
        assert clip.device.type == "cpu"
        return super()._encode(clip)


class Unbuildable(Good):
    def __init__(self, channels: int = 2) -> None:
        super().__init__(channels)
        self.table = [][channels]


class Abstract(VideoAutoencoder):
    latent_names = ("z",)

    def _encode(self, clip):
        return Encoding()


class Plain(nn.Module):
    pass


def function():
    pass
"""
SMALL = ["--num_frames", "4", "--resolution", "16"]
TINY_MAGVIT2 = ["--autoencoder.channels=4", "--autoencoder.num_blocks=1", "--autoencoder.latent_channels=4"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "their_models.py").write_text(GOOD + BROKEN)
    (tmp_path / "their_broken.py").write_text("import torch\n\nraise OSError('no driver')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("their_models", "their_broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path
    sys.modules.pop("their_models", None)


def check(capsys, *words):
    code = main(["check", *words])
    return code, capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["temporal_mean", "--autoencoder.resolution", "16"], ["parameters         0", "frame (3, 16, 16)", "6.2500%"]),
        (
            ["TemporalMean", "--autoencoder.num_frames=4", "--autoencoder.resolution=8"],
            ["4 frames of 8 x 8", "25.0000%"],
        ),
        (
            ["vidtwin", *(f"--autoencoder.{k}={v}" for k, v in TINY["vidtwin"][0].items())],
            ["structure (", "dynamics ("],
        ),
        (["their_models.Good", "--autoencoder.channels", "3", *SMALL], ["latents            patches (3, 4, 2, 2)"]),
        (
            ["magvit2", *TINY_MAGVIT2, "--num_frames=4", "--resolution=[16,24]"],
            ["4 frames of 24 x 16 pixels", "latents            latent (4, 1, 2, 3)"],
        ),
        (["their_models.Mixed", *SMALL], ["signs 2 entries", "ok       decode needs only the codes\n"]),
    ],
    ids=["short name", "class name", "vidtwin", "file in the current folder", "rectangle", "some latents discrete"],
)
def test_a_model_that_keeps_its_promises_exits_with_0_and_is_summarized(capsys, words, expected):
    code, printed = check(capsys, *words)
    assert code == 0, printed
    assert printed.err == ""
    assert "FAILED" not in printed.out
    assert " promises kept, 0 broken, " in printed.out
    for part in expected:
        assert part in printed.out


def test_the_autoencoder_of_a_config_is_checked_and_options_change_it(capsys):
    small = ["--autoencoder.hidden_size=32", "--autoencoder.depth=1", "--autoencoder.structure_channels=2"]
    code, printed = check(capsys, "--config", str(ROOT / "configs/demo.yaml"), *small)
    assert code == 0, printed
    assert "16 frames of 64 x 64 pixels" in printed.out
    assert "structure (2, 4, 8, 8)" in printed.out


@pytest.mark.parametrize(("name", "frames"), [("ShortClips", 8), ("LongClips", 17), ("Good", 16)])
def test_without_num_frames_the_clip_has_a_length_that_the_model_takes(capsys, name, frames):
    code, printed = check(capsys, f"their_models.{name}", "--resolution=16")
    assert code == 0, printed
    assert printed.out.startswith(f"their_models.{name} on a clip of {frames} frames of 16 x 16 pixels\n")


def test_only_the_autoencoder_of_a_config_is_built(capsys, folder):
    (folder / "part.yaml").write_text("class_path: their_broken.Loss\n")
    (folder / "fit.yaml").write_text(
        "model: {autoencoder: {class_path: their_models.Good}, loss: part.yaml, scheduler: {class_path: absent.X}}\n"
        "data: {class_path: their_broken.Data}\ntrainer: {max_steps: 3}\n"
    )
    code, printed = check(capsys, "--config", "fit.yaml", *SMALL)
    assert code == 0, printed


@pytest.mark.parametrize(
    ("name", "lines"),
    {
        "Raises": [
            "FAILED   decode returns the shape of the clip: decode returns the shape of the clip: RuntimeError("
        ],
        "NoRange": ["FAILED   value range: _encode() gets pixels of value_range 0.0 to 1.0", "got -1 to 1; set"],
        "NoRangeBack": ["FAILED   value range: decode() maps what _decode() gives from value_range 0.0 to 1.0"],
        "EvenFramesOnly": [
            "FAILED   clip lengths: a clip of 3 frames encodes and decodes, as temporal (any number of frames",
            "AssertionError('odd'), raised at their_models.py:",
        ],
        "AnySize": ["FAILED   height and width: a clip of 16 x 17 pixels comes back in its shape", "set it to what"],
        "HalfPrecision": ["FAILED   bfloat16: decode() under torch.autocast in bfloat16 gives finite pixels"],
        "Counts": ["FAILED   evaluation changes no weights or buffers: encode()", "they changed clips; move"],
        "Hidden": ["FAILED   codes and codebook sizes: code_shapes() names patches, whose posterior is Quantized"],
        "MixedNeedsAll": ["FAILED   decode needs only the codes", "KeyError('patches'), raised at their_models.py:"],
        "OneFrameFewer": ["FAILED   clip lengths: a clip of 5 frames (padded to 6) comes back in its shape"],
    }.items(),
)
def test_a_broken_promise_exits_with_1_and_is_named_with_advice(capsys, name, lines):
    code, printed = check(capsys, f"their_models.{name}", *SMALL)
    assert code == 1, printed
    broken = [line for line in printed.out.splitlines() if line.startswith("FAILED")]
    assert len(broken) == 1, broken
    for part in lines:
        assert part in broken[0]
    assert ", 1 broken, " in printed.out


def test_an_exception_of_the_users_code_is_shown_with_its_line_and_later_promises_are_skipped(capsys, folder):
    _, printed = check(capsys, "their_models.Raises", *SMALL)
    number = next(
        n
        for n, line in enumerate((folder / "their_models.py").read_text().splitlines(), 1)
        if "torch.zeros(3, 3)" in line
    )
    assert f"raised at their_models.py:{number}\n" in printed.out
    assert "ok       latent shapes\n" in printed.out
    assert "skipped  clip lengths: it needs: decode returns the shape of the clip\n" in printed.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Expected an autoencoder to check; give its name"),
        (["vidtwn"], "path (module.Class), got 'vidtwn'; did you mean 'vidtwin'? Known: allegro, cmd, "),
        (["absent_package.Model"], "absent_package does not import: ModuleNotFoundError("),
        (["their_broken.Model"], "their_broken does not import: OSError('no driver'), raised at their_broken.py:3."),
        (["their_models.Goods"], "module 'their_models' has no attribute 'Goods'; did you mean 'Good'?"),
        (["their_models.Plain"], "Expected a VideoAutoencoder, got their_models.Plain."),
        (["their_models.function"], "Expected a VideoAutoencoder, got their_models.function"),
        (["their_models.Abstract"], "their_models.Abstract lacks _decode, _latent_shapes, last_layer"),
        (
            ["their_models.Unbuildable"],
            "can't be built: IndexError('list index out of range'), raised at their_models.py:",
        ),
        (["their_models.Good", "--autoencoder.channels=0"], "error: Expected channels above 0, got 0."),
        (["their_models.Good", "--autoencoder.chanels=2"], "did you mean 'channels'?"),
        (["their_models.Good", "--autoencoder.channels=x"], "channels"),
        (["their_models.Good", "--num_frame=2"], "did you mean 'num_frames'?"),
        (["their_models.Good", "--num_frames=0"], "Expected num_frames of at least 1, got 0."),
        (["their_models.Good", "--resolution=20"], "multiples of 8"),
        (["their_models.Good", "--resolution=[16]"], "Expected resolution of at least 1, or as [height, width]"),
        (["temporal_mean", "--resolution=[32,16]"], "Expected clips of the model's own resolution 224, got [32, 16]."),
        (["their_models.Good", "--batch_size=1"], "Expected a batch of at least 2 clips"),
        (["their_models.Good", "--device=abacus"], "Expected a device that this machine has, got 'abacus'"),
        (["temporal_mean", "--resolution=32"], "Expected clips of the model's own resolution 224, got 32."),
        (["temporal_mean", "--autoencoder.resolution=16", "--num_frames=4"], "set data.num_frames=16"),
        (
            ["their_models.Good", "--config", str(ROOT / "configs/demo.yaml")],
            "Expected NAME or --config FILE, got both",
        ),
        (["--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_an_invalid_command_is_one_line_and_exit_code_2(capsys, words, message):
    code, printed = check(capsys, *words)
    assert code == 2, printed
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert "ok " not in printed.out


def test_a_model_of_many_operations_is_announced_as_slow(capsys, monkeypatch):
    # Each number in the 2 latents of 2 x 2 patches is a product with 3 x 8 x 8 numbers, and so is each way back.
    flops = 2 * 2 * (4 * 2 * 2 * 2) * (3 * 8 * 8)
    monkeypatch.setattr("vidtwin.cli.check._LARGE_FLOPS", flops - 1)
    code, printed = check(capsys, "their_models.Good", *SMALL)
    assert code == 0
    assert printed.out.splitlines()[1].startswith(f"{flops:,} operations a clip: this takes minutes")
    monkeypatch.setattr("vidtwin.cli.check._LARGE_FLOPS", flops)
    assert "this takes minutes" not in check(capsys, "their_models.Good", *SMALL)[1].out


@pytest.mark.parametrize("name", ["KnowsNoMeta", "Raises"])
def test_parameters_decide_if_operations_cannot_be_counted(capsys, monkeypatch, name):
    monkeypatch.setattr("vidtwin.cli.check._LARGE_PARAMETERS", 772)
    _, printed = check(capsys, f"their_models.{name}", *SMALL)
    assert printed.out.splitlines()[1].startswith("773 parameters: this takes minutes")
    monkeypatch.setattr("vidtwin.cli.check._LARGE_PARAMETERS", 773)
    assert "this takes minutes" not in check(capsys, f"their_models.{name}", *SMALL)[1].out


def test_cmd_at_full_size_is_announced_as_slow_and_the_example_of_the_help_is_not(capsys, monkeypatch):
    from vidtwin.baselines.cmd import CMD
    from vidtwin.cli.check import _DESCRIPTION, _cost

    with torch.device("meta"):
        model = CMD()
    assert _cost(model, (3, 16, 224, 224)).endswith(" operations a clip")
    words = next(line.split()[2:] for line in _DESCRIPTION.splitlines() if line.startswith("  vidtwin check"))
    code, printed = check(capsys, *words)
    assert code == 0, printed
    assert words[0] == "cmd"
    assert "this takes minutes" not in printed.out


def test_a_broken_plug_in_is_named_with_its_error(capsys, monkeypatch):
    from importlib.metadata import EntryPoint

    entry = EntryPoint("theirs", "their_broken:Model", "vidtwin.autoencoders")
    command = EntryPoint("check", "vidtwin.cli.check:check_command", "vidtwin.commands")
    monkeypatch.setattr("vidtwin.plugins.entry_points", lambda group: [e for e in (entry, command) if e.group == group])
    code, printed = check(capsys, "theirs")
    assert code == 2
    assert "OSError('no driver'), raised at their_broken.py:3" in printed.err


def test_a_check_that_stops_early_restores_the_model():
    import their_models

    model = their_models.Counts().train()
    random = torch.random.get_rng_state()
    promises = check_promises(model, 4, 16)
    next(promises)
    assert float(model.clips) == 2
    promises.close()
    assert float(model.clips) == 0
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), random)
    assert [name for name in vars(model) if name.startswith("_encode")] == []


def test_every_promise_is_answered_once_and_needs_only_earlier_ones():
    import their_models

    names = [promise.name for promise in check_promises(their_models.Good(), 4, 16)]
    assert names == list(testing._PROMISES)
    for index, (_, needs) in enumerate(testing._PROMISES.values()):
        assert set(needs) <= set(names[:index])


def test_help_describes_the_command_and_the_arguments_of_an_autoencoder(capsys):
    code, printed = check(capsys, "--help")
    assert code == 0
    for part in ("vidtwin check (NAME | --config FILE)", "1 one broken", "default: 2)", "--autoencoder.help"):
        assert part in printed.out
    code, printed = check(capsys, "their_models.Good", "--autoencoder.help")
    assert code == 0
    assert "channels" in printed.out
    assert main(["--help"]) == 0
    assert "check         Hold an autoencoder to the promises" in capsys.readouterr().out
