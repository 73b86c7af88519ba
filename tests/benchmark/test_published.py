"""Numbers of papers stand beside measured ones; they match only where all that decides them is stated and equal."""

import pytest

from vidtwin.benchmark import published
from vidtwin.benchmark.protocol import PRESETS, ProtocolSettings

STATED = {
    "compared": "floats",
    "psnr": "frame",
    "psnr_epsilon": "1e-8",
    "ssim": "gaussian_pooled",
    "lpips.net": "vgg",
    "lpips.version": "0.1",
    "average": "clip",
    "fvd.convention": "styleganv",
    "posterior": "sample",
    "precision": "32-true",
    "data.split": "test",
    "data.num_clips": "240",
    "data.num_frames": "16",
    "data.resolution": "224",
    "data.fps": "25",
    "data.clip": "all clips of a video",
    "data.tail": "pad",
    "data.crop": "largest centre square",
    "data.resize": "area",
    "data.colour": "BT.601",
}
# The measured protocol's value instead, and its description.
CHANGES = {
    "compared": ("8-bit", "compared floats for 8-bit"),
    "psnr": ("clip", "PSNR of one MSE a frame for clip"),
    "psnr_epsilon": (0.0, "PSNR epsilon 1e-8 for 0"),
    "ssim": ("uniform7", "SSIM gaussian_pooled for uniform7"),
    "lpips.net": ("alex", "LPIPS network vgg for alex"),
    "lpips.version": ("0.0", "LPIPS version 0.1 for 0.0"),
    "average": ("frame", "average clip for frame"),
    "fvd.convention": ("videogpt", "FVD styleganv for videogpt"),
    "posterior": ("mode", "posterior sample for mode"),
    "precision": ("bf16-mixed", "precision 32-true for bf16-mixed"),
    "data.split": ("val", "split test for val"),
    "data.num_clips": (239, "clips 240 for 239"),
    "data.num_frames": (32, "frames 16 for 32"),
    "data.resolution": (256, "resolution 224 for 256"),
    "data.fps": (8.0, "fps 25 for 8"),
    "data.clip": ("one per video, from its middle", "choice of clips all clips of a video for one per video, from"),
    "data.tail": ("drop", "tail pad for drop"),
    "data.crop": ("none", "crop largest centre square for none"),
    "data.resize": ("bicubic", "resize filter area for bicubic"),
    "data.colour": ("BT.709", "colour conversion BT.601 for BT.709"),
}


def paper(protocol=STATED, **numbers):
    values = {"psnr": 28.14, "ssim": 0.8, "lpips": 0.24, "rfvd": 389.0} | numbers
    return published.Published(
        "VidTwin", "a table", "MCL-JCV", 0.002, 0.00205, protocol=dict(protocol), note="", **values
    )


def measured(changes=()):
    data = {
        "split": "test",
        "num_clips": 240,
        "num_frames": 16,
        "resolution": 224,
        "fps": 25.0,
        "clip": "all clips of a video",
        "tail": "pad",
        "crop": "largest centre square",
        "resize": "area",
        "colour": "BT.601",
    }
    protocol = ProtocolSettings(preset="vidtwin").resolve(data, "32-true", dataset="MCL-JCV")
    for key, value in dict(changes).items():
        inner = protocol
        *path, last = key.split(".")
        for part in path:
            inner = inner[part]
        assert last in inner
        inner[last] = value
    return protocol


@pytest.fixture
def known(monkeypatch):
    """Replace the content of `published.csv`."""

    def hold(*entries):
        monkeypatch.setattr(published, "read", lambda: list(entries))

    return hold


def test_a_number_of_the_measured_protocol_matches(known):
    known(paper())
    (entry,) = published.beside(measured())
    assert entry["matches"] is True
    assert entry["differs"] == entry["unknown"] == []
    assert (entry["psnr"], entry["rfvd"], entry["claimed_rate"], entry["rate"]) == (28.14, 389.0, 0.002, 0.00205)


def test_every_field_that_decides_a_number_is_among_the_changes():
    labels = dict(published._OF_ALL)
    for keys in published._OF_ONE.values():
        labels |= keys
    assert set(labels) == set(STATED) == set(CHANGES)


@pytest.mark.parametrize("key", CHANGES)
def test_a_single_change_is_the_one_difference(known, key):
    known(paper())
    value, message = CHANGES[key]
    (entry,) = published.beside(measured({key: value}))
    assert entry["matches"] is False
    assert len(entry["differs"]) == 1
    assert entry["differs"][0].startswith(message)
    assert entry["unknown"] == []


@pytest.mark.parametrize("key", STATED)
def test_a_key_missing_from_a_source_does_not_match(known, key):
    known(paper({name: value for name, value in STATED.items() if name != key}))
    (entry,) = published.beside(measured())
    assert entry["matches"] is False
    assert entry["differs"] == []
    assert len(entry["unknown"]) == 1


def test_a_key_missing_from_the_data_module_does_not_match(known):
    known(paper())
    protocol = measured()
    del protocol["data"]["tail"]
    (entry,) = published.beside(protocol)
    assert (entry["matches"], entry["unknown"]) == (False, ["tail"])


def test_skipped_videos_are_a_difference(known):
    known(paper())
    (entry,) = published.beside(measured() | {"skipped": {"a.mp4": "no frame decodes"}})
    assert (entry["matches"], entry["differs"]) == (False, ["all videos for all but 1"])


def test_the_protocol_of_a_metric_that_a_paper_does_not_print_decides_nothing(known):
    stated = {key: value for key, value in STATED.items() if key.split(".")[0] not in ("ssim", "lpips", "fvd")}
    known(paper(stated, ssim=None, lpips=None, rfvd=None))
    (entry,) = published.beside(measured({"lpips.net": "alex", "ssim": "uniform7"}))
    assert entry["matches"] is True


def test_a_videos_own_size_and_frame_rate_are_native(known):
    known(paper(STATED | {"data.fps": "native", "data.resolution": "native"}))
    (own,) = published.beside(measured({"data.fps": None, "data.resolution": None}))
    (other,) = published.beside(measured({"data.fps": 25.0, "data.resolution": None}))
    assert own["matches"] is True
    assert other["differs"] == ["fps native for 25"]


def test_without_a_name_for_the_data_set_nothing_stands_beside():
    assert published.beside(measured({"dataset": None})) == []
    assert published.beside(measured({"dataset": "my own clips"})) == []


def test_the_data_set_is_found_whatever_its_spelling():
    assert len(published.beside(measured({"dataset": "mcl_jcv"}))) == len(published.beside(measured())) > 20


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("VidTwin", "VidTwin"),
        ("VidTwin, rate 0.2", "VidTwin"),
        ("MAGVIT2", "MAGVIT-v2"),
        ("magvit-v2", "MAGVIT-v2"),
        ("ivideogpt", "iVideoGPT"),
        ("CMD", "CMD"),
        ("cv_vae", "CV-VAE"),
    ],
)
def test_methods_are_found_by_the_name_of_a_row(name, method):
    assert {entry["method"] for entry in published.beside(measured(), [name])} == {method}


def test_a_row_of_no_published_method_has_nothing_beside_it():
    assert published.beside(measured(), ["mean_colour", "VidTwinkle"]) == []


def test_every_published_line_has_a_source_a_number_and_keys_of_the_protocol():
    entries = published.read()
    assert len(entries) == 98
    assert len({(entry.method, entry.source, entry.dataset, entry.psnr, entry.rfvd) for entry in entries}) == 98
    for entry in entries:
        assert entry.method
        assert entry.source
        assert entry.dataset
        assert any(getattr(entry, number) is not None for number in published.NUMBERS)
        assert set(entry.protocol) <= set(STATED)
        assert entry.rate is None or 0 < entry.rate < 0.1


def test_vidtoks_authors_measured_wf_vae_by_their_own_protocol():
    (entry,) = [entry for entry in published.read() if entry.source == "VidTok issue 3 (GitHub)"]
    assert (entry.method, entry.dataset, entry.rate) == ("WF-VAE-L-16", "MCL-JCV", 0.02083)
    assert (entry.psnr, entry.ssim, entry.lpips, entry.rfvd) == (33.76, 0.870, 0.091, 90.8)
    (own,) = [each for each in published.read() if each.method == "VidTok-KL-16" and each.dataset == "MCL-JCV"]
    assert entry.protocol == own.protocol


def test_newer_models_have_several_figures_each_with_what_its_source_states():
    found = {(entry.method, entry.source): entry for entry in published.read() if entry.dataset == "UCF-101"}
    turbo, flash = "Turbo-VAED images/table1.png", "Flash-VAED README"
    assert (found["LTX-Video", turbo].psnr, found["LTX-Video", flash].psnr) == (32.40, 33.28)
    hunyuan = found["HunyuanVideo", turbo]
    assert (hunyuan.psnr, hunyuan.ssim, hunyuan.lpips, hunyuan.rfvd) == (36.48, 0.9663, 0.0126, 1.52)
    assert hunyuan.protocol == {"data.resolution": "256"}
    assert found["Wan 2.1", flash].protocol == {}
    (unstated,) = {entry.source for entry in published.read() if entry.dataset == "not stated"}
    assert unstated == "Wan 2.2 assets/vae.png"
    (beside,) = published.beside(measured({"dataset": "UCF-101"}), ["LARP-L-Long"])
    assert (beside["matches"], beside["rfvd"]) == (False, 20)
    assert "split train for test" in beside["differs"]


def test_a_preset_states_what_its_papers_rows_state():
    """A preset's keys equal those that its source states."""
    sources = {"VidTwin main table": "vidtwin", "VidTok Tab1": "vidtok", "Open-Sora-Plan report": "wfvae"}
    for entry in published.read():
        for source, preset in sources.items():
            if entry.source.startswith(source):
                stated = PRESETS[preset] | PRESETS[preset]["data"] | PRESETS[preset]["peer"]
                for key in ("num_frames", "resolution", "fps", "clip", "tail", "crop", "resize"):
                    if key in stated and f"data.{key}" in entry.protocol:
                        theirs = entry.protocol[f"data.{key}"]
                        assert theirs == ("native" if stated[key] is None else str(stated[key])), (entry, key)
                for key in ("compared", "psnr", "ssim", "average", "posterior"):
                    assert entry.protocol.get(key, stated[key]) == stated[key], (entry, key)


def test_the_papers_main_table_is_there():
    main = {entry.method: entry for entry in published.read() if entry.source == "VidTwin main table"}
    assert set(main) == {"iVideoGPT", "MAGVIT-v2", "CMD", "EMU-3", "CV-VAE", "VidTwin"}
    ours = main["VidTwin"]
    assert (ours.claimed_rate, ours.psnr, ours.ssim, ours.lpips, ours.rfvd) == (0.002, 28.14, 0.8044, 0.2414, 389.0)
