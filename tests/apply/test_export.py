"""Exported encoders and decoders give what the model gives, and one that does not passes for none."""

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file
from sweeping import Pool, Signs
from tiny import BASELINES, tiny_model

from vidtwin import plugins, weights
from vidtwin.cli import main
from vidtwin.posteriors import Quantized

SLOW = pytest.mark.slow
MODELS = {
    "signs": {},
    "vidtwin": {"structure_shortcut": 2},
    "magvit2": BASELINES["magvit2"],
    "cmd": BASELINES["cmd"],
    "ivideogpt": BASELINES["ivideogpt"],
}


def saved(folder, name):
    torch.manual_seed(0)
    own = {"vidtwin": tiny_model, "signs": Signs}
    create = own.get(name) or plugins.load(name, "vidtwin.autoencoders")
    model = create(**MODELS[name])
    model.save_pretrained(folder)
    return model.eval()


def run(*argv):
    return main(["export", *map(str, argv)])


def fails(capsys, *argv):
    capsys.readouterr()
    assert run(*argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def expected(model, clip):
    outputs = {}
    for name, posterior in model.encode(clip).items():
        outputs[name] = posterior.mode()
        if isinstance(posterior, Quantized):
            outputs[f"{name}.codes"] = posterior.codes
    return outputs


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a function that exports a model by torch.export once → the model, the folder and what was printed."""

    @cache
    def export(name):
        folder = tmp_path_factory.mktemp(name)
        model = saved(folder / "model", name)
        frames = model.temporal.usual_length if name in ("vidtwin", "cmd") else 4
        argv = ["--ckpt_path", folder / "model", "--out", folder / "out", "--num_frames", frames, "--resolution", 32]
        with redirect_stdout(io.StringIO()) as printed:
            assert run(*argv) == 0
        return model, folder / "out", printed.getvalue()

    return export


@pytest.mark.parametrize(
    "name", ["vidtwin", "signs", *(pytest.param(name, marks=SLOW) for name in ("magvit2", "cmd", "ivideogpt"))]
)
def test_programs_of_torch_give_the_models_latents_codes_and_clip_of_any_number_of_clips(name, exported):
    model, out, printed = exported(name)
    assert "encoder.pt2: any number of clips; largest difference to the model: " in printed
    frames = json.loads((out / "manifest.json").read_text())["preprocessing"]["num_frames"]
    encoder = torch.export.load(out / "encoder.pt2").module()
    decoder = torch.export.load(out / "decoder.pt2").module()
    for count in (1, 3):
        clip = torch.rand(count, 3, frames, 32, 32) * 2 - 1
        with torch.no_grad():
            wanted, got = expected(model, clip), encoder(clip)
            assert list(got) == list(wanted)
            for key, value in wanted.items():
                torch.testing.assert_close(got[key], value)
            latents = {key: wanted[key] for key in model.latent_names}
            torch.testing.assert_close(decoder(latents)["clip"], model.decode(latents, frames))


@pytest.mark.parametrize("name", ["cmd", pytest.param("vidtwin", marks=SLOW)])
def test_onnx_gives_the_models_latents_and_clip(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = saved(tmp_path / "model", name)
    out = tmp_path / "out"
    assert run("--ckpt_path", tmp_path / "model", "--out", out, "--format", "onnx") == 0
    assert sorted(path.name for path in out.iterdir()) == ["decoder.onnx", "encoder.onnx", "manifest.json"]
    encoder, decoder = (onnxruntime.InferenceSession(out / f"{part}.onnx") for part in ("encoder", "decoder"))
    clip = torch.rand(3, 3, 4, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = model.encode(clip).mode()
        decoded = model.decode(latents)
    for output, value in zip(encoder.get_outputs(), encoder.run(None, {"clip": clip.numpy()}), strict=True):
        torch.testing.assert_close(torch.from_numpy(value), latents[output.name], rtol=1e-4, atol=1e-4)
    [got] = decoder.run(["clip"], {name: value.numpy() for name, value in latents.items()})
    torch.testing.assert_close(torch.from_numpy(got), decoded, rtol=1e-4, atol=1e-4)


@SLOW
def test_a_program_runs_without_vidtwin(tmp_path):
    model = saved(tmp_path / "model", "cmd")
    assert run("--ckpt_path", tmp_path / "model", "--out", tmp_path / "out") == 0
    clip = torch.rand(1, 3, 4, 32, 32)
    save_file({"clip": clip}, tmp_path / "in.safetensors")
    code = """
import sys
sys.modules["vidtwin"] = None
import torch
from safetensors.torch import load_file, save_file
latents = torch.export.load("out/encoder.pt2").module()(load_file("in.safetensors")["clip"])
save_file({name: value.contiguous() for name, value in latents.items()}, "latents.safetensors")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    with torch.no_grad():
        wanted = model.encode(clip).mode()
    for name, value in load_file(tmp_path / "latents.safetensors").items():
        torch.testing.assert_close(value, wanted[name])


def test_the_encoders_file_holds_no_decoder(exported):
    model, out, _ = exported("vidtwin")
    held = torch.export.load(out / "encoder.pt2").state_dict
    numbers = {part: sum(v.numel() for n, v in held.items() if f".{part}" in n) for part in ("decoder", "encoder")}
    assert numbers["decoder"] == 0
    assert numbers["encoder"] == sum(v.numel() for n, v in model.state_dict().items() if n.startswith("encoder"))


def test_the_manifest_lists_inputs_and_outputs(exported):
    model, out, _ = exported("signs")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["class_path"] == model.class_path
    assert manifest["init_args"] == model.init_args
    assert manifest["weights_sha256"] == weights.sha256(model.state_dict())
    assert (manifest["preprocessing"]["num_frames"], manifest["preprocessing"]["resolution"]) == (4, 32)
    assert manifest["versions"]["torch"] == torch.__version__.partition("+")[0]
    encoder, decoder = (manifest["files"][f"{part}.pt2"] for part in ("encoder", "decoder"))
    clip = (3, 4, 32, 32)
    assert encoder["inputs"] == {"clip": {"shape": ["batch", *clip], "dtype": "float32"}}
    latents = {
        name: {"shape": ["batch", *shape], "dtype": "float32"} for name, shape in model.latent_shapes(clip).items()
    }
    codes = {
        f"{name}.codes": {"shape": ["batch", *shape], "dtype": "int64"}
        for name, (shape, _) in model.code_shapes(clip).items()
    }
    assert list(codes) == ["grid.codes"]
    assert encoder["outputs"] == latents | codes
    assert decoder["inputs"] == latents
    assert decoder["outputs"] == encoder["inputs"]
    assert encoder["agrees"]
    assert encoder["batch"] == "any"
    assert encoder["difference"]["grid"] < 1e-5


OWN = """
import torch
from sweeping import Pool
from vidtwin.posteriors import Deterministic, Encoding

class Mine(Pool):
    def _encode(self, clip):
        return Encoding(grid=Deterministic(torch.nn.functional.avg_pool3d(clip, (1, 4, 4))))

class OneSize(Mine):
    def _encode(self, clip):
        return super()._encode(clip.reshape(len(clip), 3, 8, 32, 32))

class Counting(Mine):
    calls = 0
    def _decode(self, latents):
        self.calls += 1
        return super()._decode(latents) + 0.1 * self.calls

class Endless(Mine):
    def _decode(self, latents):
        return super()._decode(latents) / (latents["grid"].sum() * 0)

class Bessel(Mine):
    def _encode(self, clip):
        return super()._encode(torch.special.bessel_j0(clip))

class Branching(Mine):
    def _encode(self, clip):
        return super()._encode(clip if clip.mean() > 0 else -clip)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Models of a user's own file, by name: where each is saved."""
    (tmp_path / "own_models.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    import own_models

    def save(name):
        getattr(own_models, name)(frames=8).save_pretrained(tmp_path / name)
        return ["--ckpt_path", tmp_path / name, "--out", tmp_path / "out", "--resolution", 32]

    yield save
    del sys.modules["own_models"]


def test_a_batch_that_must_be_fixed_is_fixed_and_reported(own, tmp_path, capsys):
    assert run(*own("OneSize"), "--batch_size", 3) == 0
    assert "encoder.pt2: 3 clips at a time" in capsys.readouterr().out
    files = json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]
    assert files["encoder.pt2"]["batch"] == 3
    assert "batch" in files["encoder.pt2"]["batch_fixed_because"]
    assert files["decoder.pt2"]["batch"] == "any"
    encoder = torch.export.load(tmp_path / "out" / "encoder.pt2").module()
    assert encoder(torch.rand(3, 3, 8, 32, 32))["grid"].shape == (3, 3, 8, 8, 8)


@pytest.mark.parametrize(("name", "shown"), [("Counting", "clip 0."), ("Endless", "clip infinite")])
def test_a_program_that_does_not_agree_goes_to_failed(name, shown, own, tmp_path, capsys):
    assert run(*own(name)) == 1
    printed = capsys.readouterr().out
    assert "DOES NOT AGREE" in printed
    assert shown in printed
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["encoder.pt2", "failed", "manifest.json"]
    assert [path.name for path in (out / "failed").iterdir()] == ["decoder.pt2"]
    files = json.loads((out / "manifest.json").read_text())["files"]
    assert set(files) == {"encoder.pt2", "failed/decoder.pt2"}
    assert not files["failed/decoder.pt2"]["agrees"]
    assert run(*own("Mine"), "--overwrite") == 0
    assert sorted(path.name for path in out.iterdir()) == ["decoder.pt2", "encoder.pt2", "manifest.json"]


def test_an_operator_that_onnx_lacks_is_named(own, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    line = fails(capsys, *own("Bessel"), "--format=onnx")
    assert "The encoder of Bessel can't be turned into ONNX" in line
    assert "prims.bessel_j0" in line
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_traced_is_one_line(own, tmp_path, capsys):
    line = fails(capsys, *own("Branching"))
    assert "The encoder of Branching can't be exported: " in line
    assert "data-dependent" in line
    assert not (tmp_path / "out").exists()


def test_missing_onnx_is_reported(tmp_path, capsys, monkeypatch):
    Pool().save_pretrained(tmp_path / "model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = fails(capsys, "--ckpt_path", tmp_path / "model", "--out", tmp_path / "out", "--format", "both")
    assert "Expected onnx, onnxscript, onnxruntime for --format onnx; pip install 'vidtwin[export]'" in line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--out", "{out}"], "give --ckpt_path PATH"),
        (["--ckpt_path", "{model}"], "give --out DIR"),
        (["--ckpt_path", "absent.ckpt", "--out", "{out}"], "got none at absent.ckpt"),
        (["--ckpt_path", "{model}", "--out", "{out}", "--batch_size", "0"], "--batch_size of at least 1, got 0"),
        (["--ckpt_path", "{model}", "--out", "{out}", "--tolerance", "2"], "--tolerance between 0 and 1"),
        (["--ckpt_path", "{model}", "--out", "{out}", "--num_frames", "5"], "Expected a clip of 4 frames, got 5"),
        (["--ckpt_path", "{model}", "--out", "{out}", "--resolution", "64"], "Expected --resolution 32"),
        (["--ckpt_path", "{model}", "--out", "{out}", "--format", "tf"], "tf"),
        (["--ckpt_path", "{model}", "--out", "{model}/config.json"], "to be a folder, got the file"),
        (["--ckpt_path", "{model}", "--out", "{full}"], "Expected no encoder.onnx in"),
    ],
)
def test_a_wrong_option_is_one_line_and_nothing_is_written(argv, message, tmp_path, capsys):
    saved(tmp_path / "model", "vidtwin")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "encoder.onnx").write_text("")
    names = {name: tmp_path / name for name in ("model", "out", "full")}
    assert message in fails(capsys, *(word.format(**names) for word in argv))
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "full" / "encoder.onnx").read_text() == ""
