"""`vidtwin prepare ucf101` makes all of UCF-101 from any input, or names the problems and makes nothing."""

import csv
import io
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from vidtwin.cli import commands
from vidtwin.datamodules.ucf101 import UCF101
from vidtwin.datamodules.ucf101 import prepare as module
from vidtwin.errors import UserError

HANDSTAND = "HandstandPushups/v_HandStandPushups_g{}_c01.avi"
SOME = (
    "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi",
    "ApplyEyeMakeup/v_ApplyEyeMakeup_g09_c02.avi",
    HANDSTAND.format("24"),
    HANDSTAND.format("10"),
)


@pytest.fixture(scope="session")
def lists(shared: Path) -> Path:
    return shared / "data" / "ucfTrainTestlist"


@pytest.fixture(scope="session")
def archives(lists: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write two .zip files like UCF-101's: the lists, and 13,320 small files with the names of the videos."""
    folder = tmp_path_factory.mktemp("archives")
    names = [line.split()[0] for k in ("train", "test") for line in (lists / f"{k}list01.txt").read_text().splitlines()]
    videos = write_zip(folder / "UCF101.zip", {f"UCF-101/{name}": name.encode() for name in names})
    files = {f"ucfTrainTestlist/{path.name}": path.read_bytes() for path in lists.iterdir()}
    return [write_zip(folder / "UCF101TrainTestSplits-RecognitionTask.zip", files), videos]


@pytest.fixture(scope="session")
def prepared(archives: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare(out, *archives)
    return out


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    """Copy `prepared` by hard links: replace a file, don't write into it."""
    return shutil.copytree(prepared, tmp_path / "data", copy_function=os.link)


def prepare(out: Path, *arguments: Path | str) -> int:
    return commands.run("prepare", ["ucf101", "--out", str(out), *map(str, arguments)])


def failure(out: Path, *arguments: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        prepare(out, *arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()}


def manifest(out: Path) -> list[dict[str, str]]:
    with (out / "ucf101_manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, files: dict[str, bytes], links: Iterable[tuple[str, str]] = ()) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, target in links:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            archive.addfile(entry)
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def write_rar(path: Path, files: dict[str, bytes], method: int = 0x30) -> Path:
    """Write a RAR archive of version 3: method 0x30 stores the files, 0x33 claims that they are compressed."""

    def block(kind: int, flags: int, fields: bytes) -> bytes:
        head = struct.pack("<BHH", kind, flags, 7 + len(fields)) + fields
        return struct.pack("<H", zlib.crc32(head) & 0xFFFF) + head

    data = b"Rar!\x1a\x07\x00" + block(0x73, 0, bytes(6))
    for name, content in files.items():
        numbers = (len(content), len(content), 3, zlib.crc32(content), 0x4A21_0000, 29, method, len(name), 0o100644)
        data += block(0x74, 0x8000, struct.pack("<IIBIIBBHI", *numbers) + name.encode()) + content
    path.write_bytes(data + block(0x7B, 0x4000, b""))
    return path


def fake(names: Iterable[str], folder: str = "UCF-101/") -> dict[str, bytes]:
    return {folder + name: name.encode() for name in names}


def test_archives_become_the_data_set_that_training_reads(prepared: Path) -> None:
    assert contents(prepared) == {"UCF-101", "ucfTrainTestlist", "ucf101_manifest.csv"}
    data = UCF101(str(prepared / "UCF-101"))
    train, val, test = (data.videos(split) for split in ("train", "val", "test"))
    assert (len(train) + len(val), len(test)) == (9537, 3783)
    assert {video.name.split("_")[2] for video in val} == {"g24", "g25"}
    assert all(video.path.read_text() == video.name for video in (*train, *val, *test))
    assert HANDSTAND.format("24") in {video.name for video in val}
    rows = {row["path"]: row for row in manifest(prepared)}
    assert len(rows) == 13320
    row = rows[HANDSTAND.format("10")]
    assert [row[key] for key in ("label", "group", "split01", "split02", "split03", "bytes")] == [
        *("36", "10", "train", "test", "train", str(len(row["path"])))
    ]


def test_a_second_run_checks_the_existing_files_and_unpacks_nothing(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (copy / "ucf101_manifest.csv").stat().st_mtime_ns
    assert prepare(copy, tmp_path / "deleted.rar", "--verify") == 0
    said = capsys.readouterr().out
    assert "13,320 videos of 101 classes, 0.0 GB (was there, checked)" in said
    assert "split 2: 9,586 train, of them 1,061 in groups 24 and 25 for validation; 3,734 test" in said
    assert f"next: vidtwin fit --config configs/vidtwin_base.yaml --data.root {copy / 'UCF-101'}" in said
    assert (copy / "ucf101_manifest.csv").stat().st_mtime_ns == before
    (copy / "ucf101_manifest.csv").unlink()
    assert prepare(copy) == 0
    assert len(manifest(copy)) == 13320
    # Content of the same size is compared when asked for.
    path = copy / "UCF-101" / SOME[0]
    path.unlink()
    path.write_text("X" * len(SOME[0]))
    assert prepare(copy) == 0
    assert f"1 videos have another ({SOME[0]}); unpack these again" in failure(copy, "--verify")


def test_each_problem_of_the_videos_is_named(copy: Path) -> None:
    videos = copy / "UCF-101"
    (videos / SOME[0]).unlink()
    (videos / SOME[1]).rename(videos / "ApplyLipstick" / "v_ApplyEyeMakeup_g09_c02.avi")
    for name, content in ((SOME[2], b""), (SOME[3], b"longer" * 20), ("YoYo/v_YoYo_g26_c01.avi", b"x")):
        (videos / name).unlink(missing_ok=True)
        (videos / name).write_bytes(content)
    (videos / "YoYo" / "._v_YoYo_g01_c01.avi").touch()  # of a Mac
    said = failure(copy, "--verify")
    assert f"2 missing videos ({SOME[0]}, {SOME[1]});" in said
    assert "2 videos that no list names (ApplyLipstick/v_ApplyEyeMakeup_g09_c02.avi, YoYo/v_YoYo_g26_c01.avi);" in said
    assert f"1 empty videos ({SOME[2]});" in said
    assert f"2 of another size than ucf101_manifest.csv says ({SOME[3]}, {SOME[2]})." in said
    assert "or accept fewer videos with --partial" in said


@pytest.mark.parametrize(
    ("file", "change", "finding"),
    [
        ("trainlist01.txt", lambda text: text.partition("\r\n")[2], "9,536 videos in trainlist01.txt instead of 9,537"),
        ("testlist02.txt", lambda text: text + text[:46], "1 videos that split 2 lists twice (ApplyEyeMakeup/v_Apply"),
        ("testlist03.txt", lambda text: text.replace("g15", "g01"), "groups in both train and test of split 3 (Apply"),
        (
            "trainlist01.txt",
            lambda text: text.replace("avi 3\r", "avi 4\r", 1),
            "1 lines of trainlist01.txt with anoth",
        ),
        ("classInd.txt", lambda text: text.partition("\r\n")[2], "100 classes in classInd.txt instead of"),
        ("classInd.txt", lambda text: text.replace("tandP", "TandP"), "that classInd.txt lacks (HandstandPushups)"),
    ],
)
def test_wrong_lists_are_named(
    lists: Path, tmp_path: Path, file: str, change: Callable[[str], str], finding: str
) -> None:
    wrong = shutil.copytree(lists, tmp_path / "lists")
    with (wrong / file).open(newline="") as opened:
        text = opened.read()
    (wrong / file).write_text(change(text), newline="")
    videos = write_tar(tmp_path / "some.tar", fake(SOME))
    assert finding in failure(tmp_path / "data", "--partial", videos, wrong)
    assert contents(tmp_path / "data") == set()


def test_some_of_the_videos_are_refused_or_get_shorter_lists(lists: Path, tmp_path: Path) -> None:
    # As mirrors have it: folders of splits, and files that are no part of the data set.
    videos = write_tar(tmp_path / "mirror.tar.gz", {**fake(SOME, "m/train/"), "m/train.csv": b"", "m/._v_.avi": b""})
    out = tmp_path / "data"
    assert "13,316 missing videos" in failure(out, lists, videos)
    assert contents(out) == set()
    prepare(out, lists, videos, "--partial")
    assert (out / "ucfTrainTestlist" / "testlist02.txt").read_bytes() == f"{SOME[1]}\r\n{SOME[3]}\r\n".encode()
    assert (out / "ucfTrainTestlist" / "trainlist03.txt").read_text() == "".join(
        f"{name} {label}\n" for name, label in zip(sorted(SOME), (1, 1, 37, 37), strict=True)
    )
    data = UCF101(str(out))
    assert [[video.name for video in data.videos(split)] for split in ("train", "val", "test")] == [
        [SOME[1], SOME[3]], [SOME[2]], [SOME[0]]
    ]  # fmt: skip
    assert [video.label for video in data.videos("train")] == [0, 36]
    # More of them later: the lists grow with the videos.
    assert "13,316 missing videos" in failure(out)
    (out / "UCF-101" / "YoYo").mkdir()
    (out / "UCF-101" / "YoYo" / "v_YoYo_g08_c01.avi").write_text("more")
    prepare(out, "--partial")
    assert [video.name for video in UCF101(str(out)).videos("train")] == [SOME[1], SOME[3], "YoYo/v_YoYo_g08_c01.avi"]
    assert [row["path"] for row in manifest(out)] == [*sorted(SOME), "YoYo/v_YoYo_g08_c01.avi"]
    assert contents(out) == {"UCF-101", "ucfTrainTestlist", "ucfTrainTestlist_full", "ucf101_manifest.csv"}


def test_shortened_lists_are_complete_again_when_the_videos_are(copy: Path, lists: Path) -> None:
    (copy / "UCF-101").rename(copy.parent / "whole")
    prepare(copy, lists, write_tar(copy.parent / "some.tar", fake(SOME)), "--partial")
    assert "ucfTrainTestlist_full" in contents(copy)
    shutil.rmtree(copy / "UCF-101")
    (copy.parent / "whole").rename(copy / "UCF-101")
    prepare(copy)
    assert contents(copy) == {"UCF-101", "ucfTrainTestlist", "ucf101_manifest.csv"}
    for path in lists.iterdir():
        assert (copy / "ucfTrainTestlist" / path.name).read_bytes() == path.read_bytes()


def test_a_rar_archive_of_stored_files_needs_no_program(
    lists: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = write_rar(tmp_path / "UCF101.rar", fake(SOME))
    compressed = write_rar(tmp_path / "compressed.rar", fake(SOME), method=0x33)
    monkeypatch.setenv("PATH", "")
    prepare(tmp_path / "data", stored, lists, "--partial")
    assert [row["path"] for row in manifest(tmp_path / "data")] == sorted(SOME)
    assert (tmp_path / "data" / "UCF-101" / SOME[2]).read_text() == SOME[2]
    said = failure(tmp_path / "other", compressed, lists, "--partial")
    assert "expected one of the programs unrar, unar, " in said
    assert "install one, or unpack the archive by other means and give the folder" in said
    damaged = tmp_path / "damaged.rar"
    damaged.write_bytes(stored.read_bytes()[:-20])
    assert "damaged.rar: expected an intact archive" in failure(tmp_path / "other", damaged, lists, "--partial")
    damaged.write_bytes(stored.read_bytes().replace(SOME[2].encode(), SOME[2].upper().encode()))
    assert "damaged.rar: expected an intact archive" in failure(tmp_path / "other", damaged, lists, "--partial")
    damaged.write_bytes(stored.read_bytes().replace(SOME[2].encode() * 2, SOME[2].encode() + SOME[2].upper().encode()))
    assert "damaged.rar: expected an intact archive" in failure(tmp_path / "other", damaged, lists, "--partial")


def test_a_compressed_rar_archive_is_unpacked_by_the_first_program_that_can(
    lists: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = write_rar(tmp_path / "UCF101.rar", fake(SOME), method=0x33)
    programs = tmp_path / "programs"
    programs.mkdir()
    unpacked = tmp_path / "unpacked"
    for name, content in fake(SOME).items():
        (unpacked / name).parent.mkdir(parents=True, exist_ok=True)
        (unpacked / name).write_bytes(content)
    (unpacked / "UCF-101" / "YoYo").mkdir()
    (unpacked / "UCF-101" / "YoYo" / "v_YoYo_g08_c01.avi").symlink_to("/etc/passwd")
    scripts = {
        "unrar": "echo half > $5/v_YoYo_g09_c01.avi; echo unknown method; exit 3",
        "unar": f"cp -a {unpacked}/. $5 && test $6 = {archive}",
    }
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/bin:/usr/bin")
    prepare(tmp_path / "data", archive, lists, "--partial")
    assert [row["path"] for row in manifest(tmp_path / "data")] == sorted(SOME)
    monkeypatch.setattr("vidtwin.datamodules.ucf101.archives._RAR_TOOLS", {"unrar": ["x", "", "", "", "{folder}"]})
    assert "unrar says: unknown method" in failure(tmp_path / "other", archive, lists, "--partial")


def test_no_archive_writes_outside_of_its_place_or_leaves_links(lists: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    evil = fake(SOME[:2], "../../")
    tar = write_tar(
        tmp_path / "evil.tar",
        {**evil, f"{tmp_path}/classInd.txt/x": b""},
        [("UCF-101/v_YoYo_g08_c01.avi", str(secret)), ("UCF-101/ApplyEyeMakeup", str(tmp_path))],
    )
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        link = zipfile.ZipInfo("UCF-101/YoYo/v_YoYo_g09_c01.avi")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, str(secret))
        archive.writestr(f"..\\..\\{SOME[2]}", "x")
    before = contents(tmp_path)
    prepare(tmp_path / "data", tar, tmp_path / "evil.zip", lists, "--partial")
    assert contents(tmp_path) == before | {"data"}
    assert [row["path"] for row in manifest(tmp_path / "data")] == sorted(SOME[:3])
    assert not any(path.is_symlink() for path in (tmp_path / "data").rglob("*"))


def test_damaged_archives_and_other_files_leave_nothing(archives: list[Path], lists: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.zip"
    half.write_bytes(archives[1].read_bytes()[:500_000])
    flipped = write_zip(tmp_path / "flipped.zip", fake(SOME))
    flipped.write_bytes(flipped.read_bytes().replace(SOME[2].encode() * 2, SOME[2].encode() + SOME[2].upper().encode()))
    tar = write_tar(tmp_path / "cut.tar", {f"UCF-101/{SOME[0]}": os.urandom(100_000)})
    tar.write_bytes(tar.read_bytes()[:50_000])
    packed = write_tar(tmp_path / "packed.tar.gz", {f"UCF-101/{SOME[0]}": os.urandom(100_000)})
    packed.write_bytes(packed.read_bytes()[:50_000])
    page = tmp_path / "page.rar"
    page.write_text("<html>404</html>")
    for path, message in (
        (half, "half.zip: expected an intact archive, got one that can't be unpacked"),
        (flipped, "flipped.zip: expected an intact archive, got one that can't be unpacked (Bad CRC-32"),
        (tar, "cut.tar: expected an intact archive, got one that can't be unpacked"),
        (packed, "packed.tar.gz: expected an intact archive, got one that can't be unpacked"),
        (page, "got a file that begins with b'<html>4'"),
        (tmp_path / "absent.rar", "Expected an archive or a folder at"),
        (tmp_path / "lists_only", "13,320 missing videos"),
    ):
        (tmp_path / "lists_only").mkdir(exist_ok=True)
        assert message in failure(tmp_path / "data", path, lists, "--partial")
        assert contents(tmp_path / "data") == set()
    twice = write_tar(tmp_path / "twice.tar", {**fake(SOME[:1], "a/"), **fake(SOME[:1], "b/"), "c/strange.avi": b"x"})
    assert "give UCF101TrainTestSplits-RecognitionTask.zip too" in failure(tmp_path / "data", twice)
    said = failure(tmp_path / "data", twice, lists, "--partial")
    assert "1 files that come twice (v_ApplyEyeMakeup_g01_c01.avi)" in said
    assert "1 .avi files with other names than UCF-101's (c/strange.avi)" in said


def test_an_unpacked_folder_is_left_unchanged(lists: Path, tmp_path: Path) -> None:
    for name, content in fake(SOME).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    prepare(tmp_path / "data", tmp_path, lists, "--partial")  # the result lies in what is read
    for name in SOME:
        assert (tmp_path / "data" / "UCF-101" / name).samefile(tmp_path / "UCF-101" / name)  # takes no space
    # In its place already, it is used there.
    prepare(tmp_path, lists, "--partial")
    assert len(UCF101(str(tmp_path)).videos("train")) == 2


def test_a_kill_leaves_nothing_half_made(lists: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    code = (
        "import os, sys\nfrom vidtwin.cli import main\nfrom vidtwin.datamodules.ucf101 import prepare\n"
        f"prepare._arrange = lambda *_: os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
        "main(['prepare', *sys.argv[1:]])"
    )
    videos = write_tar(tmp_path / "some.tar", fake(SOME))
    command = [sys.executable, "-c", code, "ucf101", "--out", str(out), str(lists), str(videos), "--partial"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (left,) = contents(out)
    assert left.startswith(".ucf101-")
    assert len(list((out / left / "videos").iterdir())) == len(SOME)
    failure(out, tmp_path / "absent.rar")
    assert contents(out) == set()


def test_a_mistake_is_one_line(prepared: Path, tmp_path: Path) -> None:
    assert "to unpack, since" in failure(tmp_path)
    with pytest.raises(UserError, match=r"invalid choice: 'ucf-101'"):
        commands.run("prepare", ["ucf-101"])
    table = tmp_path / "ucf101_manifest.csv"
    table.write_text("path,label\n")
    (tmp_path / "UCF-101").symlink_to(prepared / "UCF-101")
    (tmp_path / "ucfTrainTestlist").symlink_to(prepared / "ucfTrainTestlist")
    assert "expected a table with the columns path, label, group," in failure(tmp_path)


@pytest.mark.parametrize("name", ["=HYPERLINK(1)/v_A_g01_c01.avi", "@a,b/v_A_g01_c01.avi", "A/v_A_g01_c01.avi"])
def test_no_name_in_the_manifest_is_a_formula(tmp_path: Path, name: str) -> None:
    table = tmp_path / "ucf101_manifest.csv"
    row = dict.fromkeys(module._COLUMNS, "1") | {"path": name}
    module._write_manifest(table, [row])
    (written,) = manifest(tmp_path)
    assert not written["path"].startswith(("=", "@"))
    assert module._read_manifest(table) == {name: row}


def test_the_command_imports_nothing_heavy() -> None:
    code = "import sys, vidtwin.datamodules.ucf101.prepare\n"
    code += "print({'torch', 'lightning', 'av', 'rarfile'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_class_folders_may_be_links(lists: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    prepare(data, lists, write_tar(tmp_path / "some.tar", fake(SOME)), "--partial")
    videos, before = data / "UCF-101", manifest(data)
    assert len(before) == len(SOME)
    name = Path(SOME[0])
    (videos / name.parent).rename(tmp_path / "elsewhere")
    (videos / name.parent).symlink_to(tmp_path / "elsewhere")
    (videos / ".Trash").mkdir()
    (videos / ".Trash" / name.name).touch()
    prepare(data, "--partial")  # checks what is there
    assert manifest(data) == before
    prepare(tmp_path / "again", videos, lists, "--partial")  # takes them from there
    assert manifest(tmp_path / "again") == before
