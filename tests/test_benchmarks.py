"Benchmarks start, and what they state agrees with the card of their last run."
import ast
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPTS = sorted(set(BENCHMARKS.glob("*.py")) - {BENCHMARKS / "common.py"})
MEASURED = [path.stem for path in SCRIPTS]
README = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
PINS = dict(re.findall(r"^([\w-]+)==(\S+)$", (BENCHMARKS / "requirements.txt").read_text(), re.M))


def read(name: str) -> dict:
    return json.loads((BENCHMARKS / "results" / f"{name}.json").read_text(encoding="utf-8"))


def idle(card: dict) -> bool:
    hardware = card["hardware"]
    return card["steady"] and hardware["load_before"] < hardware["cores"] / 2


@pytest.fixture(scope="module")
def card() -> dict: return read("augment")


@pytest.fixture(scope="module")
def loss() -> dict: return read("loss")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_script(path):
    "Compiles, says how to use it without what it compares with, has its result beside it."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    command = [sys.executable, path, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "--output" in done.stdout, done.stderr
    assert read(path.stem)["settings"], "no result"
    assert f"python benchmarks/{path.name}" in README


def test_augment_card_is_complete(card):
    assert {"torch", "torchvision", "lightly", "simclr_nb", "python"} <= set(card["versions"])
    assert {"cpu", "cores", "load_before", "gpu"} <= set(card["hardware"])
    settings = {"data", "images", "repeats", "batch", "threads", "workers", "device", "seed"}
    assert settings <= set(card["settings"]) and card["lightly_settings"] and card["policy"]
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT[\d:]+\+00:00", card["date"])
    assert card["versions"]["lightly"] == PINS["lightly"]
    assert card["settings"]["data"] == "cifar10" and card["settings"]["workers"] == 2


def test_augment_card_agrees_with_itself(card):
    for name in ("ours", "lightly"):
        speeds = card[name]["runs"]
        assert len(speeds) == card["settings"]["repeats"] >= 3
        expected = [median(speeds), min(speeds), max(speeds)]
        assert [card[name][k] for k in ("median", "min", "max")] == expected
    ours, theirs, roof = card["ours"], card["lightly"], card["limit"]
    assert card["ratio"] == round(ours["median"] / theirs["median"], 2)
    assert card["ratio_worst"] == round(ours["min"] / theirs["max"], 2)
    if card["settings"]["device"] == "cpu":
        assert card["share_of_limit"] == round(ours["median"] / roof["images_per_s"], 4)
    for k in ("mean", "std"):  # of all pixels: the same work, but for rounding and chance
        assert ours["pixels"][k] == pytest.approx(theirs["pixels"][k], abs=0.02)


def test_augment_is_five_times_as_fast(card):
    assert idle(card), "a busy machine"
    assert card["ratio"] >= 5


LOSSES = {"ours", "dense", "in_place", "lightly", "pytorch_metric_learning"}


def test_loss_card_is_complete(loss):
    assert {"torch", "lightly", "pytorch-metric-learning", "simclr_nb", "python"} == set(
        loss["versions"])
    assert {k: loss["versions"][k] for k in PINS} == PINS
    settings = "images small large dim repeats threads temperature device seed".split()
    assert set(settings) == set(loss["settings"])
    expected = dict(images=4096, small=128, large=32_768, dim=128, device="cpu", temperature=0.5)
    assert expected.items() <= loss["settings"].items(), "not what acceptance asks for"
    assert set(loss["small_losses"]) == LOSSES
    assert set(loss["losses"]) == LOSSES - {"pytorch_metric_learning"}
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT[\d:]+\+00:00", loss["date"])
    assert loss["agreement"]["tolerance"]["float64"] <= 1e-10


def test_loss_card_agrees_with_itself(loss):
    ours, roof = loss["losses"]["ours"], loss["limit"]
    for spread in [*loss["losses"].values(), *loss["small_losses"].values()]:
        runs = spread["runs"]
        assert len(runs) == loss["settings"]["repeats"] >= 3
        assert [spread[k] for k in ("median", "min", "max")] == [median(runs), min(runs), max(runs)]
    for name, ratio in loss["ratios"].items():
        other = loss["losses"][name]
        assert ratio["time"] == round(other["median"] / ours["median"], 2)
        assert ratio["time_worst"] == round(other["min"] / ours["max"], 2)
        assert ratio["memory"] == round(other["peak_mib"] / ours["peak_mib"], 2)
    assert roof["flop"] == 4 * (2 * loss["settings"]["images"])**2 * loss["settings"]["dim"]
    assert loss["share_of_limit"] == round(roof["seconds"] / ours["median"], 3) <= 1


def test_tiled_loss_is_fast_and_small(loss):
    assert idle(loss), "a busy machine"
    lightly, in_place = loss["ratios"]["lightly"], loss["ratios"]["in_place"]
    assert lightly["time"] >= 6 and lightly["memory"] >= 12
    assert in_place["time"] >= 3
    assert loss["large"]["images"] == 32_768 and loss["large"]["peak_mib"] <= 1024


@pytest.mark.parametrize("name", MEASURED)
def test_readme_shows_the_card(name, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    table = runpy.run_path(str(BENCHMARKS / f"{name}.py"))["table"](read(name))
    assert f"<!-- {name} -->\n{table}<!-- /{name} -->" in README


def test_knn_is_as_fast_and_bounded():
    card = read("knn")
    assert idle(card), "a busy machine"
    assert card["versions"]["lightly"] == PINS["lightly"] and card["agreement"] >= 0.999
    for name in ("ours", "lightly"):
        runs = card[name]["runs"]
        assert len(runs) == card["settings"]["repeats"] >= 3 and median(runs) == card[name]["median"]
    assert card["ratio"] == round(card["lightly"]["median"] / card["ours"]["median"], 2)
    assert card["ratio"] >= 0.9 and card["ours"]["peak_mib"] < card["lightly"]["peak_mib"] / 2
    large, settings = card["large"], card["settings"]
    assert large["bank"] == 1_000_000 and large["peak_mib"] < 1024
    assert large["peak_mib"] < 0.2 * 4 * large["bank"] * settings["queries"] / 2**20  # of one matrix


@pytest.fixture(scope="module")
def logistic() -> dict: return read("logistic")


PEERS = {"float32", "float32_warm", "float64", "float64_warm"}


def test_logistic_card_is_complete(logistic):
    assert {"torch", "scikit-learn", "scipy", "numpy", "simclr_nb", "python"} == set(
        logistic["versions"])
    expected = dict(images=10_000, columns=512, classes=10, strengths=45, data="cifar10", tol=1e-4,
                    processes=logistic["hardware"]["cores"])
    assert expected.items() <= logistic["settings"].items(), "not what acceptance asks for"
    assert set(logistic["solvers"]) == {"ours", *PEERS}


def test_logistic_card_agrees_with_itself(logistic):
    solvers, tol = logistic["solvers"], logistic["settings"]["tol"]
    for spread in solvers.values():
        runs = spread["runs"]
        assert len(runs) == logistic["settings"]["repeats"] >= 3
        assert [spread[k] for k in ("median", "min", "max")] == [median(runs), min(runs), max(runs)]
    reached = {k for k in PEERS if solvers[k]["largest_gradient"] <= 1.05 * tol}
    assert set(logistic["matched"]) == reached != set()
    ours, best = solvers["ours"], solvers[logistic["best_peer"]]
    assert best["median"] == min(solvers[k]["median"] for k in reached)
    assert logistic["ratio"] == round(best["median"] / ours["median"], 2)
    assert logistic["ratio_worst"] == round(best["min"] / ours["max"], 2)
    fastest = min(solvers[k]["median"] for k in PEERS)
    assert logistic["ratio_fastest"] == round(fastest / ours["median"], 2)


def test_logistic_is_twice_as_fast_at_matched_convergence(logistic):
    assert idle(logistic), "a busy machine"
    solvers, tol = logistic["solvers"], logistic["settings"]["tol"]
    assert solvers["ours"]["largest_gradient"] <= 1.05 * tol
    assert all(solvers[k]["agreement"] >= 0.97 for k in logistic["matched"])  # least of 45
    assert logistic["ratio"] >= 2
