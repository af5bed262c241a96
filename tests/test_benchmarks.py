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
SCRIPTS = sorted(BENCHMARKS.glob("*.py"))
README = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
PINS = dict(re.findall(r"^([\w-]+)==(\S+)$", (BENCHMARKS / "requirements.txt").read_text(), re.M))


def read(name: str) -> dict:
    return json.loads((BENCHMARKS / "results" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def card() -> dict: return read("augment")


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
    hardware = card["hardware"]
    assert card["steady"] and hardware["load_before"] < hardware["cores"] / 2, "a busy machine"
    assert card["ratio"] >= 5


def test_readme_shows_the_card(card):
    table = runpy.run_path(str(BENCHMARKS / "augment.py"))["table"](card)
    assert f"<!-- augment -->\n{table}<!-- /augment -->" in README
