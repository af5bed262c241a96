"""One run over many processes: the learner by `processes.run`, the command under torchrun and accelerate.

Two processes must give every result of the one-process run, and a failure must end all within a minute.
"""
import csv
import os
import signal
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from safetensors.torch import load_file
from torch import Tensor

from processes import run
from simclr_nb.data import simclr_dls
from simclr_nb.learner import simclr_learner
from simclr_nb.parallel.microbatch import replace_norms

EPOCHS = 8
DIGITS = f"digits --epochs {EPOCHS} --n-train 64 --n-valid 64 --bs 16 --width 0.125".split()


# The learner

class Rounded(Callback):
    "fastai's smoothed loss takes float32 only."
    order = 13
    def after_loss(self): self.learn.loss = self.loss.float()


def copies(x: Tensor, dtype: torch.dtype) -> Tensor:
    "Two views, at the size of the policy, of which nothing depends on who draws them."
    x = torch.nn.functional.interpolate(x.to(dtype) / 255, 16)
    return torch.cat([x, x + 0.1 * x.flip(3)])


def pretrain(settings: dict) -> dict:
    "Final state of a small run."
    settings = dict(settings)
    torch.manual_seed(0)
    dls = simclr_dls("digits", bs=32, n_train=128, n_valid=64, seed=0, device="cpu")
    independent, exact = settings.pop("independent", False), "precision" not in settings
    learn = simclr_learner(dls, width=0.125, **dict(precision="fp32", cbs=[Rounded()]) | settings)
    if independent: replace_norms(learn.model)
    if exact: learn.model.double().encoder.register_forward_pre_hook(lambda m, x: x[0].double())
    learn.views.two_views = partial(copies, dtype=next(learn.model.parameters()).dtype)
    learn.probe._start(torch.empty(0, learn.model.encoder.out_dim))  # equal in all runs
    with learn.no_bar(), learn.no_logging(): learn.pretrain(2)
    probe = {f"probe {k}": v for k, v in learn.probe.classifier.state_dict().items()}
    history = {f"history {k}": torch.tensor(v) for k, v in learn.history().items()}
    weights = {k: v for k, v in learn.model.state_dict().items() if v.is_floating_point()}
    assert type(learn.model).__name__ == "SimCLR" and type(learn.loss_func).__name__ == learn_loss(settings)
    return {**weights, **{k: v.detach() for k, v in probe.items()}, **history}


def learn_loss(settings: dict) -> str: return "ContrastiveLoss" if "loss" in settings else "NTXent"


RUNS = dict(batch_norm={}, other_loss=dict(loss="nt_logistic"), independent=dict(independent=True),
            micro=dict(independent=True, micro_batch=3))


def learners_in_processes(rank: int, world: int) -> dict:
    return {name: pretrain(settings) for name, settings in RUNS.items()}


@pytest.fixture(scope="module")
def learners(tmp_path_factory):
    "Final state of each of a number of processes; they run once."
    return cache(lambda world: run(learners_in_processes, world, tmp_path_factory.mktemp("learn")))


def close(found: dict, expected: dict, tolerance: float = 1e-4):
    "The network is float64; what is measured of it, float32."
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().clamp_min(1e-2)
        assert (found[name] - value).abs().max() < tolerance * scale, name


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", RUNS)
def test_learner_is_that_of_one_process(name, world, learners):
    "Weights, running statistics, probe, losses, contrastive accuracy and k-NN; on every rank."
    for found in learners(world): close(found[name], learners(1)[0][name])


def test_micro_batches_change_nothing_without_batch_statistics(learners):
    for world in (1, 2): close(learners(world)[0]["micro"], learners(1)[0]["independent"])


COMBINED = [dict(precision=p, micro_batch=m) for p in ("bf16", "fp16") for m in (None, 6)]


def options_in_processes(rank: int, world: int) -> list: return [pretrain(dict(s)) for s in COMBINED]


def test_options_combine(tmp_path, learners):
    "Half precision with micro-batches and processes; ranks stay equal, and near full precision."
    first, second = run(options_in_processes, 2, tmp_path)
    for settings, a, b in zip(COMBINED, first, second, strict=True):
        for name in a: assert torch.equal(a[name], b[name]), (settings, name)
        loss, expected = (x["history train_loss"][-1] for x in (a, learners(2)[0]["batch_norm"]))
        assert (loss - expected).abs() < 0.05 * expected, settings


def compiled_in_processes(rank: int, world: int) -> dict:
    return pretrain(dict(compiled=True, precision="bf16", micro_batch=16))


@pytest.mark.slow
def test_compiled_combines(tmp_path, learners):
    "torch.compile with bf16, channels-last, micro-batches and two processes."
    first, second = run(compiled_in_processes, 2, tmp_path, timeout=900)
    for name in first: assert torch.equal(first[name], second[name]), name
    loss, expected = (x["history train_loss"][-1] for x in (first, learners(2)[0]["batch_norm"]))
    assert (loss - expected).abs() < 0.05 * expected


# The command

LAUNCHERS = dict(torchrun=["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
                 accelerate=["accelerate.commands.launch", "--multi_gpu", "--num_processes=2",
                             "--main_process_port=0"])


def begin(out: Path, launcher: str, *options: str, program: tuple = ("-m", "simclr_nb.cli")):
    "The command in two processes."
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    command = [sys.executable, "-m", *LAUNCHERS[launcher], *program, *DIGITS]
    return subprocess.Popen([*command, "--out", str(out), *options], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, timeout: float = 120) -> str:
    "Its printed output; fails where it does not end."
    try: return process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise


def rows(out: Path) -> list[list[str]]:
    return list(csv.reader((out / "history.csv").read_text().splitlines()))


def children(pid: int) -> list[int]:
    "Processes that a process has started, those of rank 0 and 1 in order."
    tasks = Path(f"/proc/{pid}/task")
    return sorted(int(c) for t in tasks.iterdir() for c in (t / "children").read_text().split())


LAST_WORDS = """
import atexit, sys
from pathlib import Path
def say(): print(*["last"] + [p.read_text().strip() for p in Path("/proc/self/task").glob("*/comm")])
atexit.register(say)  # first to be registered, last to be called
from simclr_nb.cli import pretrain
sys.exit(pretrain())
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run in two processes that nobody disturbed; at its end each names its threads."
    out = tmp_path_factory.mktemp("runs") / "whole"
    (program := out.with_name("last.py")).write_text(LAST_WORDS)
    process = begin(out, "torchrun", program=(program,))
    told = finish(process)
    assert process.returncode == 0, told
    return out, told


def test_command_prints_and_writes_once(whole):
    out, told = whole
    assert told.count("pretraining resnet18") == told.count("report: ") == 1
    assert "in 2 processes" in told
    assert [row[0] for row in rows(out)] == ["epoch", *map(str, range(EPOCHS))]
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json", "encoder.safetensors", "head.safetensors", "history.csv", "images.json.gz",
        "report.html", "results.json"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds threads in /proc")
def test_no_thread_of_the_group_outlives_the_work(whole):
    "One that does can abort the process while the interpreter is taken down."
    last = [line for line in whole[1].splitlines() if line.startswith("last ")]
    assert len(last) == 2 and "gloo" not in " ".join(last), whole[1]


def test_accelerate_does_the_same(whole, tmp_path):
    process = begin(tmp_path / "run", "accelerate")
    told = finish(process)
    assert process.returncode == 0, told
    same_end(whole[0], tmp_path / "run")


def same_end(a: Path, b: Path):
    first, second = (load_file(p / "encoder.safetensors") for p in (a, b))
    for name in first: assert torch.equal(first[name], second[name]), name
    assert [row[:-1] for row in rows(a)] == [row[:-1] for row in rows(b)]  # but for the time


def saved(out: Path) -> set: return {path.name for path in (out / "state").glob("*.ckpt")}


def stop(process: subprocess.Popen, out: Path, who: int | None, what: int) -> str:
    "Signal a rank, or the launcher, when a run has saved a new state; gives what was printed."
    before, deadline = saved(out), time.monotonic() + 120
    while not saved(out) - before:
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, "no state within two minutes"
        time.sleep(0.01)
    os.kill(process.pid if who is None else children(process.pid)[who], what)
    told = finish(process, 60)
    assert process.returncode, told
    return told


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
@pytest.mark.parametrize("who", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_stopped_and_killed_all_end_and_the_run_goes_on(whole, tmp_path, who):
    "The launcher is asked to stop, then a rank is killed: an end within a minute, nothing lost."
    out = tmp_path / "run"
    told = stop(begin(out, "torchrun"), out, None, signal.SIGTERM)
    assert "asked to stop (SIGTERM): the state is in" in told
    stop(begin(out, "torchrun", "--resume"), out, who, signal.SIGKILL)
    again = begin(out, "torchrun", "--resume")
    told = finish(again)
    assert again.returncode == 0, told
    same_end(whole[0], out)


TWO_RUNS = """
import sys
from simclr_nb.cli import pretrain
for option, value in (("--temperature", "-1"), ("--bs", "33")):
    try: code = pretrain([*sys.argv[1:], option, value])
    except SystemExit as e: code = e.code
    print(f"code {code}\\n", end="", flush=True)  # one write, which another rank's cannot divide
"""


def test_bad_input_is_said_once(tmp_path):
    "By one rank; all end."
    (tmp_path / "two.py").write_text(TWO_RUNS)
    told = finish(begin(tmp_path / "run", "torchrun", program=(tmp_path / "two.py",)))
    assert told.count("simclr-pretrain: error: ") == 2 and told.count("code 2") == 4, told
    assert told.count("temperature") and not (tmp_path / "run").exists()
    assert "2 processes cannot share a batch of 33: use 32" in told
