"""The report of runs in every state: what it says, that it needs nothing else, and how a browser shows it."""

import itertools
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from selfmask_dist import cli
from selfmask_dist.cli.report import paper
from selfmask_dist.cli.report.charts import Series, dendrogram, line_chart
from selfmask_dist.cli.report.parts import in_order
from selfmask_dist.cli.report.reading import read_run
from selfmask_dist.cli.train import run
from selfmask_dist.common.text import NONE, compact, duration, percent, size
from selfmask_dist.config import load_config
from selfmask_dist.training.build import build_backbone
from tests.support import chromium
from tests.support.cascade_cases import settings, write_shards
from tests.support.tiny_run import write_config, write_tiny_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    """A finished run with labels, its baseline and monitor."""
    data = write_tiny_data(folder)
    more = {"eval": {"knn_every": 1, "frozen_baseline": True, "probe": True}, "optim": {"score_lr": 30.0}}
    config = write_config(folder / "plain.yaml", data, run={"dir": str(folder), "name": "plain"}, **more)
    # random weights depend on the seed; both seeds' masks are to be of one backbone
    weights = folder / "encoder.safetensors"
    save_file(build_backbone(load_config(config, [])).encoder.state_dict(), weights)
    run(load_config(config, [f"backbone.weights={weights}"]))
    return folder / "plain"


@pytest.fixture(scope="module")
def other_seed(plain: Path) -> Path:
    run(load_config(plain / "config.yaml", ["seed=1", "run.name=other"]))
    return plain.parent / "other"


@pytest.fixture(scope="module")
def cascade(folder: Path) -> Path:
    run(load_config(None, settings(write_shards(folder / "cascade-data"), folder, "run.name=cascade")))
    return folder / "cascade"


def report(*runs: Path, out: Path) -> str:
    """The page's text; every page is checked to stand alone."""
    assert cli.main(["report", *map(str, runs), "--out", str(out)]) == 0
    text = out.read_text()
    check_stands_alone(text)
    return text


def check_stands_alone(text: str) -> None:
    """No script, and no address but within the page."""
    assert "default-src 'none'" in text
    markup = re.sub(
        r"<(td|pre|title|p|li|th)\b[^>]*>[^<]*", "<", text
    )  # what is merely written may say anything
    assert "<script" not in text.lower()
    assert not re.search(r"https?:|//|@import|url\((?!#)", re.sub(r'src="data:[^"]*"', "", markup))
    for name, value in re.findall(r'\b(src|href|srcset|action|data|poster)="([^"]*)"', text):
        assert value.startswith(("data:image/png;base64,", "#")), (name, value[:80])


def broken_copy(run_folder: Path, path: Path, **files: str | None) -> Path:
    """A copy of a run with some files replaced, or taken away; `_` in a name stands for a dot."""
    shutil.copytree(run_folder, path)
    for name, text in files.items():
        file = path / name.replace("_", ".")
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
    return path


# ---- what it says


def test_a_run_is_told_whole(plain: Path, tmp_path: Path) -> None:
    text = report(plain, out=tmp_path / "report.html")
    result = json.loads((plain / "result.json").read_text())
    gain = result["adapted"]["knn5"] - result["frozen"]["knn5"]
    assert f"{result['frozen']['knn5']:.3f}" in text
    assert f"{gain:+.3f}".replace("-", "−") in text  # noqa: RUF001
    titles = re.findall(r"<figcaption>([^<]*)", text)
    assert {
        "Loss",
        "k-NN (5) on test images",
        "Weights pruned",
        "Learning rate, scores",
        "Images per second",
    } <= set(titles)
    assert "Peak memory of the process that needs most, MiB" in titles
    for heading in ("Runs", "Results", "Curves", "Sparsity", "Telemetry", "Sizes", "Settings"):
        assert f"<h2>{heading}</h2>" in text
    assert "The paper has no number for this backbone, objective and data." in text
    assert f"{result['mask']['bits_per_weight']:.3f}" in text
    assert "score_lr: 30.0" in text, "the resolved configuration"
    assert "What the masks say" not in text, "one mask has nothing to be compared with"


def test_the_default_place_is_the_run_and_belongs_to_it(plain: Path, tmp_path: Path) -> None:
    own = broken_copy(plain, tmp_path / "own")
    assert cli.main(["report", str(own)]) == 0
    assert (own / "report.html").exists()


def test_several_runs_stand_side_by_side(plain: Path, other_seed: Path, tmp_path: Path) -> None:
    text = report(plain, other_seed, out=tmp_path / "report.html")
    differ = text[text.index("Where they differ") :]
    keys = re.findall(r'<th scope="row">([^<]*)', differ[: differ.index("</table>")])
    assert keys == ["seed", "run.name"]
    assert "seeds of plain" in text
    assert text.count("<g><title>plain</title><path") == text.count("<g><title>other</title><path") >= 8
    assert "<title>plain, other - selfmask report</title>" in text


def test_a_cascade_has_its_stages_clusters_and_picture(cascade: Path, tmp_path: Path) -> None:
    text = report(cascade, out=tmp_path / "report.html")
    for view in ("frozen", "self-masked", "conditional", "unconditional", "frozen, whitened"):
        assert f'<th scope="row">{view}</th>' in text
    assert "cascade: expert-1" in text
    assert text.count("data:image/png;base64,") == 1
    sizes = json.loads((cascade / "router" / "sizes.json").read_text())
    for images in sizes:
        assert f'<td class="n">{images}</td>' in text
    assert "experts of cascade" in text
    assert "bits that are not the dispatcher&#39;s" in text
    assert "<dt>k-NN (5), unconditional</dt>" in text, "the headline says whose number it is"


def test_a_run_that_failed_at_once_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "c.yaml", {"train": str(tmp_path / "no<where>"), "test": "x"},
                          run={"dir": str(tmp_path), "name": "failed"})  # fmt: skip
    assert cli.main(["train", "--config", str(config)]) == 2
    capsys.readouterr()
    text = report(tmp_path / "failed", out=tmp_path / "report.html")
    assert "<b>failed failed. </b>" in text
    assert "no&lt;where&gt;" in text
    assert '<span class="badge failed">failed</span>' in text
    assert "<h2>Curves</h2>" not in text
    assert "<h2>Settings</h2>" in text


def test_a_running_run_shows_how_far_it_is(plain: Path, tmp_path: Path) -> None:
    lines = (plain / "metrics.jsonl").read_text().splitlines(keepends=True)
    status = {"state": "running", "step": 3, "num_steps": 8, "loss": 1.25, "time": time.time(), "restarts": 1}
    running = broken_copy(
        plain, tmp_path / "running", result_json=None, final_mask=None, frozen_json=None,
        metrics_jsonl="".join(lines[:3]) + lines[3][:40], status_json=json.dumps(status),
        events_jsonl=(plain / "events.jsonl").read_text().splitlines()[0] + "\n",
    )  # fmt: skip
    text = report(running, out=tmp_path / "report.html")
    assert '<span class="badge running">running</span>' in text
    assert "3 / 8" in text
    assert "Masks in training are shown as they were last logged," in text
    assert "<h2>Results</h2>" not in text
    assert "could be read" not in text, "a line being written is no damage"


def test_damaged_files_are_named_and_the_rest_is_shown(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (plain / "metrics.jsonl").read_text().splitlines()
    lines[1] = lines[1][:50]
    lines[3] = '{"step": "five", "loss": 1}'
    lines.insert(5, '{"step": 5, "loss": NaN, "accuracy": null, "lr/head": "much"}')
    mask = (plain / "final.mask").read_bytes()
    damaged = broken_copy(
        plain, tmp_path / "damaged", metrics_jsonl="\n".join(lines) + "\n", result_json="{",
        events_jsonl="\0\n[]\n",
    )  # fmt: skip
    (damaged / "final.mask").write_bytes(mask[:-1])
    (damaged / "config.yaml").write_bytes(b"seed: [\xff\n")
    text = report(damaged, out=tmp_path / "report.html")
    noted = capsys.readouterr().err
    for problem in (
        "metrics.jsonl: 2 lines are damaged and left out (2, 4)",
        "events.jsonl: 2 lines are damaged and left out (1, 2)",
        "result.json is damaged: left out",
        "final.mask is damaged or cut short",
        "config.yaml is damaged",
    ):
        assert problem in text
        assert problem in noted
    assert "<figcaption>Loss" in text


def test_a_run_without_evaluation(plain: Path, tmp_path: Path) -> None:
    result = json.loads((plain / "result.json").read_text())
    bare = {key: value for key, value in result.items() if key not in ("frozen", "adapted")}
    lines = [line for line in (plain / "metrics.jsonl").read_text().splitlines() if "monitor/" not in line]
    copy = broken_copy(
        plain, tmp_path / "bare", result_json=json.dumps(bare), frozen_json=None,
        metrics_jsonl="\n".join(lines) + "\n",
    )  # fmt: skip
    text = report(copy, out=tmp_path / "report.html")
    assert "<h2>Results</h2>" not in text
    assert "<h2>Sparsity</h2>" in text


def test_what_eval_left_is_shown(plain: Path, tmp_path: Path) -> None:
    rows = [
        {"name": "frozen", "values": {"knn5": 0.5, "10 %": 0.25}, "spread": {}},
        {"name": "self-masked", "values": {"knn5": 0.75, "10 %": None}, "spread": {"knn5": 0.012}},
    ]
    found = {
        "version": 1, "kind": "lowshot", "baseline": "frozen", "columns": ["knn5", "10 %"], "rows": rows,
        "settings": {"tries": 3}, "notes": ["one class <only>"], "plots": ["lowshot.png", "../../secret.png"],
    }  # fmt: skip
    copy = broken_copy(plain, tmp_path / "evaluated")
    (copy / "eval").mkdir()
    (copy / "eval" / "lowshot.json").write_text(json.dumps(found))
    (copy / "eval" / "knn.json").write_text("{}")
    pixel = b"\x89PNG\r\n\x1a\n" + b"\0" * 8
    for path in (copy / "eval" / "lowshot.png", tmp_path / "secret.png"):
        path.write_bytes(pixel)
    text = report(copy, out=tmp_path / "report.html")
    part = text[text.index("<h2>Evaluations</h2>") : text.index("<h2>Curves</h2>")]
    assert "<b>lowshot</b> of evaluated (tries 3)" in part
    assert '<td class="n">0.750<small class="up">+0.250</small><small>± 0.012</small></td>' in part
    assert "one class &lt;only&gt;" in part
    assert part.count("data:image/png") == 1, "no picture from outside of the run"


def test_evaluations_show_no_internals_and_no_share_as_zero(plain: Path, tmp_path: Path) -> None:
    copy = broken_copy(plain, tmp_path / "evaluated")
    (copy / "eval").mkdir()
    knn = {
        "kind": "knn",
        "columns": ["knn20", "knn1", "knn5"],
        "settings": {"k": [1, 5, 20]},
        "baseline": "frozen",
    }
    masks = {"kind": "masks", "columns": ["pruned"], "settings": {"lower_is_better": []}}
    free = {"kind": "labelfree", "columns": ["mean cosine"], "settings": {"k": 5, "not_accuracies": True}}
    for found, values in (
        (knn, {"knn20": 0.5, "knn1": 0.25, "knn5": 0.75}),
        (masks, {"pruned": 0.0004}),
        (free, {"mean cosine": 0.0004}),
    ):
        rows = [{"name": "masked", "values": values, "spread": {}}]
        (copy / "eval" / f"{found['kind']}.json").write_text(json.dumps({**found, "rows": rows}))
    text = report(copy, out=tmp_path / "report.html")
    part = text[text.index("<h2>Evaluations</h2>") : text.index("<h2>Curves</h2>")]
    assert "(k 1, 5, 20)" in part
    assert re.findall(r">(k-NN [^<]*)</th>", part) == ["k-NN (1)", "k-NN (5)", "k-NN (20)"]
    assert "<b>masks</b> of evaluated</caption>" in part
    assert "0.04 %" in part
    assert "4.00e-04" in part
    assert "accuracies" not in part


def test_names_are_text_and_never_markup(plain: Path, tmp_path: Path) -> None:
    name = "a<b>&\"'<script>x"
    copy = broken_copy(plain, tmp_path / name)
    status = {**json.loads((copy / "status.json").read_text()), "stage": "<i>", "state": "<u>"}
    (copy / "status.json").write_text(json.dumps(status))
    (copy / "result.json").unlink()
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    lines.append(json.dumps({"step": 99, "<em>metric": 1.0}))
    (copy / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    out = tmp_path / "report.html"
    report(copy, plain, out=out)
    page = chromium.Page()
    page.feed(out.read_text())
    assert name in page.text
    assert not {"em", "u", "script"} & set(page.elements)
    assert "<em>metric" in page.text


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path / "nothing")]) == 2
    assert "nothing is not a run: it has no config.yaml" in capsys.readouterr().err


# ---- beside the paper


def paper_run(path: Path, *, data: str, backbone: str, objective: str, result: dict[str, Any]) -> Path:
    path.mkdir(parents=True)
    config = f"method: mask\nbackbone: {{name: '{backbone}'}}\ndata: {{train: {data}, test: x}}\n"
    (path / "config.yaml").write_text(f"{config}objective: {{name: {objective}}}\n")
    (path / "result.json").write_text(json.dumps(result))
    return path


def test_the_papers_number_stands_beside_its_own_setting_only(tmp_path: Path) -> None:
    result = {"frozen": {"knn200": 0.5}, "adapted": {"knn20": 0.7, "knn200": 0.650, "probe": 0.770}}
    swav: dict[str, Any] = {"backbone": "timm:resnet50", "objective": "swav", "result": result}
    run_folder = paper_run(tmp_path / "a", data="shards/CIFAR-100/train", **swav)
    found = read_run(run_folder, "a")
    numbers = paper.expected(found.config, found.views)
    assert [(n.view, n.measure, n.value) for n in numbers] == [
        ("self-masked", "knn200", 0.656),
        ("self-masked", "probe", 0.769),
    ]
    text = report(run_folder, out=tmp_path / "report.html")
    assert "−0.006" in text  # noqa: RUF001
    assert "GCPR 2024" in text
    for name, changed in (
        ("data", {"data": "shards/cifar100x/train"}),
        ("backbone", {"backbone": "timm:resnet18"}),
        ("objective", {"objective": "supervised"}),
    ):
        other = {"data": "shards/cifar100/train", **swav, **changed}
        found = read_run(paper_run(tmp_path / name, **other), name)
        assert paper.expected(found.config, found.views) == [], name
    clip = {"frozen": {"knn20": 0.6, "knn200": 0.7}, "adapted": {"head": 0.8}}
    found = read_run(
        paper_run(tmp_path / "clip", data="x/cifar100/train", backbone="open_clip:ViT-B-32-quickgelu/openai",
                  objective="supervised", result=clip), "clip"
    )  # fmt: skip
    assert [(n.view, n.measure, n.value) for n in paper.expected(found.config, found.views)] == [
        ("frozen", "knn200", 0.694),
        ("masked", "head", 0.834),
    ]


# ---- the parts


def test_numbers_read_well() -> None:
    assert [size(n) for n in (0, 1023, 1024, 17_714, 5 * 2**30, None)] == [
        "0 B", "1,023 B", "1.0 KiB", "17.3 KiB", "5.0 GiB", NONE,
    ]  # fmt: skip
    assert [duration(s) for s in (0.0123, 9.96, 61, 3700, 90_000, None)] == [
        "12 ms", "10.0 s", "1 min 01 s", "1 h 01 min", "1 d 1 h", NONE,
    ]  # fmt: skip
    shares = [percent(x) for x in (0, 0.5, 0.0004, 1e-7, 0.00051)]
    assert shares == ["0.0 %", "50.0 %", "0.04 %", "1e-05 %", "0.1 %"]
    written = [compact(x) for x in (0, 0.1234567, 1234.5, 1e-7, float("nan"))]
    assert written == ["0", "0.1235", "1,234", "1.00e-07", NONE]


@pytest.mark.parametrize(
    "span", [(0, 1), (0.03, 0.031), (-5, 12000), (7, 7), (0, 0), (1e-9, 3e-9), (99.5, 100)]
)
def test_ticks_are_round_and_enclose(span: tuple[float, float]) -> None:
    chart = line_chart(
        [Series("a", [(0.0, span[0]), (9.0, span[1])])], title="x", format_fn=lambda y: f"y{y!r}"
    )
    found = [float(text) for text in re.findall(r">y([^<]+)</text>", chart.svg)]
    assert 2 <= len(found) <= 8
    assert found[0] <= span[0] and span[1] <= found[-1]  # noqa: PT018
    steps = {round((b - a) / (found[1] - found[0]), 6) for a, b in itertools.pairwise(found)}
    assert steps == {1.0}


def _heights(svg: str) -> list[float]:
    """Of the points of the one curve in a chart, from its top."""
    (path,) = re.findall(r"<title>a</title><path d=\"([^\"]*)\"", svg)
    return [float(y) for _, y in re.findall(r"([\d.]+) ([\d.]+)", path)]


def test_long_curves_are_thinned_and_keep_peaks() -> None:
    points = [(float(i), 0.0) for i in range(100_000)]
    points[43210] = (43210.0, 9.0)
    points[777] = (777.0, -3.0)
    svg = line_chart([Series("a", points)], title="x", format_fn=str).svg
    assert len(svg) < 20_000
    heights = _heights(svg)
    # the same scale: -5 to 10
    assert min(heights) == pytest.approx(8 + 138 / 15, abs=0.1)
    assert max(heights) == pytest.approx(8 + 138 * 13 / 15, abs=0.1)


def test_charts_are_the_same_bytes_each_time_and_take_the_pages_colours() -> None:
    series = [
        Series(f"run {i}", [(1.0, 0.1 * i), (2.0, 0.3)], i, baseline=0.2, marks=(1.5,)) for i in range(10)
    ]
    first, second = (line_chart(series, title="Loss", format_fn=str) for _ in range(2))
    assert first == second
    tree = dendrogram([(0, 1, 0.25, 2)], [1, 0], ["a $x$ <b>", "c"])
    assert "a $x$ &lt;b&gt;" in tree.svg
    assert "went on at step 2" in first.svg
    assert "run 9: frozen backbone" in first.svg
    for svg in (first.svg, tree.svg):
        assert not re.search(r"#[0-9a-f]{6}", svg), "a colour that does not follow the page"
        assert not re.search(r"xmlns|https?:|<!--|<metadata", svg)
        assert svg.startswith("<svg viewBox")
        assert svg.endswith("</svg>")
    # the baseline is dashed and the mark dotted, in one pattern each
    assert len(set(re.findall(r"stroke-dasharray: ([^;]+);[^>]*var\(--faint\)", first.svg))) == 1


def test_measures_stand_in_the_order_of_k() -> None:
    columns = ["probe", "knn20", "knn1", "knn200", "knn5", "knn20 balanced", "head"]
    assert in_order(columns) == ["knn1", "knn5", "knn20", "knn200", "knn20 balanced", "probe", "head"]


# ---- in a browser


def test_a_browser_shows_tables_curves_and_pictures(
    plain: Path, other_seed: Path, cascade: Path, tmp_path: Path
) -> None:
    """Chromium builds the page, and what it paints has the curves' colours and the embedded picture's."""
    out = tmp_path / "report.html"
    report(plain, other_seed, cascade, out=out)
    page = chromium.load(out)
    headings = [
        "Runs",
        "Results",
        "Curves",
        "Sparsity",
        "What the masks say",
        "Clusters",
        "Telemetry",
        "Sizes",
    ]
    assert page.headings == [*headings, "Settings"]
    assert "script" not in page.elements
    runs, results = page.tables[:2]
    assert [row[0] for row in runs[1:]] == ["plain", "other", "cascade"]
    assert len(results) == 1 + 2 + 2 + 6
    for rows in page.tables:
        assert len({len(row) for row in rows}) == 1, "a ragged table"
        assert len(rows) > 1, "an empty table"
    assert page.elements["svg"] >= 12
    (picture,) = page.pictures
    assert picture.startswith("data:image/png;base64,")

    pixels = chromium.screenshot(out, height=7000)
    for colour in ("#2563a8", "#c2571a", "#2e7d4f"):  # the curves of plain, other and the dispatcher
        assert chromium.count_near(pixels, colour) > 300, colour
    # viridis' bright end, which only the embedded picture of the cascade has
    assert chromium.count_near(pixels, "#fde725", 12) > 300
    assert (pixels[-1] == 255).all(), "the page is longer than its picture, or not white where it ends"
    dark = chromium.screenshot(out, height=1200, dark=True)
    assert chromium.count_near(dark, "#15191d", 2) > 0.7 * dark[..., 0].size
    assert chromium.count_near(dark, "#6aa8ea") > 100
