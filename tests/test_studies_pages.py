"Pages of studies: whole, offline, safe for any name; every study of the paper can be drawn."
import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from simclr_nb.evaluate.result import accuracy_result
from simclr_nb.studies.design import Cell, Claim, Contrast, Study, Table, exact, greater
from simclr_nb.studies.figures import bars, lines, matrix, scatter
from simclr_nb.studies.harness import read_study
from simclr_nb.studies.pages import (
    joint_verdict, overview_html, overview_markdown, overview_rows, pair_test, study_html,
    study_seconds, verdict_words, write_study)
from simclr_nb.studies.paper import STUDIES, TEXT_STUDIES
from simclr_nb.studies.published import paper_table
from simclr_nb.studies.scales import SCALES
from simclr_nb.studies.tasks import Places, find_tasks
from simclr_nb.studies.verdict import judge

HOSTILE = "<script>x</script>\"'&|`]$^$\n\x1b{0}"
VOID = {"meta", "img", "br"}


class Checker(HTMLParser):
    "Collects elements and attributes, and refuses tags that do not match."

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID: self.open.append(tag)

    def handle_endtag(self, tag): assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]: self.text.append(data)


def parsed(page):
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert not checker.open
    return checker


def assert_offline(checker):
    "Nothing but images in the page itself; no script."
    for tag, attrs in checker.seen:
        assert tag not in ("script", "link", "iframe", "object"), tag
        for name in ("src", "href", "style", "onerror", "onclick"):
            assert name not in attrs or attrs[name].startswith("data:image/"), (tag, attrs)


def cards(study, results, means, seconds=100.0):
    "Made-up cards where committed cards lie."
    generator = torch.Generator().manual_seed(0)
    difficulty = torch.rand(500, generator=generator)
    for task in find_tasks(study, SCALES["mini"], Places(results)):
        folder = results / "mini" / task.spec.hash16
        folder.mkdir(parents=True)
        for name in task.measures:
            noise = 0.1 * torch.randn(500, generator=generator)
            right = difficulty + noise < means[task.cell] / 100
            result = accuracy_result(right, torch.arange(500) % 10, protocol=name, note=HOSTILE)
            result.save(folder / f"{name}.json")
        (folder / "done.json").write_text(json.dumps(dict(seconds=seconds)))


def study(names=("a", "b", "c"), plot=None, **fields):
    cells = tuple(Cell(name, dict(temperature=0.1 * (i + 1))) for i, name in enumerate(names))
    claims = (greater(names[1], names[0], f"claim {names[0]}", paper=names[2]),
              Claim(names[2], (Contrast({names[0]: 0.5, names[1]: 0.5, names[2]: -1.0}),)),
              exact(names[0], lambda: (True, names[1])))
    plot = plot or bars({name: {name: name} for name in names})
    return Study("made-up", names[0], (names[1],), names[2], cells, claims, "Table 1", plot, **fields)


@pytest.fixture
def run(tmp_path):
    made_up = study()
    cards(made_up, tmp_path / "results", dict(a=30, b=60, c=30))
    return read_study(made_up, "mini", tmp_path / "studies", tmp_path / "results")


def test_a_page_tells_all(run):
    page = study_html(run)
    checker = parsed(page)
    assert_offline(checker)
    text = "".join(checker.text)
    for piece in ("confirmed: claim a", "b - a: +", "after Holm", "59.6", "Supervised", "3 seeds",
                  "simclr-study made-up --scale mini", "Test images exchanged"):
        assert piece in text, piece
    assert sum(tag == "img" for tag, _ in checker.seen) == 2
    assert study_seconds(run) == (900.0, 0) and "15 min of training" in text


def test_any_name_is_text(tmp_path):
    "In cells, claims, titles, notes, cards; on the page, in the overview, in Markdown."
    names = tuple(f"{HOSTILE.replace('/', '')}{i}" for i in range(3))
    hostile = study(names, differs=(HOSTILE,), text=HOSTILE)
    cards(hostile, tmp_path / "results", dict(zip(names, (30, 60, 30), strict=True)))
    made = read_study(hostile, "mini", tmp_path / "studies", tmp_path / "results")
    page = parsed(study_html(made))
    assert_offline(page)
    assert sum("<script>" in text for text in page.text) > 10
    assert "could not be drawn" not in "".join(page.text)
    parsed(overview_html([made], {"made-up": "x.html"}))
    header, rule, row = overview_markdown([made]).split("\n")
    assert row.replace("\\|", "").count("|") == header.count("|") == 5 and "<script" not in row.replace("\\<", "")


def test_files_are_the_same_each_time(run):
    before = {p.name: p.read_bytes() for p in write_study(run).parent.iterdir()}
    after = {p.name: p.read_bytes() for p in write_study(run).parent.iterdir()}
    assert set(before) == {"cells.json", "figure.png", "page.html", "verdict.json"}
    assert before == after
    def refuse(name): raise ValueError(f"{name} is no JSON")
    record = json.loads(before["verdict.json"], parse_constant=refuse)
    assert record["complete"] and record["claims"][0]["state"] == "confirmed"
    assert record["claims"][2]["p"] is None


def test_a_figure_that_fails_costs_a_line(run, capsys):
    def fail(table): raise RuntimeError("no such font")
    broken = replace(run, study=study(plot=fail))
    page = write_study(broken)
    assert "no such font" in page.read_text() and "no figure" in capsys.readouterr().out
    assert not (page.parent / "figure.png").exists()


def test_a_killed_write_leaves_the_old_page(run, monkeypatch):
    page = write_study(run)
    old = page.read_bytes()
    def die(*args): raise KeyboardInterrupt
    monkeypatch.setattr("os.replace", die)
    with pytest.raises(KeyboardInterrupt): write_study(replace(run, study=study(text="new")))
    assert page.read_bytes() == old
    assert not [p for p in page.parent.iterdir() if p.suffix == ".tmp"]


def test_what_is_missing_is_said(tmp_path):
    waiting = read_study(study(), "mini", tmp_path / "studies")
    text = "".join(parsed(study_html(waiting)).text)
    assert text.count("to come") == 6 and "some runs are missing" in text
    assert "not run yet (9 runs)" in text
    (row,) = overview_rows([waiting])
    assert row[2] == "confirmed, the rest not run yet"  # the exact claim
    record = json.loads((write_study(waiting).parent / "verdict.json").read_text())
    assert record["claims"][0]["contrasts"][0]["low"] is None and not record["complete"]


def test_the_papers_test_stands_beside(run):
    "Small for cells that answer differently; none for a mean of two cells."
    first, second = (claim.contrasts[0] for claim in run.study.claims[:2])
    assert pair_test(run, first) < 1e-4 and pair_test(run, second) is None
    assert pair_test(run, Contrast({"a": 1, "c": -1})) > 0.01
    assert pair_test(run, Contrast({"a/logistic": 1, "a/knn": -1})) is not None


def test_open_claims_say_what_it_takes(run):
    noisy = Table({(c, s, "logistic"): 40 + 3.0 * ((s + i) % 3) for i, c in enumerate("abc")
                   for s in range(3)})
    verdict = judge(run.study, noisy)[0]
    assert verdict.state == "not resolved"
    assert any("probability of 80%" in words for words in verdict_words(verdict, 2))
    assert joint_verdict([verdict]) == "not resolved"


# The studies of the paper

def drawn(made_up, scale, tmp_path, empty=False):
    "A study with random scores of the right keys, or with none."
    run = read_study(made_up, scale, tmp_path)
    generator = np.random.default_rng(0)
    scores = {key: 30 + 10 * generator.random() for key in run.table.expected}
    table = Table({} if empty else scores, run.table.expected)
    return replace(run, table=table)


@pytest.mark.parametrize("name", [*STUDIES, *TEXT_STUDIES])
def test_every_study_has_a_page(name, tmp_path):
    "At the scale `mini`, with all scores and with none: claims judged, figure drawn, table found."
    made_up = (STUDIES | TEXT_STUDIES)[name]
    run = drawn(made_up, "mini", tmp_path)
    verdicts = judge(made_up, run.table)
    assert len(verdicts) == len(made_up.claims) > 0
    assert "could not be drawn" not in "".join(parsed(study_html(run, verdicts)).text)
    if made_up.paper: assert paper_table(made_up.paper)
    if not made_up.cells: return
    nothing = drawn(made_up, "mini", tmp_path, empty=True).table
    for verdict in judge(made_up, nothing):
        assert verdict.state.startswith("not ") or verdict.claim.kind == "exact"
    assert made_up.plot is None or isinstance(made_up.plot(nothing), Figure)


def test_the_overview_has_all_items(tmp_path):
    runs = [drawn(made_up, "smoke", tmp_path) for made_up in STUDIES.values()]
    assert len(runs) == 31
    items = [item for run in runs for item in run.study.items]
    tables = [f"Table {n}" for n in [*range(1, 9), *(f"B.{i}" for i in range(1, 6)), "C.1"]]
    figures = [f"Figure {n}" for n in [*range(1, 10), *(f"B.{i}" for i in range(1, 9))]]
    assert set(tables + figures) <= set(items)
    lines_ = overview_markdown(runs).splitlines()
    assert len(lines_) == 33 and all(line.replace("\\|", "").count("|") == 5 for line in lines_)


@pytest.mark.parametrize("draw", [
    bars({"g": {"a": "a", "b": "b/knn"}}, chance={"g": 10.0}, paper={"g": {"a": 60.0}}),
    lines({"s": {0.1: "a", 1.0: "b/knn"}}, "x", paper={"s": {0.1: 50.0}}),
    matrix(["a", "b"], ["a", "b"], {("a", "b"): "a", ("b", "b"): "b/knn"}),
    scatter({"s": {"x": (1.0, "a"), "y": ("a", "b/knn"), "z": (3.0, 4.0)}}, "x", logx=True)],
    ids=["bars", "lines", "matrix", "scatter"])
def test_figures_take_any_table(draw):
    "Three seeds, one seed, some cells, none, scores that are all alike."
    whole = {(c, s, m): 40.0 + s + i for i, (c, m) in enumerate([("a", "logistic"), ("b", "knn")])
             for s in range(3)}
    one = {k: v for k, v in whole.items() if k[1] == 0}
    for scores in (whole, one, {k: v for k, v in whole.items() if k[0] == "a"}, {},
                   dict.fromkeys(whole, 10.0)):
        fig = draw(Table(scores))
        assert isinstance(fig, Figure)
        fig.canvas.draw()
