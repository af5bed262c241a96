"The report of a run that trains: whole whenever it is read, true, and replaced by the final one."
import random
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from simclr_nb.data import simclr_dls
from simclr_nb.learner import simclr_learner
from simclr_nb.run.config import RunConfig
from simclr_nb.run.live import LiveReportCallback, is_live_page
from simclr_nb.run.pretrain import run_pretraining

ROOT = Path(__file__).resolve().parent.parent
EMPTY = {"meta", "img", "br", "polyline", "circle", "line"}


class Whole(HTMLParser):
    "Fails where an element is not closed, or closed in the wrong place; keeps text and addresses."
    def __init__(self, page: str):
        super().__init__()
        self.open, self.text, self.links, self.svgs = [], [], [], 0
        self.feed(page)
        self.close()
        assert self.open == [] and page.endswith("</html>\n")

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        self.svgs += tag == "svg"
        if tag not in EMPTY: self.open.append(tag)

    def handle_startendtag(self, tag, attrs): assert tag in EMPTY
    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data): self.text.append(data)


RUN = """
import sys
from simclr_nb.run import pretrain, live
page = pretrain.LiveReportCallback
pretrain.LiveReportCallback = lambda *args: page(*args, share=0.5, every=0)
small = dict(width=0.125, size=32, bs=5, workers=0)
config = pretrain.RunConfig(sys.argv[3], epochs=int(sys.argv[2]), out=sys.argv[1], **small)
pretrain.run_pretraining(config)
"""


def photos(folder: Path) -> Path:
    "Photographs in one folder: no labels."
    folder.mkdir()
    for i in range(24):
        photo = load_sample_images().images[i % 2]
        Image.fromarray(photo).resize((60 + i, 44)).save(folder / f"{i:02}.jpg")
    return folder


def started(folder: Path, epochs: int) -> subprocess.Popen:
    "A run in another process, with as many pages as it can write."
    pictures = photos(folder.with_name("photos"))
    command = [sys.executable, "-c", RUN, str(folder), str(epochs), str(pictures)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not path.is_file():
        assert process.poll() is None and time.monotonic() < end, "no page"
        time.sleep(0.02)


def test_the_page_is_whole_whenever_it_is_read(tmp_path):
    page = tmp_path / "run/report.html"
    process, seen = started(tmp_path / "run", 8), set()
    try:
        wait_for(page, process)
        while process.poll() is None:
            text = page.read_text("utf-8")
            if text not in seen: Whole(text)
            seen.add(text)
    finally: process.kill()
    assert process.wait(timeout=60) == 0
    live = [text for text in seen if 'http-equiv="refresh"' in text]
    assert len(live) >= 10
    final = Whole(page.read_text("utf-8"))
    assert not is_live_page(page) and "Settings" in final.text and final.svgs == 0


@pytest.mark.parametrize("is_labelled", [True, False], ids=["labelled", "unlabelled"])
def test_what_the_page_says(tmp_path, is_labelled):
    torch.manual_seed(0)
    if is_labelled: dls = simclr_dls("digits", bs=16, n_train=64, n_valid=32, seed=0, device="cpu")
    else: dls = simclr_dls(photos(tmp_path / "photos"), size=32, bs=4, num_workers=0, seed=0)
    learn = simclr_learner(dls, width=0.125)
    file = tmp_path / "report.html"
    page = LiveReportCallback(file, "SimCLR on <photos>", dict(data=dls.info), share=0.9, every=0)
    with learn.no_bar(), learn.no_logging(): learn.pretrain(3, cbs=page)
    text = file.read_text("utf-8")
    parsed = Whole(text)
    assert "SimCLR on <photos>" in parsed.text
    assert all(link.startswith("data:image/jpeg;base64,") for link in parsed.links)
    assert "://" not in text and "<script" not in text
    assert parsed.svgs == (3 if is_labelled else 2)
    assert text.count("stroke-dasharray") == parsed.svgs  # chance: loss, contrastive, accuracy
    total = 3 * len(dls.train)
    assert f"epoch 2 of 3; step {total} of {total};" in text and "evaluation follows" in text
    assert [t for t in parsed.text if t.startswith("epoch ") and t[6:].isdigit()] == [
        "epoch 0", "epoch 1", "epoch 2"]
    thumbnails = set(re.findall(r'class="t i(\d+)"', text))
    assert thumbnails == set(re.findall(r"\.i(\d+)\{background-image:url\(data:", text))
    rows = page.looks.looks[2]
    queries = page.looks.queries.tolist()
    assert all(query not in row for query, row in zip(queries, rows, strict=True))


def fitted(*cbs) -> list:
    torch.manual_seed(0)
    dls = simclr_dls("digits", bs=16, n_train=64, n_valid=32, seed=0, device="cpu")
    dls.classes = []  # so that the page computes h by itself
    learn = simclr_learner(dls, width=0.125)
    with learn.no_bar(), learn.no_logging(): learn.pretrain(3, cbs=list(cbs))
    return [p.detach() for p in learn.model.state_dict().values()] + [torch.rand(3)]


def test_the_page_changes_nothing(tmp_path):
    "Weights and the random state after the run are those of a run without it."
    page = LiveReportCallback(tmp_path / "report.html", share=0.9, every=0)
    for with_page, without in zip(fitted(page), fitted(), strict=True):
        assert torch.equal(with_page, without)
    assert len(page.looks.looks) == 3


def test_the_page_takes_less_than_its_share(tmp_path, monkeypatch):
    "On a clock of ours, which writing moves by 0.3 s and a step by 0.5 s."
    now = [0.0]
    monkeypatch.setattr("simclr_nb.run.live.time.monotonic", lambda: now[0])
    def slow(*args): now[0] += 0.3
    monkeypatch.setattr("simclr_nb.run.live.write_atomic", slow)
    page = LiveReportCallback(tmp_path / "report.html")
    from fastai.callback.core import Callback
    class Step(Callback):
        order = 1
        def before_batch(self): now[0] += 0.5 * self.training
    torch.manual_seed(0)
    dls = simclr_dls("digits", bs=8, n_train=160, n_valid=16, seed=0, device="cpu")
    learn = simclr_learner(dls, width=0.0625)
    with learn.no_bar(), learn.no_logging(): learn.pretrain(8, cbs=[page, Step()])
    pages = round(page.share.spent / 0.3)
    assert pages == 3  # at the start, after 60 s, and at the end
    assert 80 < now[0] < 82


def test_a_page_that_cannot_be_written_costs_one_line(tmp_path, capsys):
    dls = simclr_dls("digits", bs=16, n_train=64, n_valid=32, seed=0, device="cpu")
    learn = simclr_learner(dls, width=0.125)
    page = LiveReportCallback(tmp_path / "nowhere/report.html", share=0.9, every=0)
    with learn.no_bar(), learn.no_logging(): learn.pretrain(2, cbs=page)
    said = [line for line in capsys.readouterr().out.splitlines() if "live report" in line]
    assert len(said) == 1 and "FileNotFoundError" in said[0]
    assert len(learn.recorder.values) == 2


def test_a_run_killed_in_its_evaluation_is_not_taken_for_finished(tmp_path, monkeypatch):
    config = RunConfig(epochs=1, width=0.125, n_train=80, n_valid=32, bs=20, resume=True,
                       out=str(tmp_path / "run"))
    def killed(*args): raise KeyboardInterrupt
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("simclr_nb.run.pretrain._evaluate", killed)
        run_pretraining(config)
    assert is_live_page(tmp_path / "run/report.html")
    run = run_pretraining(config)
    assert run.results and not is_live_page(tmp_path / "run/report.html")


LOOK = """() => ({title: document.querySelector('h1')?.innerText, state: document.readyState,
  settings: [...document.querySelectorAll('h2')].some(h => h.innerText == 'Settings'),
  broken: [...document.images].filter(i => i.complete && !i.naturalWidth).length,
  height: document.body.scrollHeight, wide: document.documentElement.scrollWidth > innerWidth})"""


@pytest.mark.slow
def test_whole_in_a_browser_at_random_moments(tmp_path, browser):
    "Opened once, it loads itself again; looked at 50 times, and at the end it is the final report."
    from playwright.sync_api import Error
    file, rng = tmp_path / "run/report.html", random.Random(0)
    process = started(tmp_path / "run", 400)
    try:
        wait_for(file, process)
        page = browser.new_page()
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        looks, titles = 0, set()
        while looks < 50:
            time.sleep(rng.uniform(0.02, 1.0))
            try: seen = page.evaluate(LOOK)
            except Error: continue  # it is just loading itself again
            if seen["state"] != "complete": continue
            looks += 1
            assert seen["title"] == "SimCLR on photos" and seen["settings"], seen
            assert not seen["broken"] and seen["height"] > 300 and not seen["wide"], seen
            titles.add(page.locator("p").first.inner_text())
        assert len(titles) > 3  # it went on by itself
        assert process.wait(timeout=900) == 0
        page.wait_for_function("!document.querySelector('meta[http-equiv=refresh]')", timeout=60_000)
        assert page.locator("progress").count() == 0 and page.locator("img").count() >= 3
        assert {url.split(":")[0] for url in asked} <= {"file", "data"}
        page.close()
    finally: process.kill()
