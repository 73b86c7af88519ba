"""The table of a results folder: its numbers and ranks, in Markdown, CSV and LaTeX."""

import csv
import io
import json
import re
from pathlib import Path

import pytest

from vidtwin.benchmark import protocol, render, rows, summary
from vidtwin.errors import UserError
from vidtwin.metrics.registry import BY_KEY, SHOWN, format_number

CLIPS = ("a.avi", "b.avi", "c.avi")
LATENT = {"shape": [1], "rate": 0.001, "numbers": 1, "bits": None}
NAME = r"a_b & 50% #1 {x} ~^\$"


class Folder:
    """A results folder, made row by row."""

    def __init__(self, path, dataset=None, **data):
        self.path = path
        average = data.pop("average", None)
        of_data = {"data": "UCF101", "num_frames": 4, "resolution": 32, "fps": 8.0, "split": "test"} | data
        self.protocol = protocol.ProtocolSettings(average=average).resolve(of_data, "32-true", dataset=dataset)
        self.hash = protocol.write(self.protocol, path)

    def add(
        self,
        name,
        psnr=30.0,
        kind="trained",
        clips=CLIPS,
        rfvd=None,
        ssim=0.8,
        lpips=None,
        spread=1 / 3,
        st_lpips=None,
        **more,
    ):
        measured = []
        for index, clip in enumerate(clips):
            numbers = {"mse": 10 ** (-psnr / 10), "psnr": psnr + (index - 1) * spread, "ssim": ssim + index / 100}
            numbers |= {} if lpips is None else {"lpips": lpips}
            numbers |= {} if st_lpips is None else {"st_lpips": st_lpips}
            measured.append({"model": name, "name": clip, "start_frame": 4 * clips[:index].count(clip)})
            measured[-1] |= {"num_frames": 4, **numbers}
        row = {
            "schema_version": rows.SCHEMA_VERSION,
            "name": name,
            "kind": kind,
            "error": None,
            "model": {"class_path": "their.Model", "init_args": {}},
            "checkpoint": "runs/last.ckpt",
            "fingerprint": "0f",
            "weights": "of the last step",
            "windows": None,
            "parameters": 1234567,
            "latents": {"latent": {"shape": [4, 2, 2], "numbers": 16, "rate": 0.00130208, "bits": None}},
            "compression_rate": 0.00130208,
            "bits_per_pixel": None,
            "claimed": None,
            "metrics": rows.means(measured, self.protocol)
            | ({"lpips": "unavailable"} if lpips is None else {})
            | ({"rfvd": rfvd} if rfvd else {}),
            "unavailable": {"lpips": "no weights of VGG-16"},
            "num_clips": len(measured),
            "failed_clips": [],
            "cost": None,
            "downstream": None,
            "protocol_hash": self.hash,
            "device": "cpu (a test)",
        }
        rows.write_row(self.path, row | more, measured)
        return row | more

    def fail(self, name, error):
        row = {"schema_version": 2, "name": name, "kind": "failed", "error": error, "protocol_hash": self.hash}
        path = self.path / "rows" / name / "results.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(row))

    def results(self):
        return rows.read(self.path)

    def csv(self):
        return {line["model"]: line for line in csv.DictReader(io.StringIO(render.as_csv(self.results())))}

    def markdown(self):
        """Return head and rows of the first table, by the first cell."""
        lines = [line for line in render.markdown(self.results()).split("\n\n")[0].splitlines() if "|" in line]
        cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
        return cells[0], {line[0]: dict(zip(cells[0], line, strict=True)) for line in cells[2:]}


def rfvd(value, ranked, num_clips=3):
    return {"value": value, "num_clips": num_clips, "ranked": ranked, "note": "" if ranked else "not ranked below 401"}


def marks(results, key):
    """Return the mark of each marked row in the column of a metric."""
    table = summary.quality_table(results)
    place = [column.key for column in table.columns].index(key)
    return {line.name: line.cells[place].mark for line in table.lines if line.cells[place].mark}


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


@pytest.fixture
def full(folder):
    """Add rows of every kind."""
    folder.add("weak", 20.0)
    folder.add("strong", 30.126)
    folder.add("middle", 25.0)
    folder.add("lucky", 40.0, "untrained", checkpoint=None)
    folder.add("mean_colour", 15.0, "reference", checkpoint=None)
    folder.fail("broken", "Expected a checkpoint,\ngot none")
    return folder


def tex_rows(text):
    """List the cells of each line of the tabular, without its rules."""
    body = text.split(r"\toprule")[1].split(r"\bottomrule")[0]
    lines = [line.strip().removesuffix(r"\\").strip() for line in body.splitlines()]
    return [[cell.strip() for cell in re.split(r"(?<!\\)&", line)] for line in lines if line and line != r"\midrule"]


def test_rows_come_trained_by_falling_psnr_then_untrained_then_references_then_failed(full):
    order = ["strong", "middle", "weak", "lucky", "mean_colour", "broken"]
    assert list(full.markdown()[1]) == list(full.csv()) == order


def test_people_see_values_units_and_notes(full):
    head, lines = full.markdown()
    assert head[:4] == ["model", "parameters", "rate (%)", "PSNR (dB)"]
    assert lines["middle"] == {
        "model": "middle",
        "parameters": "1,234,567",
        "rate (%)": "0.1302",
        "PSNR (dB)": "25.00 ± 0.33",
        "SSIM": "**0.8100** ± 0.0100",
        "clips": "3",
        "note": "",
    }
    assert lines["lucky"]["note"] == "untrained weights: not ranked"
    assert lines["mean_colour"]["note"] == "reference: not ranked"
    assert lines["broken"]["note"] == "failed: Expected a checkpoint, got none"


def test_columns_that_no_row_has_are_left_out(folder):
    folder.add("a")
    assert not {"bits/pixel", "MS-SSIM", "rFVD (N)"} & set(folder.markdown()[0])
    folder.add("b", bits_per_pixel=0.0119176, rfvd=rfvd(12.34, True))
    head, lines = folder.markdown()
    assert {"bits/pixel", "rFVD (N)"} <= set(head)
    assert (lines["b"]["bits/pixel"], lines["b"]["rFVD (N)"]) == ("0.01192", "12.3 (3)")
    assert (lines["a"]["bits/pixel"], lines["a"]["rFVD (N)"]) == ("", "")


def test_markdown_is_aligned(full):
    lines = render.markdown(full.results()).split("\n\n")[0].splitlines()
    assert len({len(line) for line in lines}) == 1


def test_a_name_cannot_break_the_markdown_table(folder):
    folder.add("a|b <script>")
    line = render.markdown(folder.results()).splitlines()[2]
    assert line.startswith(r"| a\|b \<script> |")


def test_notes_name_protocol_missing_clips_weights_claims_and_rfvd(folder):
    folder.add("a", clips=CLIPS[:2], claimed={"rate": 0.001, "agrees": False}, rfvd=rfvd(3.0, False, 2))
    folder.add("b", windows={"num_frames": 2, "windows": 2}, failed_clips=[{"name": "x", "start_frame": 0}])
    text = render.markdown(folder.results())
    assert f"Protocol vidtwin ({folder.hash})." in text
    assert "Means over the 2 clips that all trained models have" in text
    assert "a lacks 1 clip that others have: c.avi." in text
    assert "LPIPS (vgg) is unavailable: no weights of VGG-16." in text
    assert "A rate of 0.1 % is claimed for a; its latents have 0.1302 %." in text
    assert "rFVD: not ranked below 401." in text
    assert folder.markdown()[1]["b"]["note"] == "in 2 windows of 2 frames; 1 clip failed"


def test_numbers_of_the_csv_are_those_of_the_json_to_the_last_digit(folder):
    cost = {
        "flops": {"encode": 123456789012345678, "decode": 3},
        "encode": {"clips_per_second": {"median": 1 / 3, "min": 0.1, "max": 0.7}, "peak_memory_bytes": 123},
        "decode": {"clips_per_second": {"median": 2 / 3, "min": 0.2, "max": 0.9}, "peak_memory_bytes": 456},
        "batch_size": 1,
        "warmup": 2,
        "repeats": 5,
        "memory_counter": "tensors",
        "device": "cpu",
    }
    downstream = {
        "tokens": 184,
        "parameters": 18914304,
        "parameters_ffn_norm_only": 12610560,
        "embedding_parameters": 7,
        "flops_forward": 11,
        "flops_training_step": 33,
        "seconds_per_step": {"median": 1 / 7, "min": 0.1, "max": 0.2},
        "peak_memory_bytes": 99,
        "memory_counter": "tensors",
        "device": "cpu",
    }
    latents = {
        "structure": {"shape": [2], "numbers": 2, "rate": 2 / 3e5, "bits": None},
        "dynamics": {"shape": [1], "numbers": 1, "rate": 1 / 3e5, "bits": 8.5},
    }
    sizes = {"compression_rate": 1 / 1e5 + 1e-17, "bits_per_pixel": 1 / 81, "latents": latents}
    claimed = {"rate": 1e-5, "agrees": True}
    row = folder.add(
        "m", 100 / 3, cost=cost, downstream=downstream, claimed=claimed, rfvd=rfvd(1e2 / 3, False), **sizes
    )
    line = folder.csv()["m"]
    compared = folder.results().comparison["rows"]["m"]
    expected = {
        "parameters": 1234567,
        "compression_rate": row["compression_rate"],
        "bits_per_pixel": 1 / 81,
        "claimed_rate": 1e-5,
        "num_common_clips": 3,
        "psnr_mean": compared["psnr"]["mean"],
        "psnr_std": compared["psnr"]["std"],
        "ssim_mean": compared["ssim"]["mean"],
        "rfvd": 1e2 / 3,
        "rfvd_num_clips": 3,
        "encode_flops": 123456789012345678,
        "decode_flops": 3,
        "encode_clips_per_second_median": 1 / 3,
        "decode_clips_per_second_max": 0.9,
        "decode_peak_memory_bytes": 456,
        "cost_repeats": 5,
        "dit_tokens": 184,
        "dit_parameters": 18914304,
        "dit_parameters_ffn_norm_only": 12610560,
        "dit_flops_training_step": 33,
        "dit_seconds_per_step_median": 1 / 7,
        "dit_peak_memory_bytes": 99,
        "latent.structure.rate": 2 / 3e5,
        "latent.dynamics.rate": 1 / 3e5,
        "latent.dynamics.bits": 8.5,
    }
    assert {key: type(value)(line[key]) for key, value in expected.items()} == expected
    assert (line["claimed_rate_agrees"], line["rfvd_ranked"], line["lpips_mean"]) == ("true", "false", "unavailable")
    assert (line["latent.structure.bits"], line["flicker_mean"], line["protocol_hash"]) == ("", "", folder.hash)


def test_the_csv_has_the_same_header_whatever_was_measured(full, tmp_path):
    other = Folder(tmp_path / "other")
    other.add("a", rfvd=rfvd(1.0, True), cost={"error": "out of memory"})
    assert list(other.csv()["a"]) == list(full.csv()["strong"])
    assert other.csv()["a"]["cost_error"] == "out of memory"


def test_means_are_over_the_clips_that_all_rows_have(folder):
    folder.add("a", 30.0)
    folder.add("b", 20.0, clips=CLIPS[:2])
    assert float(folder.csv()["a"]["psnr_mean"]) == pytest.approx(30.0 - 1 / 6, abs=1e-12)  # of a.avi and b.avi
    assert folder.csv()["a"]["num_clips"] == "3"
    assert folder.csv()["a"]["num_common_clips"] == "2"


def test_best_and_second_are_of_trained_rows_alone(full):
    assert marks(full.results(), "psnr") == {"strong": "best", "middle": "second"}
    lines = {cells[0]: cells for cells in tex_rows(render.latex(full.results()))}
    place = next(i for i, head in enumerate(lines["Model"]) if head.startswith("PSNR"))
    psnr = {name: cells[place] for name, cells in lines.items() if len(cells) > place}
    assert psnr["strong"] == r"\textbf{30.13} $\pm$ 0.33"
    assert psnr["middle"] == r"\underline{25.00} $\pm$ 0.33"
    others = [psnr[name].split()[0] for name in ("weak", "lucky (untrained)", r"mean\_colour")]
    assert others == ["20.00", "40.00", "15.00"]


def test_smaller_is_better_for_rfvd_and_an_unranked_one_is_not_marked(folder):
    folder.add("a", rfvd=rfvd(5.0, True))
    folder.add("b", rfvd=rfvd(9.0, True))
    folder.add("c", rfvd=rfvd(1.0, False))
    assert marks(folder.results(), "rfvd") == {"a": "best", "b": "second"}


def test_one_trained_row_is_not_called_the_best(folder):
    folder.add("a")
    folder.add("b", 50.0, "reference")
    assert marks(folder.results(), "psnr") == marks(folder.results(), "ssim") == {}
    assert "bold" not in render.latex(folder.results()) + render.markdown(folder.results())


def test_no_value_below_a_references_is_called_the_best(folder):
    folder.add("a", 30.0, ssim=0.9)
    folder.add("b", 26.0, ssim=0.7)
    folder.add("temporal_mean", 28.0, "reference", ssim=0.95)
    assert marks(folder.results(), "psnr") == {"a": "best"}
    assert marks(folder.results(), "ssim") == {}
    assert "A value that is worse than that of a reference, codecs left out, has no place." in render.markdown(
        folder.results()
    )


def test_a_reference_that_lacks_clips_is_compared_over_those_it_has(folder):
    folder.add("a", 30.0)  # 29.67 on the first clip
    folder.add("b", 29.5)
    folder.add("mean_colour", 29.9, "reference", clips=CLIPS[:1])  # 29.57 on it
    assert marks(folder.results(), "psnr") == {"a": "best"}


def test_differences_inside_the_noise_share_the_place(folder):
    folder.add("a", 30.0)
    folder.add("b", 29.95, spread=-1 / 3)  # better on one clip, worse on another
    folder.add("c", 29.0)
    assert marks(folder.results(), "psnr") == {"a": "best", "b": "best", "c": "second"}
    assert "95% interval of their difference holds 0 (paired bootstrap over source videos, 2,000 draws, seed 0" in (
        render.markdown(folder.results())
    )


def test_clips_of_one_video_rank_nothing(folder):
    for name, psnr in (("a", 31.0), ("b", 30.0)):
        folder.add(name, psnr, clips=("a.avi",) * 5)
    assert marks(folder.results(), "psnr") == {}


def test_an_unranked_row_takes_no_clip_from_the_ranked_ones_and_is_marked(folder):
    folder.add("a", 30.0)
    folder.add("b", 20.0)
    folder.add("mean_colour", 10.0, "reference", clips=CLIPS[:1])
    lines = folder.markdown()[1]
    assert {name: line["clips"] for name, line in lines.items()} == {"a": "3", "b": "3", "mean_colour": "1"}
    assert lines["a"]["PSNR (dB)"] == "**30.00** ± 0.33"
    assert lines["mean_colour"]["note"] == "reference: not ranked; means over 1 of the 3 clips"
    assert folder.csv()["mean_colour"]["num_common_clips"] == "1"


def test_below_half_of_the_test_clips_nothing_is_ranked(folder):
    folder.add("a", 30.0, clips=(*CLIPS, "d.avi"))
    folder.add("b", 20.0, clips=CLIPS[:2])
    assert marks(folder.results(), "psnr") == {"a": "best", "b": "second"}
    folder.add("c", 10.0, clips=CLIPS[:1])
    assert marks(folder.results(), "psnr") == {}
    assert (
        "Nothing is ranked: all trained models share 1 of the 4 clips of the test, below 50%; c has the fewest: remove "
        "rows/c to compare the others." in render.markdown(folder.results())
    )


def test_latex_is_whole(full):
    full.add("two", latents=dict.fromkeys(("structure", "dynamics"), LATENT))
    text = render.latex(full.results())
    lines = tex_rows(text)
    columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)[1]
    for cells in lines:
        spans = [int(n) for cell in cells for n in re.findall(r"\\multicolumn\{(\d+)\}", cell)]
        assert len(cells) + sum(spans) - len(spans) == len(columns)
    unescaped = re.sub(r"\\[{}&%$#_]", "", text)
    assert unescaped.count("{") == unescaped.count("}")
    assert unescaped.count("$") % 2 == 0
    begun, ended = (re.findall(rf"\\{word}\{{(\w+)\}}", text) for word in ("begin", "end"))
    assert begun == ended[::-1] == ["table", "tabular"]
    assert re.findall(r"\\(?:top|mid|bottom)rule", text) == [
        r"\toprule",
        *[r"\midrule"] * 4,
        r"\bottomrule",
    ]
    assert rf"\label{{tab:vidtwin-{full.hash}}}" in text
    assert "N = 3" in text
    assert "structure 0.1, dynamics 0.1" in text
    assert all(line.endswith(r"\\") for line in text.splitlines() if " & " in line and "caption" not in line)


def test_latex_escapes_what_a_name_may_hold(folder):
    folder.add(NAME.replace("\\", "!"))
    assert r"a\_b \& 50\% \#1 \{x\} \textasciitilde{}\textasciicircum{}!\$ & 1,234,567" in render.latex(
        folder.results()
    )
    assert render.escape(NAME).endswith(r"\textasciicircum{}\textbackslash{}\$")
    assert render.escape("[t]\n*") == "{[}t] {*}"


def test_published_numbers_stand_below_only_where_the_data_set_has_a_name(tmp_path):
    plain, named = Folder(tmp_path / "plain"), Folder(tmp_path / "named", "MCL-JCV")
    for each in (plain, named):
        each.add("VidTwin")
    assert "Published" not in render.markdown(plain.results()) + render.latex(plain.results())
    text = render.markdown(named.results())
    assert "Published numbers, of other protocols: not comparable:" in text
    assert re.search(
        r"\| VidTwin +\| VidTwin main table +\| +0.205 \| +28.14 \| 0.8044 \| 0.2414 \| +389.0 \| vgg +\|", text
    )
    assert re.search(r"- VidTwin main table: frames 16 for 4, .*; not stated: ", text)
    lines = tex_rows(render.latex(named.results()))
    place = lines.index([r"\multicolumn{6}{l}{\emph{Published, of other protocols}}"])
    assert lines[place + 1][0] == "VidTwin (VidTwin main table)"
    assert lines[place + 1][3] == "28.14"
    assert {len(cells) for cells in lines[place + 1 :]} == {6}


def test_published_lpips_of_another_network_is_not_put_into_the_latex_column(tmp_path):
    folder = Folder(tmp_path, "WebVid-10M")
    folder.add("CogVideoX", lpips=0.5)
    text = render.latex(folder.results())
    assert "35.76" in text
    assert "0.0277" not in text


def test_a_mean_over_videos_counts_videos_and_not_their_clips(tmp_path):
    folder = Folder(tmp_path, average="video")
    folder.add("a", clips=("a.avi", "b.avi", "a.avi"))
    assert "- Means over the 2 videos of the 3 clips that all trained models have, ±" in render.markdown(
        folder.results()
    )
    assert "means over the $N = 2$ videos of the 3 clips of 4 frames of 32" in render.latex(folder.results())


def test_the_deviation_of_one_clip_is_not_known(folder):
    folder.add("a", clips=CLIPS[:1])
    assert folder.markdown()[1]["a"]["PSNR (dB)"] == "29.67"
    assert folder.csv()["a"]["psnr_std"] == ""
    assert "deviation" not in render.markdown(folder.results()) + render.latex(folder.results())


@pytest.mark.parametrize("word", ["=1+1", "+sum", "-2+3", "@cmd", "\t=1"])
def test_a_spreadsheet_shows_words_and_runs_no_formula(folder, word):
    folder.add("a", checkpoint=word)
    assert folder.csv()["a"]["checkpoint"] == f"'{word}"


def test_a_metric_on_request_has_columns_only_if_a_row_was_measured_by_it(folder):
    folder.add("a")
    assert not [key for key in folder.csv()["a"] if key.startswith("st_lpips")]
    folder.add("b", st_lpips=0.25)
    assert (folder.csv()["b"]["st_lpips_mean"], folder.csv()["a"]["st_lpips_mean"]) == ("0.25", "")
    assert "ST-LPIPS (vgg)" in render.write(folder.path)
    assert not {"st_lpips_alex_mean", "vmaf_mean"} & folder.csv()["b"].keys()


@pytest.mark.parametrize("number", ["-5", "+1.5", "-.5e-3"])
def test_a_plain_number_stays_one(folder, number):
    folder.add("a", checkpoint=number)
    assert folder.csv()["a"]["checkpoint"] == number


def test_the_docs_list_the_metrics_of_the_registry():
    text = (Path(__file__).resolve().parents[2] / "docs" / "benchmark.md").read_text(encoding="utf-8")
    rows_of_docs = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    listed = {cells[0]: (cells[2], cells[3]) for cells in rows_of_docs if len(cells) == 4}
    for metric in SHOWN:
        name = "LPIPS (vgg), (alex)" if metric.key.startswith("lpips") else metric.label
        assert listed[name] == ("higher" if metric.higher else "lower", metric.needs)


def test_what_is_rounded_to_zero_has_no_sign():
    assert [format_number(value, "+.2f") for value in (-0.004, 0.004, -0.006)] == ["0.00", "0.00", "-0.01"]
    assert [format_number(value, ".3f") for value in (-0.0004, -1000.0)] == ["0.000", "-1000.000"]
    assert BY_KEY["ssim"].text(-1e-9) == "0.0000"


def test_files_hold_what_write_returns(full):
    text = render.write(full.path)
    written = (full.path / "table.md").read_text()
    assert written.startswith(text)
    assert "Paired differences of trained models" in written.removeprefix(text)
    assert (full.path / "table.csv").read_text() == render.as_csv(full.results())
    assert (full.path / "table.tex").read_text() == render.latex(full.results())


def test_a_folder_of_failures_alone_is_a_table_too(folder):
    folder.fail("a", "Expected weights & got none")
    assert "failed: Expected weights & got none" in render.write(folder.path)
    assert r"Expected weights \& got none" in (folder.path / "table.tex").read_text()


def test_a_folder_without_rows_says_what_writes_them(folder):
    with pytest.raises(UserError, match="`vidtwin test` writes them"):
        render.write(folder.path)
