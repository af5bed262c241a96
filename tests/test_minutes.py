"Runs that end when the time is up: under load, killed and resumed, over processes, from the command."
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback

from simclr_nb.core.processes import launch
from simclr_nb.data import simclr_dls
from simclr_nb.learner import simclr_learner
from simclr_nb.run.config import RunConfig, complete_config
from simclr_nb.run.pretrain import run_pretraining
from simclr_nb.train.checkpoint import CheckpointCallback, find_checkpoints
from simclr_nb.train.minutes import MinutesCallback, StepClock, TimeBudget, TimePlan
from simclr_nb.train.optim import warmup_cosine

ROOT = Path(__file__).resolve().parent.parent


def digits_learner(n_train=80):
    torch.manual_seed(0)
    dls = simclr_dls("digits", bs=16, n_train=n_train, n_valid=16, seed=0, device="cpu")
    return simclr_learner(dls, width=0.125)


class Clock:
    "A clock that goes on by as much as each event of the training is said to take."
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr("simclr_nb.train.minutes.time.monotonic", lambda: self.now)


class Takes(Callback):
    "Training steps and ends of epochs of a given length, on a clock of ours."
    order = 1
    def __init__(self, clock, step, end): self.clock, self.step, self.end = clock, step, end
    def before_batch(self):
        if self.training: self.clock.now += self.step(self.clock.now - 1000)
    def before_validate(self): self.clock.now += self.end


class Stop(Exception): pass


class StopAt(Callback):
    order = 99
    def __init__(self, step): self.step = step
    def after_batch(self):
        if self.training and self.train_iter == self.step: raise Stop("killed")


def fit(learn, minutes, *cbs):
    "Pretrain for a time; the seconds that it took, on the clock that the plan sees."
    with learn.no_bar(), learn.no_logging(): learn.pretrain(minutes=minutes, cbs=list(cbs))


PACES = ["steady", "slower", "faster"]


@pytest.mark.parametrize("pace", [lambda t: 2.0, lambda t: 2.0 if t < 40 else 4.0,
                                  lambda t: 4.0 if t < 40 else 2.0], ids=PACES)
def test_training_ends_in_time_and_uses_it(monkeypatch, pace):
    clock, learn = Clock(monkeypatch), digits_learner()
    fit(learn, 2, Takes(clock, pace, 4.0))
    assert 114 <= clock.now - 1000 <= 126  # 5% of 120 s
    plan, lrs = learn.time_plan, learn.recorder.lrs
    assert len(lrs) == plan.total == plan.plans[-1][1]
    assert len(learn.recorder.values) == -(-plan.total // 5)  # each begun epoch has its row
    assert lrs[0] == 0 and lrs[-1] < 0.15 * max(lrs)
    facts = plan.facts()
    assert facts["steps"] == plan.total and facts["epochs"] == pytest.approx(plan.total / 5, abs=0.01)


def test_what_is_gone_and_what_is_kept_are_not_trained_in(monkeypatch):
    clock, learn = Clock(monkeypatch), digits_learner()
    fit(learn, TimeBudget(2, gone=30, reserve=40), Takes(clock, lambda t: 1.0, 2.0))
    assert 50 - 6 <= clock.now - 1000 <= 50 + 6


def test_an_ordinary_fit_follows_one_that_was_cut(monkeypatch):
    clock, learn = Clock(monkeypatch), digits_learner()
    fit(learn, 1, Takes(clock, lambda t: 1.7, 1.0))
    with learn.no_bar(), learn.no_logging(): learn.pretrain(2)
    assert len(learn.recorder.lrs) == 10


def test_the_plans_of_the_card_give_the_schedule(monkeypatch):
    clock, learn = Clock(monkeypatch), digits_learner()
    fit(learn, 2, Takes(clock, lambda t: 2.0 if t < 60 else 4.0, 1.0))
    plans = learn.time_plan.facts()["plans"]
    assert len(plans) > 1
    start, first = plans[0]
    warmup = min(50 / (first - start), 0.1)
    peak, progress, total, rates = 0.075 * 4, 0.0, None, []
    for step in range(learn.time_plan.total):
        rates.append(warmup_cosine(progress, peak, warmup if total else 0.1, 1.0))
        if total: progress = min(progress + (1 - progress) / max(total - step, 1), 1.0)
        total = dict(plans).get(step + 1, total)
    assert rates == pytest.approx(list(learn.recorder.lrs), abs=2e-3 * peak)


def test_a_killed_run_goes_on_in_the_minutes_that_remain(monkeypatch, tmp_path):
    clock = Clock(monkeypatch)
    takes = Takes(clock, lambda t: 2.0, 2.0)
    with pytest.raises(Stop):
        fit(digits_learner(), 2, takes, CheckpointCallback(tmp_path, every_steps=1), StopAt(23))
    used = clock.now - 1000
    clock.now += 5000  # between the kill and the new start
    learn, begin = digits_learner(), clock.now
    with pytest.raises(ValueError, match="epochs '2 minutes', now '3 minutes'"):
        fit(learn, 3, takes, CheckpointCallback(tmp_path, resume=True))
    learn = digits_learner()
    fit(learn, 2, takes, CheckpointCallback(tmp_path, resume=True))
    assert 114 <= used + clock.now - begin <= 126
    assert len(learn.recorder.lrs) == learn.time_plan.total
    changes = [abs(a - b) for a, b in zip(learn.recorder.lrs, learn.recorder.lrs[1:])]
    assert max(changes) < 0.25 * max(learn.recorder.lrs)  # no jump where it was killed


def test_a_run_whose_last_epoch_was_cut_is_not_trained_again(monkeypatch, tmp_path):
    "Killed after the last step, in validation."
    clock = Clock(monkeypatch)
    class InValidation(Callback):
        order = 99
        def before_validate(self):
            if self.train_iter == self.learn.time_plan.total: raise Stop("killed")
    takes = Takes(clock, lambda t: 1.7, 1.3)
    with pytest.raises(Stop):
        fit(digits_learner(), 1, takes, CheckpointCallback(tmp_path), InValidation())
    done = torch.load(find_checkpoints(tmp_path)[0], weights_only=True)["train_iter"]
    learn = digits_learner()
    fit(learn, 1, takes, CheckpointCallback(tmp_path, resume=True))
    assert learn.train_iter == done == len(learn.recorder.lrs)
    assert len(learn.recorder.values) == -(-done // 5)


def on_two_ranks() -> tuple:
    "Rank 1 is slow; both must take the same steps at the same rates."
    from simclr_nb.core.processes import rank
    learn = digits_learner(160)
    class Slow(Callback):
        def before_batch(self): time.sleep(0.02 * rank())
    start = time.monotonic()
    fit(learn, 0.1, Slow())
    return list(learn.recorder.lrs), learn.time_plan.plans, time.monotonic() - start


def test_all_processes_stop_at_the_same_step():
    (lrs, plans, _), (others, other_plans, _) = launch(on_two_ranks)
    assert lrs == others and plans == other_plans and len(lrs) == plans[-1][1]


def test_a_step_clock_follows_and_forgives():
    clock = StepClock()
    for seconds in [0.1] * 50 + [30.0] + [0.1] * 949: clock.add(seconds)
    assert clock.seconds() == pytest.approx(0.13, abs=0.001)
    for seconds in [0.5] * 60: clock.add(seconds)
    assert clock.seconds() == pytest.approx(0.53, abs=0.02)


def test_steps_are_counted_as_they_cost():
    plan = TimePlan(100, batches=10, between=1.0)
    for _ in range(5): plan.clock.add(2.0)
    total = plan.affordable(10.0, 5)  # 90 s: 2 s a step and 2 s an epoch
    assert plan.cost(5, total - 5) <= 90 < plan.cost(5, total - 5 + 1)
    assert plan.affordable(99.9, 5) == 5  # no time at all: it ends with the step that was done


def test_settings_of_minutes():
    assert complete_config(RunConfig(minutes=3)).epochs is None
    for bad, message in [(dict(minutes=3, epochs=2), "not both"), (dict(minutes=0), "above 0"),
                         (dict(minutes=float("nan")), "above 0"),
                         (dict(minutes=3, method="amdim"), "amdim has no minutes")]:
        with pytest.raises(ValueError, match=message): complete_config(RunConfig(**bad))


def test_a_run_of_minutes_says_what_it_did(tmp_path, capsys):
    "Its card has the epochs and the plans; the table is that of any other run."
    start = time.monotonic()
    run = run_pretraining(RunConfig(minutes=0.25, width=0.125, n_train=200, n_valid=100, bs=50,
                                    out=str(tmp_path / "run")))
    seconds = time.monotonic() - start
    said = capsys.readouterr().out
    assert re.search(r"0.25 minutes are enough for [\d.]+ epochs \(\d+ steps of", said)
    card = run.results["k-NN"]["pretrained"].card["pretraining"]
    assert card["minutes"] == 0.25 and card["steps"] == card["plans"][-1][1]
    assert card["epochs"] == pytest.approx(card["steps"] / 4, abs=0.01)
    assert {"pixels", "random", "pretrained"} == set(run.results["k-NN"])
    assert seconds > 5  # it uses the time, whatever the machine


COMMAND = """
import sys
from simclr_nb.cli import pretrain
sys.argv = ["simclr-pretrain"] + sys.argv[1:]
sys.exit(pretrain())
"""


@pytest.mark.slow
@pytest.mark.parametrize("is_busy", [False, True], ids=["quiet", "busy"])
def test_three_minutes_of_the_command(tmp_path, is_busy):
    "Within 5% of three minutes, from start to end of the process; also when others compute."
    others = []
    def disturb():
        code = "import time; e = time.time() + 60\nwhile time.time() < e: pass"
        others.extend(subprocess.Popen([sys.executable, "-c", code]) for _ in range(os.cpu_count()))
    timer = threading.Timer(80, disturb)
    if is_busy: timer.start()
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", COMMAND, "digits", "--minutes", "3", "--out", "run"],
                   check=True, cwd=tmp_path, timeout=600, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    seconds = time.monotonic() - start
    timer.cancel()
    for process in others: process.wait(timeout=120)
    card = json.loads((tmp_path / "run/results.json").read_text())["k-NN"]["pretrained"]["card"]
    print(f"{seconds:.1f} s, {card['pretraining']['epochs']} epochs")
    assert 171 <= seconds <= 189


def test_an_epoch_of_one_batch(monkeypatch):
    "No two steps of an epoch follow each other there."
    clock, learn = Clock(monkeypatch), digits_learner(n_train=16)
    assert len(learn.dls.train) == 1
    fit(learn, 2, Takes(clock, lambda t: 2.0, 1.0))
    assert 114 <= clock.now - 1000 <= 126
    assert len(learn.recorder.lrs) == learn.time_plan.total and max(learn.recorder.lrs) > 0


def test_killed_before_there_is_a_plan(monkeypatch, tmp_path):
    "Epochs end before a tenth of the time has passed, and so does the process."
    clock, learn = Clock(monkeypatch), digits_learner()
    with pytest.raises(Stop):
        fit(learn, 10, Takes(clock, lambda t: 0.001, 0.0), StopAt(12),
            CheckpointCallback(tmp_path, every_minutes=0))
    assert learn.time_plan.total is None
    again = digits_learner()
    fit(again, 10, Takes(clock, lambda t: 2.0, 0.0), CheckpointCallback(tmp_path, resume=True))
    assert again.time_plan.total == len(again.recorder.lrs) > 12
