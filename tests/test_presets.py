"Presets: what they set, what a hand overrides, and that their numbers stand where they say."
import json
import re
from pathlib import Path

import pytest

from simclr_nb.cli import pretrain
from simclr_nb.plan.presets import PRESETS, preset_options
from simclr_nb.run.config import RunConfig, complete_config

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_sets_open_settings_alone(name):
    "A setting with another default could not be told from one that was given by hand."
    settings = PRESETS[name].settings
    assert all(getattr(RunConfig(), key) in (None, "auto") for key in settings)
    config = complete_config(RunConfig("photos", preset=name))
    assert all(getattr(config, key) == value for key, value in settings.items())
    parts = preset_options(name)
    assert {k: v for part in parts.values() for k, v in part.items()} == settings
    by_hand = complete_config(RunConfig("photos", preset=name, temperature=0.3, epochs=2, bs=8))
    assert (by_hand.temperature, by_hand.epochs, by_hand.bs) == (0.3, 2, 8)


def test_numbers_of_the_small_presets_stand_in_the_saved_tutorial():
    book = json.loads((ROOT / "nbs/tutorials/01_first_pretraining.ipynb").read_text("utf-8"))
    saved = "".join("".join(out.get("text", [])) for cell in book["cells"]
                    for out in cell.get("outputs", []))
    for name in ("digits", "cifar"):
        measured = PRESETS[name].measured
        numbers = re.findall(r"\d+\.\d%(?: \(\d+\.\d% to \d+\.\d%\))?", measured)
        assert len(numbers) == 2 and all(number in saved for number in numbers)


def test_the_command_prints_the_preset_and_what_differs(tmp_path, call):
    small = ["--width", 0.125, "--epochs", 1, "--n-train", 64, "--n-valid", 32, "--bs", 32]
    run = tmp_path / "run"
    code, out, _ = call(pretrain, "digits", "--preset", "digits", *small, "--out", run)
    assert code == 0
    lines = [line for line in out.split("\n") if line.startswith("preset ")]
    assert len(lines) == 1 and lines[0].startswith("preset digits, for small characters")
    assert lines[0].endswith("with it the number: width 0.125, epochs 1, bs 32")
    config = json.loads((run / "config.json").read_text())["config"]
    assert (config["preset"], config["temperature"], config["width"]) == ("digits", 0.5, 0.125)
    code, out, _ = call(pretrain, "digits", *small, "--out", run, "--resume", "--policy", "digits")
    assert code == 0 and "report: " in out  # the same settings without their name


def test_bad_names_are_refused(call):
    code, _, err = call(pretrain, "digits", "--preset", "cifra")
    assert code == 2 and "did you mean 'cifar'" in err
    code, _, err = call(pretrain, "digits", "--preset", "cifar", "--method", "moco")
    assert code == 2 and "presets are for simclr" in err
