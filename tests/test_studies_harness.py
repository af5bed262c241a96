"""The harness of the studies: shared cells, kills, exit codes, plans."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from torchvision.io import write_png

from simclr_nb.cli import study
from simclr_nb.studies.cells import cell_spec
from simclr_nb.studies.command import StudyConfig, run_command
from simclr_nb.studies.design import Cell, Study, greater
from simclr_nb.studies.harness import read_study, run_study
from simclr_nb.studies.scales import SCALES, Scale
from simclr_nb.studies.training import TimeUp, train_cell

CALL = "import sys; from simclr_nb.cli import study; sys.exit(study())"
CELLS = (Cell("mlp"), Cell("linear", dict(head="linear")), Cell("tau 1", dict(temperature=1.0)))
STUDY = Study("small", "Small", (), "?", CELLS, (greater("mlp", "linear"),))


def command(*args, **options) -> subprocess.Popen:
    "The command `simclr-study` in a process of its own."
    return subprocess.Popen([sys.executable, "-c", CALL, *map(str, args)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def journal(out: Path) -> Counter:
    "How often each thing was done: (cell, what) to count."
    lines = (out / "journal.csv").read_text().splitlines()
    return Counter((line.split(",")[2], line.rsplit(",", 3)[1]) for line in lines)


TIMES = {"seconds", "images_per_second", "peak_memory_mib"}


def timeless(path: Path) -> dict:
    "A result without how long it took."
    values = json.loads(path.read_text())
    values["card"] = {k: v for k, v in values["card"].items() if k not in TIMES}
    return values


def outcome(out: Path) -> dict:
    "Everything that a study has found: weights and tables byte by byte, results without times."
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        tables = "cells.json", "verdict.json", "spec.json"
        if path.suffix == ".safetensors" or path.name in tables:
            found[name] = path.read_bytes()
        elif path.parent.name == "measured": found[name] = timeless(path)
    return found


def test_hashes_stay():
    "Names of cells are names of folders that are committed: they must not move."
    known = {"smoke": "cf7b6b1e3ca7dabc", "mini": "a50d70f41f5dca8a", "gpu": "c9c1ac375ed59151"}
    assert {name: SCALES[name].spec({}).hash16 for name in known} == known
    assert SCALES["mini"].spec({}, seed=1).hash16 != known["mini"]


@pytest.mark.parametrize("change", [
    dict(temperature=0.3), dict(loss="nt_logistic"), dict(similarity="dot"), dict(head="linear"),
    dict(hidden_layers=2), dict(out_dim=64), dict(batch_norm=True), dict(policy="paper"),
    dict(second_policy="paper"), dict(strength=1.0), dict(flip=0), dict(extra="rotation"),
    dict(branch=("color",)), dict(branch=("color",), shared=("crop",)), dict(bs=64),
    dict(epochs=11), dict(scaling="linear"), dict(lr=0.1), dict(arch="resnet34"), dict(width=0.25),
    dict(stem="imagenet"), dict(optimizer="sgd"), dict(weight_decay=1e-4), dict(warmup_epochs=2.0),
    dict(zero_init_last=True), dict(size=24), dict(n_train=4000), dict(valid_part=0.2),
    dict(probe=True), dict(loss="margin_triplet", loss_options=dict(margin=0.4)),
    dict(loss="margin_triplet", loss_options=dict(margin=0.8)), dict(training="supervised"),
    dict(training="none")], ids=str)
def test_every_setting_changes_the_hash(change):
    mini = SCALES["mini"]
    assert mini.spec(change).hash16 != mini.spec({}).hash16
    assert mini.spec(change) == mini.spec(dict(reversed(change.items())))


def test_defaults_do_not():
    mini = SCALES["mini"]
    same = dict(loss="nt_xent", similarity="cosine", head="mlp", out_dim=128, warmup_epochs=1.0)
    assert mini.spec(same) == mini.spec({})


def test_data_and_version_change_the_hash():
    spec = SCALES["smoke"].spec({})
    other = cell_spec({}, SCALES["smoke"].base, "cifar10")
    assert spec.hash16 != other.hash16
    assert set(spec.values) == {"version", "training", "seed", "precision", "data", "settings"}



def test_a_width_and_a_stem_belong_to_our_resnets():
    mini = SCALES["mini"]
    for arch, ours in {"resnet18": 1, "cmc/resnet18": 1, "amdim/32-256-2": 0, "torchvision/resnet18": 0}.items():
        settings = mini.spec(dict(training="none", arch=arch)).settings
        assert ("stem" in settings, "width" in settings) == (ours, ours)


def test_a_study_of_the_paper(tmp_path):
    config = StudyConfig("figure-8", "smoke", str(tmp_path), cards=str(tmp_path / "kept"))
    answer = run_command(config)
    assert answer.exit_code == 0
    folder = tmp_path / "figure-8" / "smoke"
    assert {p.name for p in folder.iterdir()} >= {"cells.json", "verdict.json", "page.html"}
    assert max(journal(tmp_path).values()) == 1
    before = outcome(tmp_path)
    assert run_command(StudyConfig("figure-8", "smoke", str(tmp_path))).exit_code == 0
    assert outcome(tmp_path) == before and max(journal(tmp_path).values()) == 1


def test_two_calls_share_the_work(tmp_path):
    calls = [command("table-5", "--scale", "smoke", "--out", tmp_path) for _ in range(2)]
    outputs = [call.communicate(timeout=400)[0] for call in calls]
    assert [call.returncode for call in calls] == [0, 0], outputs
    counts = journal(tmp_path)
    assert set(counts.values()) == {1}
    workers = {line.split(",")[1] for line in (tmp_path / "journal.csv").read_text().splitlines()}
    assert len(workers) == 2


def test_workers_and_one_process_agree(tmp_path):
    run_study(STUDY, "smoke", tmp_path / "one")
    run_study(STUDY, "smoke", tmp_path / "two", jobs=2)
    assert outcome(tmp_path / "one") == outcome(tmp_path / "two")


@pytest.mark.parametrize("training", ["contrastive", "supervised"])
def test_stopped_and_resumed(tmp_path, training):
    "Stopped as often as a call has only half a second, the weights are those of one call."
    spec = SCALES["smoke"].spec(dict(training=training))
    train_cell(spec, tmp_path / "whole")
    for _ in range(50):
        try: train_cell(spec, tmp_path / "parts", time.monotonic() + 0.3)
        except TimeUp: continue
        break
    for name in ("encoder.safetensors", "head.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "parts" / "state").exists()


def test_diverged_counts_as_a_guess(tmp_path):
    cells = Cell("good"), Cell("bad", dict(lr=1e20, optimizer="sgd"))
    table = run_study(Study("x", "", (), "", cells), "smoke", tmp_path).table
    assert table.mean("bad") == table.mean("bad", "knn") == 10
    assert table.mean("good") > 10


def test_a_cell_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="hidden_layers"):
        run_study(Study("x", "", (), "", (Cell("bad", dict(hidden_layers=-1)),)), "smoke", tmp_path)


@pytest.mark.parametrize("args, code, text", [
    (["list", "--scale", "smoke"], 0, "distinct"),
    (["figure-8", "--scale", "smoke", "--seconds", "0"], 75, "call again"),
    (["figure-88"], 2, "did you mean"), (["figure-8", "--scale", "paper"], 2, "needs the data"),
    (["figure-8", "--jobs", "0", "--scale", "smoke"], 2, "jobs must be"),
    (["figure-8", "--scale", "smoke", "--data", "nowhere"], 2, "needs the data")], ids=str)
def test_exit_codes(tmp_path, capsys, args, code, text):
    try: given = study([*args, "--out", str(tmp_path)])
    except SystemExit as end: given = end.code
    output = "".join(capsys.readouterr())
    assert given == code, output
    assert text in output


def test_interrupted(tmp_path):
    call = command("table-5", "--scale", "smoke", "--out", tmp_path, "--jobs", 2,
                   start_new_session=True,  # a shell's background jobs inherit that SIGINT is ignored
                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    while not (tmp_path / "journal.csv").exists() and call.poll() is None: time.sleep(0.2)
    os.killpg(call.pid, signal.SIGINT)
    output = call.communicate(timeout=60)[0]
    assert call.returncode == 130, output
    assert "Traceback" not in output


@pytest.mark.parametrize("scale", ["gpu", "paper"])
def test_plans_without_running(tmp_path, scale):
    text = run_command(StudyConfig("table-5", scale, str(tmp_path), dry_run=True)).text
    assert "GB a device" in text and "h in all" in text
    assert not list(tmp_path.iterdir())


def pictures(root: Path, n: int = 24, side: int = 160) -> Path:
    "Noise of two colours: too large to be kept in memory."
    for part, count in (("train", n), ("valid", n // 2)):
        for label in range(2):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                noise = torch.randint(0, 120, (3, side, side), dtype=torch.uint8)
                noise[label] += 100
                write_png(noise, str(folder / f"{i}.png"))
    return root


def test_a_study_of_ones_own_images(tmp_path):
    data = pictures(tmp_path / "images")
    small = SCALES["smoke"].base
    base = {kind: values | dict(n_train=40) for kind, values in small.items()}
    base["contrastive"] = base["contrastive"] | dict(bs=16)
    base["supervised"] = base["supervised"] | dict(bs=16)
    cells = (Cell("ours"), Cell("no colour", dict(policy="supervised")),
             Cell("labels", dict(training="supervised"), ("accuracy",)))
    claims = (greater("ours", "no colour"),)
    own = Study("own", "Own images", (), "Does colour help?", cells, claims)
    run = run_study(own, Scale("own", str(data), base, seeds=2), tmp_path / "out")
    assert run.is_complete
    assert run.table.seeds() == [0, 1]
    assert read_study(own, run.scale, tmp_path / "out").table == run.table


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    "Killed twenty times at random moments, the results are those of an undisturbed run."
    args = "figure-8,table-5,text-flip-blur", "--scale", "smoke", "--jobs", 2, "--out"
    whole = command(*args, tmp_path / "whole")
    assert whole.wait(900) == 0
    rng = random.Random(0)
    kills = 0
    while kills < 20:
        call = command(*args, tmp_path / "killed", start_new_session=True)
        try: call.wait(rng.uniform(6, 14))
        except subprocess.TimeoutExpired:
            if kills % 2: os.killpg(call.pid, signal.SIGKILL)
            else: call.kill()  # its workers end by themselves
            kills += 1
            call.wait()
            continue
        break
    last = command(*args, tmp_path / "killed")
    output = last.communicate(timeout=900)[0]
    assert last.returncode == 0, output
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    trained = [n for (_, what), n in journal(tmp_path / "killed").items() if what == "trained"]
    assert max(trained) == 1
    assert not list((tmp_path / "killed" / "cache").glob("*/state"))
    print(f"{kills} kills, {len(trained)} cells")


@pytest.mark.slow
def test_all_items(tmp_path):
    start = time.monotonic()
    answer = run_command(StudyConfig("all", "smoke", str(tmp_path), jobs=2))
    assert answer.exit_code == 0
    seconds = time.monotonic() - start
    print(answer, f"{seconds:.0f} s", sep="\n")
    assert max(journal(tmp_path).values()) == 1
    pages = list(tmp_path.glob("*/smoke/page.html"))
    assert len(pages) >= 31
