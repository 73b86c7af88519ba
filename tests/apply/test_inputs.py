"""Videos that the arguments of a command mean, and names of their outputs."""

from pathlib import Path

import pytest

from vidtwin.apply.inputs import Input, check_targets, find, target
from vidtwin.errors import UserError


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def names(*given: Path | str) -> list[str]:
    return [entry.name for entry in find(given)]


def test_files_folders_and_globs_are_found_each_once(tmp_path):
    touch(
        tmp_path / "a.mp4", tmp_path / "walk" / "b.avi", tmp_path / "walk" / "deep" / "c.MKV", tmp_path / "walk/no.txt"
    )
    assert names(tmp_path / "a.mp4") == ["a"]
    assert names(tmp_path / "walk") == ["b", "deep/c"]
    assert names(f"{tmp_path}/**/*.avi") == ["b"]
    assert names(tmp_path / "a.mp4", f"{tmp_path}/*.mp4", tmp_path / "walk") == ["a", "b", "deep/c"]


def test_names_keep_their_suffix_if_they_would_be_equal_without(tmp_path):
    touch(tmp_path / "a.mp4", tmp_path / "a.avi", tmp_path / "b.avi", tmp_path / "v1.2.avi")
    assert names(tmp_path) == ["a.avi", "a.mp4", "b", "v1.2"]
    touch(tmp_path / "other" / "a.mp4")
    with pytest.raises(UserError, match=r"different names, got .*a.mp4, .*a.mp4; give a folder that holds them all"):
        find([tmp_path / "a.mp4", tmp_path / "other" / "a.mp4"])


def test_a_folder_of_numbered_images_is_a_video_as_given_and_below_a_folder(tmp_path):
    touch(*(tmp_path / "davis" / "bear" / f"{i:05d}.jpg" for i in range(3)))
    assert find([tmp_path / "davis" / "bear"]) == [Input(tmp_path / "davis" / "bear", "bear")]
    assert find([tmp_path / "davis"]) == [Input(tmp_path / "davis" / "bear", "bear")]


def test_a_name_with_brackets_is_a_file_if_it_exists(tmp_path):
    touch(tmp_path / "a[1].mp4")
    assert names(tmp_path / "a[1].mp4") == ["a[1]"]


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("b.mp4", "Expected a video at .*b.mp4, got no such file; in its folder are a.mp4."),
        ("b", "Expected a video at .*b, got no such file.$"),
        ("none/b.mp4", "the folder .*none does not exist"),
        ("*.mov", r"Expected files that .*\*.mov matches, got none."),
        ("texts", r"Expected videos in .*texts, got 2 .txt."),
        ("empty", "Expected videos in .*empty, got nothing."),
    ],
)
def test_an_argument_without_a_video_is_refused_with_the_existing_files(tmp_path, word, line):
    touch(tmp_path / "a.mp4", tmp_path / "texts" / "1.txt", tmp_path / "texts" / "2.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=line):
        find([tmp_path / word])


def test_outputs_replace_nothing_unasked_and_no_input_ever(tmp_path):
    touch(tmp_path / "a.mp4", tmp_path / "out" / "a.mp4")
    inputs = find([tmp_path / "a.mp4"])
    assert target(tmp_path / "out", "v1.2", ".mp4") == tmp_path / "out" / "v1.2.mp4"
    check_targets([tmp_path / "new" / "a.mp4"], inputs)
    with pytest.raises(UserError, match=r"that do not exist yet, got .*a.mp4; --overwrite replaces them"):
        check_targets([tmp_path / "out" / "a.mp4"], inputs)
    check_targets([tmp_path / "out" / "a.mp4"], inputs, overwrite=True)
    with pytest.raises(UserError, match=r"another folder than that of .*a.mp4, which would be replaced"):
        check_targets([tmp_path / "a.mp4"], inputs, overwrite=True)
