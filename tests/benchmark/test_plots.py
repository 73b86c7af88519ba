"""Plots of a results folder: their panels, points, Pareto fronts and files."""

import itertools
import random
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from PIL import Image

from vidtwin.benchmark import plots, protocol, rows

SVG = "{http://www.w3.org/2000/svg}"
NAMES = ["rate_quality", "bits_quality", "pareto", "per_clip"]


class Folder:
    """A results folder, made row by row."""

    def __init__(self, path):
        self.path = path
        data = {"data": "UCF101", "num_frames": 4, "resolution": 32, "fps": 8.0}
        self.protocol = protocol.ProtocolSettings().resolve(data, "32-true")
        self.hash = protocol.write(self.protocol, path)

    def add(
        self, name, rate=0.002, psnr=30.0, kind="trained", flops=None, lpips=False, rfvd=None, clips=5, latents=None
    ):
        measured = []
        for index in range(clips):
            numbers = {"mse": 10 ** (-psnr / 10), "psnr": psnr + index - 2, "ssim": 0.8 + min(psnr, 100) / 1000}
            numbers |= {"lpips": 0.5 - psnr / 100} if lpips else {}
            measured.append({"model": name, "name": f"{index}.avi", "start_frame": 0, "num_frames": 4, **numbers})
        metrics = rows.means(measured, self.protocol) | ({} if lpips else {"lpips": "unavailable"})
        row = {
            "schema_version": rows.SCHEMA_VERSION,
            "name": name,
            "kind": kind,
            "parameters": 1,
            "latents": latents or {"z": {"numbers": 8, "bits": None}},
            "compression_rate": rate,
            "bits_per_pixel": None,
            "metrics": metrics | ({"rfvd": rfvd} if rfvd else {}),
            "num_clips": clips,
            "cost": {"flops": {"encode": flops, "decode": flops}} if flops else None,
            "protocol_hash": self.hash,
        }
        rows.write_row(self.path, row, measured)

    def draw(self, *names):
        """Write these plots alone."""
        plots.write_plots(rows.read(self.path), {name: plots._PLOTS[name] for name in names})

    def texts(self, plot):
        """List the texts in a plot."""
        root = ElementTree.parse(self.path / "plots" / f"{plot}.svg").getroot()
        return ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A folder with rows of every kind, and its plots."""
    folder = Folder(tmp_path_factory.mktemp("full"))
    ranked = {"value": 50.0, "num_clips": 500, "ranked": True, "note": ""}
    folder.add("VidTwin", 0.002, 28.0, flops=10**9, lpips=True, rfvd=ranked)
    folder.add("MAGVIT-v2", 0.0065, 26.0, flops=10**12, lpips=True)
    folder.add("$a_1$ & <b>", 0.0685, 31.0, lpips=True)
    folder.add("fresh", 0.004, 12.0, "untrained", lpips=True)
    folder.add("mean_colour", 1e-6, 13.0, "reference", lpips=True)
    plots.write(folder.path)
    return folder


@pytest.mark.parametrize("seed", range(30))
def test_the_pareto_front_is_that_of_brute_force(seed):
    draw = random.Random(seed)
    points = [(draw.randint(0, 9), draw.randint(0, 9)) for _ in range(draw.randint(0, 25))]

    def beaten(point):
        return any(x <= point[0] and y >= point[1] and (x, y) != point for x, y in points)

    front = plots.pareto(points)
    assert sorted(front) == [index for index, point in enumerate(points) if not beaten(point)]
    assert [points[index][0] for index in front] == sorted(points[index][0] for index in front)


def test_every_plot_is_a_picture_and_a_drawing(full):
    expected = [full.path / "plots" / f"{name}.{kind}" for name in NAMES for kind in ("png", "svg")]
    assert sorted(full.path.glob("plots/*")) == sorted(expected)
    for name in NAMES:
        root = ElementTree.parse(full.path / "plots" / f"{name}.svg").getroot()
        assert root.tag == f"{SVG}svg"
        assert root.find(f"{SVG}title").text == f"vidtwin: {name.replace('_', ' ')}"
        assert "PSNR" in root.find(f"{SVG}desc").text
        with Image.open(full.path / "plots" / f"{name}.png") as picture:
            # As large as the drawing, whose lengths are in points.
            width, height = (float(root.get(side).removesuffix("pt")) for side in ("width", "height"))
            assert picture.size == pytest.approx((width / 72 * plots.DPI, height / 72 * plots.DPI), abs=1)
            shown = picture.convert("L").getextrema()
            assert shown[0] < 100 < 250 < shown[1]


def test_a_plot_says_its_protocol_and_how_many_clips(full):
    for name in NAMES:
        words = " ".join(full.texts(name))
        assert f"protocol vidtwin ({full.hash})" in words
        assert "5 clips of UCF101 that all trained models have" in words


def test_a_plot_names_a_reference_of_fewer_clips(folder):
    folder.add("a")
    folder.add("mean_colour", kind="reference", clips=3)
    folder.draw("rate_quality")
    assert "5 clips of UCF101 that all trained models have; mean_colour has 3" in " ".join(folder.texts("rate_quality"))


def test_each_model_is_labelled_whatever_its_name_holds(full):
    for name in ("rate_quality", "per_clip"):
        assert {"VidTwin", "MAGVIT-v2", "$a_1$ & <b>", "fresh", "mean_colour"} <= set(full.texts(name))


def test_panels_are_of_the_metrics_that_were_measured(full, folder):
    words = full.texts("rate_quality")
    assert {"PSNR (dB), ↑ better", "SSIM, ↑ better", "LPIPS (vgg), ↓ better"} <= set(words)
    assert "rFVD of 500 clips, ↓ better" in words
    folder.add("a")
    folder.draw("rate_quality")
    assert [word for word in folder.texts("rate_quality") if "better" in word and "rate" not in word] == [
        "PSNR (dB), ↑ better",
        "SSIM, ↑ better",
    ]


def test_an_rfvd_of_few_clips_is_called_unranked(folder):
    folder.add("a", rfvd={"value": 5.0, "num_clips": 5, "ranked": False, "note": "few"})
    folder.draw("rate_quality")
    assert "rFVD of 5 clips, too few to rank, ↓ better" in folder.texts("rate_quality")


def test_the_cost_in_flops_has_a_panel_where_it_is_known(full, folder):
    label = "FLOPs to encode and decode a clip, ← better"
    assert label in full.texts("pareto")
    folder.add("a")
    folder.draw("pareto")
    assert label not in folder.texts("pareto")


def test_bits_per_pixel_count_codes_by_their_bits_and_numbers_as_fp16(folder):
    codes = {"codes": {"numbers": 4608, "bits": 4608.0}}
    floats = {"structure": {"numbers": 1024, "bits": None}, "dynamics": {"numbers": 1024, "bits": None}}
    pixels = 16 * 224**2
    folder.add("MAGVIT-v2", 4608 / 3 / pixels, 28.0, latents=codes)
    folder.add("VidTwin", 2048 / 3 / pixels, 29.0, latents=floats)
    folder.add("both", 3072 / 3 / pixels, 27.0, latents={"a": floats["structure"], "b": {"numbers": 2048, "bits": 512}})
    rates = {row["name"]: (plots.RATE.value(row), plots.BITS.value(row)) for row in rows.read(folder.path).rows}
    assert rates["MAGVIT-v2"] == pytest.approx((2.25 * rates["VidTwin"][0], 4608 / pixels))
    assert rates["VidTwin"][1] == pytest.approx(16 * 2048 / pixels)
    assert rates["both"][1] == pytest.approx((16 * 1024 + 512) / pixels)
    folder.draw("bits_quality", "rate_quality")
    assert "bits per pixel, continuous latents as fp16, ← better" in folder.texts("bits_quality")
    assert "compression rate in numbers (%), ← better" in folder.texts("rate_quality")


def test_equal_folders_give_equal_bytes(full, tmp_path):
    first = {path.name: path.read_bytes() for path in full.path.glob("plots/*")}
    # In another process, with other settings of matplotlib.
    code = "import sys, matplotlib; matplotlib.rcParams['font.size'] = 20; from vidtwin.benchmark import plots; "
    subprocess.run([sys.executable, "-c", code + "plots.write(sys.argv[1])", str(full.path)], check=True)
    assert {path.name: path.read_bytes() for path in full.path.glob("plots/*")} == first


def test_settings_of_matplotlib_are_left_as_they_were(folder):
    import matplotlib

    folder.add("a")
    before = dict(matplotlib.rcParams)
    folder.draw("pareto")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("kind", ["trained", "untrained", "reference"])
@pytest.mark.filterwarnings("error")
def test_a_single_row_of_one_clip_is_drawn_without_a_warning(folder, kind):
    folder.add("only", kind=kind, clips=1, flops=5)
    assert len(plots.write(folder.path)) == 8


def test_a_reconstruction_without_error_leaves_its_infinite_psnr_out(folder):
    folder.add("exact", psnr=float("inf"))
    folder.add("a")
    folder.draw("per_clip", "rate_quality")
    assert folder.texts("per_clip").count("exact") == 0
    assert folder.texts("rate_quality").count("exact") == 1  # by its SSIM
    assert folder.texts("rate_quality").count("a") == 2


def test_plots_without_numbers_are_not_written_and_old_ones_go(full, tmp_path):
    folder = Folder(tmp_path / "failed")
    folder.add("a")
    assert len(plots.write(folder.path)) == 8
    row = '{"schema_version": 2, "name": "a", "kind": "failed", "error": "no weights", "protocol_hash": "%s"}'
    (folder.path / "rows" / "a" / "results.json").write_text(row % folder.hash)
    assert plots.write(folder.path) == []
    assert list(folder.path.glob("plots/*")) == []


def test_temporary_files_that_a_kill_left_are_removed_and_no_others(folder):
    folder.add("a")
    folder.draw("rate_quality")
    code = (
        "import os, signal, sys; from matplotlib.figure import Figure; from vidtwin.benchmark import plots; "
        "Figure.savefig = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL); plots.write(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(folder.path)], check=False)
    left = list(folder.path.glob("plots/.*"))
    assert [path.suffix for path in left] == [".png"]
    other = folder.path / "plots" / ".mine-abcdefgh.png"
    other.touch()
    folder.draw("rate_quality")
    assert list(folder.path.glob("plots/.*")) == [other]


@pytest.mark.parametrize(("higher", "joined"), [(True, [2.0, 3.0]), (False, [1.0])])
def test_the_front_is_that_of_the_better_direction(higher, joined):
    figure = plots.make_figure(1, 1)
    points = [plots.Point("a", 1.0, 2.0, {}, True), plots.Point("b", 2.0, 3.0, {}, True)]
    points += [plots.Point("c", 1.0, 1.0, {}, True)]
    assert sorted({y for _, y in plots._front(figure.axes[0], points, higher)}) == joined


def test_colours_distinguish_models_and_markers_kinds(folder):
    for index in range(12):
        folder.add(f"m{index:02d}", psnr=30 - index)
    folder.add("fresh", kind="untrained")
    folder.add("mean_colour", kind="reference")
    styles = plots.styles(rows.read(folder.path))
    marks = [(style["color"], style["marker"]) for style in styles.values()]
    assert len(set(marks)) == 14
    assert styles["fresh"]["markerfacecolor"] == "white"
    grey = plots.PALETTE["reference"]
    assert styles["m03"]["markerfacecolor"] == styles["m03"]["color"] != grey
    assert styles["mean_colour"]["color"] == grey


def test_forty_nine_models_have_a_colour_and_marker_of_their_own(folder):
    listed = [{"name": f"{index}", "kind": "trained"} for index in range(49)]
    results = rows.Results(folder.path, folder.protocol, folder.hash, listed, {}, {"rows": {}})
    assert len(set(plots.looks(results).values())) == 49


def test_a_point_says_its_numbers_on_hovering(full):
    root = ElementTree.parse(full.path / "plots" / "pareto.svg").getroot()
    titles = {(group.get("class"), group.findtext(f"{SVG}title")) for group in root.iter(f"{SVG}g")}
    assert ("trained", "$a_1$ & <b>: PSNR (dB) 31.00, compression rate in numbers (%) 6.85") in titles
    assert ("reference", "mean_colour: PSNR (dB) 13.00, compression rate in numbers (%) 0.0001") in titles
    assert ("trained", "VidTwin: PSNR (dB) 28.00, FLOPs to encode and decode a clip 2 G") in titles


def test_colours_differ_for_readers_with_colour_blindness_by_lightness_or_marker():
    # Luminance of sRGB, on white at least 4.5 : 1 (WCAG's contrast for text): labels have the points' colours.
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    assert min(1.05 / (luminance(colour) + 0.05) for colour in plots.COLOURS) >= 4.3
    assert len(set(plots.MARKERS.values())) == len(plots.MARKERS) == len(plots.COLOURS) + 1


def test_labels_of_neighbours_do_not_cover_each_other(tmp_path, monkeypatch):
    folder = Folder(tmp_path)
    for index in range(8):
        folder.add(f"model number {index}", 0.002 + 0.00001 * index, 30 + 0.02 * index)
    boxes = []
    label = plots._label

    def kept(axes, points, corners):
        label(axes, points, corners)
        renderer = axes.get_figure().canvas.get_renderer()
        boxes.append([text.get_window_extent(renderer) for text in axes.texts])

    monkeypatch.setattr(plots, "_label", kept)
    plots.write(folder.path)
    assert [len(found) for found in boxes] == [8] * 6  # PSNR and SSIM over both rates; PSNR with its front over both
    for found in boxes:
        assert not any(plots._overlap(one, other) > 1 for one, other in itertools.combinations(found, 2))


def test_importing_plots_imports_no_matplotlib_and_no_torch():
    code = "import sys, vidtwin.benchmark.plots; print(sorted({'matplotlib', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
