"Names of classes, folders and files that mean something to matplotlib, HTML or a terminal."
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from simclr_nb.cli import evaluate, pretrain
from simclr_nb.core import show
from simclr_nb.evaluate.result import Result, accuracy_result
from simclr_nb.model.encoder import create_encoder, save_encoder
from simclr_nb.run.live import REFRESH
from simclr_nb.run import report
from simclr_nb.run.report import report_html
from simclr_nb.transfer.table import transfer_table

FLOWER = Image.fromarray(load_sample_images().images[1])
NO_UTF8 = os.fsdecode(b"caf\xe9")
NAMES = ["price_$5_to_$10", "_hidden", "a\x1b[31mb", "<b>bold</b>", NO_UTF8]
TINY = "--width 0.125 --epochs 1 --size 8 --bs 16 --workers 0".split()


def photos(folder: Path, names: list[str], n: int = 6) -> Path:
    for k, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            x, y = 40 * k + 9 * i, 30 * k + 5 * i
            FLOWER.crop((x, y, x + 40, y + 40)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    "A data folder with a strange name, of classes with strange names."
    folder = tmp_path_factory.mktemp("d") / f"data_$x_$y_{NO_UTF8}"
    photos(folder / "train", NAMES, 8)
    photos(folder / "test", NAMES, 3)
    return folder


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> tuple[Path, str]:
    "Folder of a run, and what it printed."
    out = tmp_path_factory.mktemp("r") / "run_$_$"
    printed = tmp_path_factory.mktemp("o") / "out.txt"
    with open(printed, "w", encoding="utf-8") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", file)  # strict, as a terminal's: what cannot be encoded fails
        assert pretrain([str(folder), *TINY, "--out", str(out)]) == 0
    return out, printed.read_text("utf-8")


def test_a_run_ends_with_results_and_all_figures(finished):
    "It trained, then died in matplotlib's parser, without results; resumed, it died again."
    out, printed = finished
    assert (out / "results.json").stat().st_size > 100
    page = (out / "report.html").read_text("utf-8")
    assert page.count("<figure><img") == 4 and "could not be" not in page
    assert "<b>bold" not in page and "\x1b" not in page + printed
    assert "caf\\udce9" in page  # readable, as its escape


def test_evaluation_of_a_strangely_named_encoder(folder, tmp_path, capsys):
    torch.manual_seed(0)
    encoder = create_encoder("resnet18", 0.125, "cifar", zero_init_last=False)
    path = save_encoder(encoder, tmp_path / "<i>$a$b\x1b.safetensors")
    options = ["--data", str(folder), "--size", "8", "--workers", "0", "--protocol", "knn"]
    assert evaluate([str(path), *options, "--out", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run/report.html").read_text("utf-8")
    assert page.count('src="data:image') == 1 and "<i>" not in page


def test_a_figure_that_fails_costs_a_line(tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs): raise RuntimeError("no font\nfor this")
    monkeypatch.setattr(report, "tsne", fail)
    photos(tmp_path / "data/train", ["a", "b"], 8)
    data = photos(tmp_path / "data/test", ["a", "b"], 5).parent
    assert pretrain([str(data), *TINY, "--out", str(tmp_path / "run")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "could not be drawn" in line]
    assert len(lines) == 1 and "RuntimeError: no font for this" in lines[0]
    page = (tmp_path / "run/report.html").read_text()
    assert page.count("<figure><img") == 3 and page.count("could not be drawn") == 1
    assert (tmp_path / "run/results.json").stat().st_size > 100


def test_results_are_written_before_figures(tmp_path, monkeypatch):
    "Whatever stops the figures, a kill too, leaves the results."
    def stop(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(report, "plot_spectra", stop)
    data = photos(tmp_path / "data", ["a", "b"], 10)
    options = [str(data), *TINY, "--out", str(tmp_path / "run")]
    assert pretrain(options) == 130
    assert (tmp_path / "run/results.json").stat().st_size > 100
    page = tmp_path / "run/report.html"
    assert REFRESH in page.read_text()  # still the page of a run that goes on
    monkeypatch.undo()
    assert pretrain([*options, "--resume"]) == 0
    assert REFRESH not in page.read_text()
    assert (tmp_path / "run/report.html").is_file()


def test_every_figure_takes_every_name():
    points = torch.randn(20, 2)
    y = torch.arange(20) % len(NAMES)
    images = torch.rand(len(NAMES), 3, 8, 8)
    bars = {n: {m: (0.5, 0.4, 0.6) for m in NAMES} for n in NAMES}
    pair = torch.rand(9), torch.rand(9)
    figures = [
        show.image_grid(images, titles=NAMES),
        show.histogram_grid([[i] for i in images], NAMES),
        show.plot_spectra(dict.fromkeys(NAMES, torch.ones(4))),
        show.plot_similarities(dict.fromkeys(NAMES, pair)),
        show.plot_embeddings(dict.fromkeys(NAMES, points), y, NAMES),
        show.plot_accuracies(bars),
        show.plot_history(dict.fromkeys(NAMES, [0.5]), {n: [n] for n in NAMES}),
    ]
    for figure in figures: assert show.figure_html(figure, NO_UTF8).isascii()
    assert len(figures[4].legends[0].get_texts()) == len(NAMES)  # none is hidden


def test_a_page_holds_every_name():
    result = accuracy_result(torch.arange(9) < 5, protocol="k-NN", encoder=NO_UTF8)
    results = {name: {name: result for name in NAMES} for name in NAMES}
    page = report_html(NAMES[0], {n: "" for n in NAMES}, results, {n: {n: n} for n in NAMES})
    page.encode()
    assert "\x1b" not in page and "<b>bold" not in page


@pytest.mark.parametrize("html", [True, False])
def test_a_transfer_table_holds_every_name(html):
    card = dict(protocol="transfer, linear", dataset="pets", data=dict(data="Pets"), metric="top-1")
    tables = transfer_table([Result(0.5, 0.4, 0.6, card | dict(encoder=n)) for n in NAMES[-1:]], html=html)
    tables.encode()
