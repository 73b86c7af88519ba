"""`~` and `$VAR` mean the same in every option and config; values of others' files stay."""

import os
from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace
from tiny import write_config

from vidtwin.cli import bases, main, model_config, paths
from vidtwin.cli.parser import Parser, read_config
from vidtwin.errors import UserError


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, $RUNS, and an empty current folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RUNS", "my runs")
    monkeypatch.delenv("UNSET", raising=False)
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("~/a", "{home}/a"),
        ("~", "{home}"),
        ("--out=~/a", "--out={home}/a"),
        ("-o=$RUNS/a", "-o=my runs/a"),
        ("x/${RUNS}/a", "x/my runs/a"),
        ("a~b", "a~b"),
        ("cost$", "cost$"),
        ("--data.root=pa$$RUNS", "--data.root=pa$RUNS"),
        ("$$$RUNS", "$my runs"),
        ("$1.mp4", "$1.mp4"),
        ("--data=[~/a]", "--data=[~/a]"),  # of which the parser makes a list first
        ("hf://owner/name", "hf://owner/name"),
    ],
)
def test_words_of_a_command_line_are_expanded(home, text, expected):
    assert paths.expand_words([text]) == [expected.format(home=home)]


def test_a_variable_that_is_not_set_is_named_but_a_file_with_a_dollar_stays(home):
    with pytest.raises(UserError, match=r"variable UNSET of \$UNSET/x to be set"):
        paths.expand_text("$UNSET/x")
    Path("$UNSET.mp4").touch()
    assert paths.expand_text("$UNSET.mp4") == "$UNSET.mp4"


def test_values_at_every_depth_are_expanded_and_those_of_others_are_not(home):
    spec = {"class_path": "A", "init_args": {"weights": "$RUNS/theirs"}}
    config = Namespace(
        root="~/data", model=Namespace(init_args=Namespace(weights="$RUNS/theirs", own=["~/a"], backbones={"vgg": "~"}))
    )
    expanded = paths.expand(config, paths.texts(spec)).as_dict()
    assert expanded["root"] == f"{home}/data"
    inner = {"weights": "$RUNS/theirs", "own": [f"{home}/a"], "backbones": {"vgg": str(home)}}
    assert expanded["model"]["init_args"] == inner


def test_a_text_is_expanded_once_and_a_saved_config_gives_it_back(home, monkeypatch):
    monkeypatch.setenv("A", "/tmp/x$B")
    words = paths.expand_words(["--root=$A", "--out", "a$$FOO", "--names=[c$$d]"])
    assert words == ["--root=/tmp/x$B", "--out", "a$FOO", "--names=[c$$d]"]  # of which the parser makes a config
    config = Namespace(root="/tmp/x$B", out="a$FOO", names=["c$$d"], inner=Namespace(more={"key": "$A"}))
    expected = {"root": "/tmp/x$B", "out": "a$FOO", "names": ["c$d"], "inner": {"more": {"key": "/tmp/x$B"}}}
    expanded = paths.expand(config, paths.values(words))
    assert expanded.as_dict() == expected
    assert paths.expand(paths.escape(expanded)).as_dict() == expected


def test_a_training_writes_everything_below_one_folder_and_resumes_from_it(home, capsys):
    content = yaml.safe_load(write_config(Path()).read_text())
    logger = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": "~/${RUNS}/a$$UNSET"},
    }
    content["trainer"] |= {"logger": logger, "max_steps": 2, "limit_val_batches": 0}
    base, variant = Path("base.yaml"), Path("variant.yaml")
    base.write_text(yaml.safe_dump(content))
    variant.write_text("base: $HERE/base.yaml\nlatest_checkpoint: {every_n_steps: 1}\n")
    os.environ["HERE"] = str(base.resolve().parent)
    try:
        assert main(["fit", "--config", "variant.yaml"]) == 0
        assert main(["fit", "--config", "variant.yaml", "--resume=auto", "--trainer.max_steps=3"]) == 0
    finally:
        del os.environ["HERE"]
    run = home / "my runs" / "a$UNSET" / "lightning_logs" / "version_0"
    assert f"resuming from {run}" in capsys.readouterr().err
    assert {path.name for path in (run / "checkpoints").iterdir()} >= {"last.ckpt", "step-00000003.ckpt"}
    assert list(run.glob("events.*"))
    saved = yaml.safe_load((run / "config.yaml").read_text())["trainer"]["logger"]
    assert saved["init_args"]["save_dir"] == f"{home}/my runs/a$$UNSET"
    assert sorted(path.name for path in Path().iterdir()) == ["base.yaml", "config.yaml", "variant.yaml"]
    last = str(run / "checkpoints" / "last.ckpt").replace(str(home), "~")
    assert main(["validate", "--config", "variant.yaml", f"--ckpt_path={last}"]) == 2  # HERE is gone
    assert "variable HERE of $HERE/base.yaml to be set" in capsys.readouterr().err


def test_a_config_of_others_keeps_its_variables(home):
    config = Path("theirs.yaml")
    spec = {"class_path": "vidtwin.baselines.references.MeanColour", "dict_kwargs": {"weights": "$RUNS"}}
    config.write_text(yaml.safe_dump({"model": {"autoencoder": spec}}))
    specs = [model_config.spec(model_config.parse([config], foreign)[1]) for foreign in (True, False)]
    assert [each["init_args"]["weights"] for each in specs] == ["$RUNS", "my runs"]


def test_the_base_of_a_config_of_others_keeps_its_variables(home):
    config = Path("theirs.yaml")
    for base in ("$RUNS/base.yaml", "${RUNS}/base.yaml", "~/base.yaml"):
        config.write_text(f"base: {base}\n")
        with pytest.raises(UserError, match="Expected a config at ") as caught:
            model_config.parse([config], foreign=True)
        assert base in str(caught.value)
        assert "my runs" not in str(caught.value)
        assert str(home) not in str(caught.value)


def test_configs_with_windows_line_ends_and_a_byte_order_mark_are_read_with_their_bases(home):
    parser = Parser()
    parser.add_argument("--size", type=int)
    parser.add_argument("--name", type=str)
    parser.add_argument("--config", action="config")
    Path("base.yaml").write_bytes(b"\xef\xbb\xbfsize: 3\r\n")
    Path("variant.yaml").write_bytes(b"\xef\xbb\xbfbase: base.yaml\r\nname: x\r\n")
    words = bases.expand(["--config=variant.yaml"])
    assert parser.parse_args(words).as_dict().items() >= {"size": 3, "name": "x"}.items()
    assert read_config(bases.chain("variant.yaml")) == {"size": 3, "name": "x"}
