"Logs of a run, read back by the programs they are for: each number once, equal to `history.csv`."
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback

from simclr_nb.data import simclr_dls
from simclr_nb.learner import simclr_learner
from simclr_nb.run.config import RunConfig, complete_config
from simclr_nb.run.pretrain import run_pretraining
from simclr_nb.train.callbacks import HistoryCallback
from simclr_nb.train.checkpoint import CheckpointCallback
from simclr_nb.train.log import LogCallback, RunLog

EPOCHS, STEPS = 3, 5
COLUMNS = ("train_loss", "valid_loss", "contrastive_top1", "probe", "knn")


class Killed(Exception): pass


class Kill(Callback):
    "Fail after some steps, when all others have seen the step; or after an epoch."
    order = 99
    def __init__(self, step=None, epoch=None): self.step, self.at_epoch = step, epoch
    def after_batch(self):
        if self.training and self.train_iter == self.step: raise Killed("a step")
    def after_epoch(self):
        if self.epoch == self.at_epoch: raise Killed("an epoch")


def fit(folder: Path, names: str, kill: Kill | None = None, resume: bool = False):
    "A short run of digits with a log, which saves its state after three steps of each epoch."
    torch.manual_seed(0)
    dls = simclr_dls("digits", bs=32, n_train=32 * STEPS, n_valid=32, seed=0, device="cpu")
    learn = simclr_learner(dls, width=0.125)
    log = RunLog(names, folder / "log", dict(width=0.125))
    saving = CheckpointCallback(folder / "state", every_steps=3, resume=resume)
    cbs = [HistoryCallback(folder / "history.csv"), LogCallback(log, every=1), saving]
    try:
        with learn.no_bar(), learn.no_logging():
            learn.pretrain(EPOCHS, cbs=cbs + ([kill] if kill else []))
    except Killed: pass
    log.close()
    return learn


def history(folder: Path) -> dict[str, list[float]]:
    with open(folder / "history.csv", encoding="utf-8") as file: rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in COLUMNS}


def read_csv(folder: Path) -> dict[str, list]:
    found = {}
    with open(folder / "log/log.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["name"], []).append((int(row["step"]), float(row["value"])))
    return found


def read_tensorboard(folder: Path) -> dict[str, list]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder / "log/tensorboard"), {"scalars": 0, "images": 0}).Reload()
    assert [picture.step for picture in events.Images("views")][0] == 0
    tags = events.Tags()["scalars"]
    return {name: [(e.step, np.float32(e.value)) for e in events.Scalars(name)] for name in tags}


def wandb_records(path: Path):
    "Records of an offline run: parts in blocks of 32 KiB, each with checksum, length and kind."
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:  # the end of a block, filled with zeros
            at += room
            continue
        length = int.from_bytes(data[at + 4:at + 6], "little")
        kind = data[at + 6]  # 1: whole, 2: first, 3: middle, 4: last part
        record = (b"" if kind in (1, 2) else record) + data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4): yield record


def whole_wandb(path: Path) -> list:
    "Records of a run that was closed; the last are written a moment after `finish` has returned."
    from wandb.proto import wandb_internal_pb2
    deadline = time.monotonic() + 120
    while True:
        records = []
        for data in wandb_records(path):
            records.append(wandb_internal_pb2.Record())
            records[-1].ParseFromString(data)
        if records and records[-1].WhichOneof("record_type") == "exit": return records
        assert time.monotonic() < deadline, "the log has no end"
        time.sleep(0.1)


def read_wandb(folder: Path) -> dict[str, list]:
    "Numbers of the only offline run, from its log of records."
    (path,) = (folder / "log/wandb").glob("offline-run-*/run-*.wandb")
    found, pictures = {}, 0
    for record in whole_wandb(path):
        if record.WhichOneof("record_type") != "history": continue
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json)
                 for item in record.history.item}
        for name, value in items.items():
            if name.startswith("_"): continue
            if name.split("/")[0] == "views": pictures += 1  # its size, its file, ...
            else: found.setdefault(name, []).append((items["_step"], value))
    assert pictures
    return found


def read_mlflow(folder: Path) -> dict[str, list]:
    from mlflow.tracking import MlflowClient
    client = MlflowClient(f"sqlite:///{folder}/log/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'simclr_nb'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params == dict(width="0.125") and run.info.status == "FINISHED"
    assert any(a.path.startswith("views") for a in client.list_artifacts(run.info.run_id))
    return {name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics}


READERS = dict(csv=read_csv, tensorboard=read_tensorboard, wandb=read_wandb, mlflow=read_mlflow)


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    "The trackers write files, whatever the environment of the machine says."
    for name in ("WANDB_MODE", "MLFLOW_TRACKING_URI"): monkeypatch.delenv(name, raising=False)


def check(folder: Path, name: str) -> None:
    "Each step once, in order, and the rows of the table."
    found = READERS[name](folder)
    exact = np.float32 if name == "tensorboard" else float
    rows = [STEPS * (epoch + 1) for epoch in range(EPOCHS)]
    for column, values in history(folder).items():
        assert found[f"epoch/{column}"] == list(zip(rows, map(exact, values), strict=True)), column
    for entry in ("step/loss", "step/lr", "step/images_per_second"):
        assert [step for step, _ in found[entry]] == list(range(EPOCHS * STEPS)), entry
    for entry in ("epoch/lr", "epoch/images_per_second", "epoch/peak_memory_mib"):
        steps = [step for step, _ in found[entry]]
        if entry == "epoch/images_per_second":  # not where a process only had to validate
            assert steps == sorted(set(steps) & set(rows)) and len(steps) >= EPOCHS - 1
        else: assert steps == rows
        assert all(value > 0 for _, value in found[entry])


ALL = ",".join(READERS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run that was never stopped, in all logs."
    folder = tmp_path_factory.mktemp("whole")
    fit(folder, ALL)
    return folder


@pytest.mark.parametrize("name", READERS)
def test_a_log_read_back_is_the_history(whole, name): check(whole, name)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    "A run that was killed in an epoch, and again after one, two steps after a checkpoint."
    folder = tmp_path_factory.mktemp("resumed")
    fit(folder, ALL, Kill(step=2 * STEPS - 2))
    fit(folder, ALL, Kill(epoch=1), resume=True)
    fit(folder, ALL, resume=True)
    return folder


@pytest.mark.parametrize("name", READERS)
def test_a_resumed_run_goes_on_in_the_same_log(resumed, whole, name):
    check(resumed, name)
    kept = {k: [(s, v) for s, v in rows] for k, rows in READERS[name](resumed).items()
            if k in ("step/loss", "step/lr", "epoch/knn")}
    assert kept == {k: READERS[name](whole)[k] for k in kept} and len(kept) == 3


def test_a_log_changes_nothing(whole, tmp_path):
    "The history of a run without a log is the same, to the last digit."
    fit(tmp_path, "")
    assert history(tmp_path) == history(whole) and not (tmp_path / "log").exists()


def test_a_tracker_that_fails_costs_one_line(tmp_path, capsys, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter
    def full(self, name, value, step):
        if step > 7: raise OSError("no space left on device")
        return add(self, name, value, step)
    add = SummaryWriter.add_scalar
    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    fit(tmp_path, "tensorboard,csv")
    check(tmp_path, "csv")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("log:")]
    assert lines == ["log: tensorboard failed and is left out from now on "
                     "(OSError: no space left on device)"]


def test_a_run_logs_its_results(tmp_path, capsys):
    "The command's way: settings, history and result cards, under the names of `results.json`."
    run = run_pretraining(RunConfig(epochs=2, width=0.125, n_train=256, n_valid=64, bs=64,
                                    log="csv,tensorboard", out=str(tmp_path / "run")))
    found = read_csv(run.folder)
    measured = {f"result/{protocol}/{name}": result.value
                for protocol, column in run.results.items() for name, result in column.items()}
    assert {k: v for k, v in found.items() if k.startswith("result/")} == {
        k: [(8, v)] for k, v in measured.items()}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(run.folder / "log/tensorboard")).Reload()
    texts = events.Tags()["tensors"]
    assert {f"card/k-NN/{n}/text_summary" for n in ("pixels", "random", "pretrained")} < set(texts)
    (card,) = events.Tensors("card/k-NN/pretrained/text_summary")
    assert b"peak_memory_mib" in card.tensor_proto.string_val[0]


def test_unknown_and_missing_trackers_are_refused_at_once(monkeypatch):
    with pytest.raises(ValueError, match="unknown tracker 'tensorbord'.*tensorboard"):
        complete_config(RunConfig(log="csv,tensorbord"))
    monkeypatch.setattr("simclr_nb.train.trackers.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs wandb: pip install 'simclr_nb\[log\]'"):
        complete_config(RunConfig(log="wandb"))


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from log_cases import fit
from fastai.callback.core import Callback
import os
import signal
class Kill(Callback):
    order = 99
    def after_batch(self):
        if self.training and self.train_iter == 9: os.kill(os.getpid(), signal.SIGKILL)
fit(Path(sys.argv[1]), "csv,tensorboard,wandb", Kill())
"""


def test_a_process_killed_for_good_leaves_logs_that_go_on(tmp_path):
    "SIGKILL: nothing is flushed or closed at the end."
    env = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # ours
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path), str(Path(__file__).parent)],
                          timeout=300, capture_output=True, text=True, env=env | dict(
                              PYTHONPATH=str(Path(__file__).resolve().parent.parent)))
    assert done.returncode == -signal.SIGKILL, done.stderr
    fit(tmp_path, "csv,tensorboard,wandb", resume=True)
    for name in ("csv", "tensorboard", "wandb"): check(tmp_path, name)


def test_a_wandb_run_left_open_by_an_error_goes_on(tmp_path):
    "In one process, as in a notebook."
    from simclr_nb.train.trackers import WandbTracker
    (tmp_path / "log").mkdir()
    for begin in (0, 2):
        tracker = WandbTracker(tmp_path / "log", {}, begin)
        for step in range(begin, 4): tracker.scalars({"step/loss": float(step + begin)}, step)
    tracker.image("views", np.zeros((4, 4, 3), np.uint8), 4)
    tracker.close()
    assert read_wandb(tmp_path)["step/loss"] == [(0, 0), (1, 1), (2, 4), (3, 5)]


def test_numbers_that_are_none_or_nan_are_left_out(tmp_path):
    log = RunLog("csv", tmp_path)
    log.open(0)
    log.scalars(dict(a=1.0, b=math.nan, c=None), 0)
    assert (tmp_path / "log.csv").read_text().splitlines() == ["step,name,value", "0,a,1.0"]
