"""The page at a run's end: what is on it, what is left out, and that it is one harmless file."""

import html.parser
import json
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from dgemma.errors import DgemmaError
from dgemma.train.log.figures import POINTS, Axis, Curve, draw, smoothed, thinned
from dgemma.train.log.journal import Journal
from dgemma.train.log.report import write_comparison, write_report
from support.synthetic_run import synthetic_run

pytest.importorskip("matplotlib")

VOID = {"meta", "br"}


class Page(html.parser.HTMLParser):
    """A page's elements, links and text; an end without its beginning is an error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("href", "src", "xlink:href")]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def read(path):
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return synthetic_run(tmp_path_factory.mktemp("runs") / "sudoku", steps=1000, pace=300.0)


@pytest.fixture(scope="module")
def source(run):
    return write_report(run).read_text(encoding="utf-8")


def one_record(folder, kind="train", values=None, **extra):
    with Journal(folder, 0) as journal:
        journal.record(1, kind, {"loss": 1.5} if values is None else values, **extra)
    return folder


def test_a_page_is_one_file_that_needs_nothing(source):
    page = Page(source)
    assert len(source.encode()) < 1_000_000
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert "url(" not in re.sub(r"url\(#\w+\)", "", source) and "@import" not in source


def test_a_page_tells_the_whole_run(source):
    text = Page(source).text
    for words in ("sudoku-lora", "google/diffusiongemma-26B-A4B-it", "12,000", "41,300,000 (0.16 %)", "torch 2.13.0",
                  "21.3 GB, 1.03 × the 20.6 GB planned", "16.8 GB packed, Q4_K_M", "canvas is used", "rank: 16",
                  "steps per canvas", "tokens per forward pass", "exact by steps allowed",
                  "held-out loss by noise level", "loss by group of tokens, held-out examples", "learning rate",
                  "validation", "self-conditioned",
                  "dgemma run -m google/diffusiongemma-26B-A4B-it --adapter", "preflight passed in 3.1 s"):
        assert words in text, words


def test_the_main_figure_is_the_best_checkpoints_with_its_interval(tmp_path):
    with Journal(tmp_path, 0) as journal:
        for step, exact, best in ((0, 0.0, True), (10, 0.75, True), (20, 0.5, False)):
            values = {"task/near": 1.0, "task/steps_per_canvas": 40 - step, "task/exact": exact}
            journal.record(step, "task", values, main="task/exact", best=best,
                           intervals={"task/exact": [exact - 0.1 if exact else 0, exact + 0.1]})
    text = read(write_report(tmp_path)).text
    assert "exact 75.0 % 65.0–85.0 %; best, step 10; from 0.0 % at step 0" in text
    assert "best: 75.0 %" in text and "steps per canvas 30.0 from 40.0" in text


def test_a_measure_without_shares_is_no_percentage(tmp_path):
    one_record(tmp_path, "task", {"task/error": 0.5}, main="task/error", best=True)
    text = read(write_report(tmp_path)).text
    assert "error 0.5" in text and "%" not in text


def test_the_same_folder_gives_the_same_bytes(run, source):
    assert write_report(run).read_text(encoding="utf-8") == source


@pytest.mark.parametrize("kind", ["train", "validation", "task", "sweep", "samples", "note"])
def test_a_run_of_a_single_record_has_a_page(tmp_path, kind):
    values = {"max_steps": 4, "task/exact": 0.5} if kind == "sweep" else {"loss": 1.5}
    page = read(write_report(one_record(tmp_path / "lonely", kind, values)))
    assert page.text.startswith("lonely") and "What was run" in page.text
    assert ("svg" in page.tags) == (kind in ("train", "validation", "task", "sweep"))


def test_what_a_run_does_not_have_is_left_out(tmp_path):
    page = read(write_report(one_record(tmp_path)))
    for word in ("Preflight", "Samples", "How to use", "denoising", "recipe", "planned"):
        assert word not in page.text
    assert "None" not in page.text and "nan" not in page.text and page.tags.count("svg") == 1


def test_numbers_that_were_lost_leave_gaps(tmp_path):
    with Journal(tmp_path, 0) as journal:
        for step in range(6):
            journal.record(step, "train", {"loss": math.nan if step % 2 else 1.0, "learning_rate": math.nan})
            journal.record(step, "task", {"task/exact": math.nan}, main="task/exact", best=True,
                           intervals={"task/exact": [math.nan, 1.0]})
            journal.record(step, "validation", {"validation/loss": math.inf, "validation/t=0.5": math.nan})
    page = read(write_report(tmp_path))
    assert "exact –" in page.text and "nan" not in page.text and page.tags.count("svg") == 1


def test_answers_cannot_write_on_the_page(source):
    page = Page(source)
    assert "<script>alert('x')</script>" in page.text and "the request <failed>" in page.text
    assert "␛[31m</pre>␀?" in page.text and "model: sudoku # < & >" in page.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", source)


def test_wrong_samples_come_first_and_a_few_right_ones_after(source):
    verdicts = re.findall(r'<span class="(?:good|bad)">(right|wrong)</span>', source)
    assert verdicts == ["wrong"] * 9 + ["right"] * 3
    assert re.findall(r"<mark>(.*?)</mark>", source)[:3] == ["2", "2", "2"]


def test_the_worst_sample_is_the_first(tmp_path):
    one_record(tmp_path, "samples", {}, samples=[{"prompt": "", "reference": "", "answer": f"answer {score}",
                                                  "score": score} for score in (0.75, 0.25, None, 0.5)])
    assert re.findall(r"answer answer (\S+)", read(write_report(tmp_path)).text) == ["None", "0.25", "0.5", "0.75"]


def test_a_long_answer_is_cut(tmp_path):
    one_record(tmp_path, "samples", {}, samples=[{"prompt": "p", "reference": "r", "answer": "x" * 50_000, "score": 0}])
    assert "… (47,000 more characters)" in read(write_report(tmp_path)).text


def test_a_failed_check_and_an_unfinished_run_are_said_at_once(tmp_path):
    one_record(tmp_path)
    (tmp_path / "preflight.json").write_text(json.dumps([{"name": "no leaks", "passed": False, "measured": "0.5",
                                                          "meaning": "look at the cache"}]))
    (tmp_path / "run.json").write_text(json.dumps({"finished": False}))
    text = read(write_report(tmp_path)).text
    assert "Preflight failed: no leaks. This run is not finished: it stands at step 1." in text
    assert "look at the cache" in text


def test_a_whole_checkpoint_is_used_without_an_adapter(tmp_path):
    one_record(tmp_path / "a run")
    (tmp_path / "a run" / "last").mkdir()
    text = read(write_report(tmp_path / "a run")).text
    assert f"dgemma run -m '{tmp_path}/a run/last'" in text and "--adapter" not in text


def test_a_long_run_is_a_small_page(tmp_path):
    lines = ({"step": step, "kind": "train", "values": {"loss": 1 + math.sin(step)}} for step in range(20_000))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert write_report(tmp_path).stat().st_size < 100_000


@pytest.mark.parametrize(("name", "text"), [("run.json", "{"), ("plan.json", "[]"), ("preflight.json", "{}")])
def test_a_damaged_file_is_named(tmp_path, name, text):
    (one_record(tmp_path) / name).write_text(text)
    with pytest.raises(DgemmaError, match=rf"{name}: .*take the file away"):
        write_report(tmp_path)


def test_a_folder_without_records_is_named(tmp_path):
    with pytest.raises(DgemmaError, match=r"metrics.jsonl: cannot be read"):
        write_report(tmp_path)
    Journal(tmp_path, 0).close()
    with pytest.raises(DgemmaError, match="holds no records yet"):
        write_report(tmp_path)


def test_runs_stand_beside_each_other(tmp_path):
    runs = {name: synthetic_run(tmp_path / f"v {name}", steps=400, pace=pace, name=name)
            for name, pace in (("LoRA <16>", 300.0), ("full", 100.0))}
    one_record(tmp_path / "empty", "train")
    path = write_comparison(tmp_path, {**runs, "empty": tmp_path / "empty"}, title="Sudoku")
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert [link for link in page.links if not link.startswith("#")] == [
        "v%20LoRA%20%3C16%3E/report.html", "v%20full/report.html", "empty/report.html"]
    assert page.tags.count("svg") == 3
    assert all(source.count(f">{name}</text>") == 3 for name in ("full", "LoRA &lt;16&gt;"))
    rows = re.findall(r"<tr><th><a.*?</tr>", source)
    assert len(rows) == 3 and rows[2].count("–</td>") == rows[2].count("<td")
    assert "41.3M" in rows[0] and re.search(r"\d+\.\d % \(\d+\.\d–\d+\.\d\)", rows[1])


def test_runs_of_different_tasks_say_which(tmp_path):
    for name in ("exact", "f1"):
        one_record(tmp_path / name, "task", {f"task/{name}": 0.5}, main=f"task/{name}", best=True)
    text = read(write_comparison(tmp_path, {name: tmp_path / name for name in ("exact", "f1")}, title="Both")).text
    assert "0.5 exact" in text and "0.5 f1" in text


def test_nothing_to_compare_is_an_error(tmp_path):
    with pytest.raises(DgemmaError, match="no runs to compare"):
        write_comparison(tmp_path, {}, title="None")


def test_pictures_take_the_pages_colours_and_leave_the_page_alone(source):
    style = source[source.index("<style>") : source.index("</style>")]
    pictures = re.findall(r"<svg.*?</svg>", source, re.DOTALL)
    assert len(pictures) > 8 and source.count("<style") == 1
    for variable in {name for picture in pictures for name in re.findall(r"var\((--\w+)\)", picture)}:
        assert style.count(f"{variable}:") == 3, variable  # light, dark, print
    for picture in pictures:
        ElementTree.fromstring(picture)
        assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", picture)) <= {
            "none", "currentColor", "var(--grid)", *(f"var(--c{index})" for index in range(6))}
        used, made = set(re.findall(r"(?:url\(#|href=\"#)(\w+)", picture)), set(re.findall(r' id="(\w+)"', picture))
        assert used == made


def test_a_name_is_a_name_and_no_formula(tmp_path):
    text = draw("x", [Curve("a$_1$ & <b>", [1, 2], [1, 2])], Axis("step"), Axis("y"))
    assert "a$_1$ &amp; &lt;b&gt;" in text


def test_labels_do_not_lie_on_each_other():
    curves = [Curve(f"c{i}", [0, 1], [i, 1 + i / 1000]) for i in range(6)]
    found = ElementTree.fromstring(draw("x", curves, Axis("step"), Axis("y"))).iter("{http://www.w3.org/2000/svg}text")
    heights = sorted(float(text.get("y")) for text in found if re.fullmatch(r"c\d", text.text or ""))
    assert len(heights) == 6 and min(np.diff(heights)) > 11


def test_smoothing_weighs_the_last_fiftieth():
    values = list(np.random.default_rng(0).normal(size=500))
    weights = 0.9 ** np.arange(500)[::-1]  # 500 values: a tenth of each new one
    assert smoothed(values)[-1] == pytest.approx((weights * values).sum() / weights.sum())
    assert smoothed([2.0, math.nan, 2.0]) == [2.0, 2.0, 2.0] and math.isnan(smoothed([math.nan])[0])


def test_thinning_keeps_means():
    values = np.random.default_rng(0).normal(size=POINTS * 7)
    thin = thinned(Curve("", list(range(len(values))), list(values)))
    np.testing.assert_allclose(thin.y, values.reshape(POINTS, 7).mean(1))
    assert thin.x[0] == 3
