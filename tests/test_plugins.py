"""Plug-ins by short name and class name; a broken one is a warning with its name."""

import subprocess
import sys
import warnings
from importlib.metadata import EntryPoint

import pytest

from vidtwin import plugins
from vidtwin.errors import UserError

GROUP = "vidtwin.autoencoders"


@pytest.fixture
def installed(monkeypatch):
    """Let packages register `(name, value)` pairs in place of what is really installed."""

    def install(*pairs):
        entries = [EntryPoint(name, value, GROUP) for name, value in pairs]
        monkeypatch.setattr(plugins, "entry_points", lambda group: entries if group == GROUP else [])

    return install


def test_the_built_in_models_come_in_by_the_same_door():
    assert plugins.load("vidtwin", GROUP).__name__ == "VidTwin"
    assert plugins.resolve("ucf101", "vidtwin.datamodules") == "vidtwin.datamodules.ucf101.UCF101"


@pytest.mark.parametrize("name", ["their_model", "TheirTokenizer"])
def test_short_name_and_class_name_resolve_without_an_import(installed, name):
    installed(("their_model", "absent_package.models:TheirTokenizer"), ("other", "absent_package:Other"))
    assert plugins.resolve(name, GROUP) == "absent_package.models.TheirTokenizer"


def test_any_other_name_stays_as_it_is(installed):
    installed(("their_model", "absent_package:TheirTokenizer"))
    assert plugins.resolve("their_package.models.Tokenizer", GROUP) == "their_package.models.Tokenizer"
    assert plugins.resolve("TheirTokenizer", "vidtwin.datamodules") == "TheirTokenizer"


def test_an_absent_plug_in_is_named_beside_those_there_are(installed):
    installed(("b", "m:B"), ("a", "m:A"))
    with pytest.raises(UserError) as error:
        plugins.load("c", GROUP)
    assert str(error.value) == "Expected the name of a plug-in, got 'c'. Known: a, b."


@pytest.mark.parametrize(
    ("source", "reason"),
    [("raise RuntimeError('no driver')", "no driver"), ("import absent_package_x", "absent_package_x"), ("", "Model")],
    ids=["fails at import", "dependency absent", "class absent"],
)
def test_a_broken_plug_in_is_a_warning_with_its_name_and_the_others_load(
    installed, tmp_path, monkeypatch, source, reason
):
    (tmp_path / "broken_plugin_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_plugin_module", raising=False)
    installed(("broken", "broken_plugin_module:Model"), ("good", "collections:OrderedDict"))
    with pytest.warns(UserWarning, match=rf"Plug-in broken \(broken_plugin_module:Model\).*{reason}"):
        loaded = plugins.load_all(GROUP)
    assert list(loaded) == ["good"]


def test_of_two_with_one_name_the_first_is_used_and_both_are_named(installed):
    installed(("tokenizer", "first:A"), ("tokenizer", "second:B"))
    with pytest.warns(UserWarning, match="Two plug-ins are called 'tokenizer': first:A is used, second:B is not"):
        assert plugins.resolve("tokenizer", GROUP) == "first.A"


def test_a_plug_in_that_is_found_twice_does_not_clash(installed):
    installed(("tokenizer", "first:A"), ("tokenizer", "first:A"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(plugins.available(GROUP)) == ["tokenizer"]


def test_the_package_is_found_beside_a_folder_of_its_name(tmp_path):
    (tmp_path / "vidtwin").mkdir()  # as beside a clone, for Python a namespace package
    command = [sys.executable, "-c", "import vidtwin; print(vidtwin.__file__)"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert found.strip().endswith("vidtwin/__init__.py")
