"Runs that are killed, stopped, short of disk or spoilt: each goes on, or says what is wrong."
import json
import os
import resource
import signal
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback

from processes import script, start
from simclr_nb.data import simclr_dls
from simclr_nb.learner import simclr_learner
from simclr_nb.train.checkpoint import find_checkpoints, latest_checkpoint, write_checkpoint

LIVES = """
import json, os, random, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch
from fastai.callback.core import Callback
from simclr_nb.images.arrays import ArrayEpochLoader
from simclr_nb.train.checkpoint import CheckpointCallback
from simclr_nb.data import SimCLRDataLoaders, simclr_dls
from simclr_nb.learner import simclr_learner
from simclr_nb.core.processes import rank, world_size

data, root, world, n_kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
EPOCHS, N, BS = 3, 192, 32
dls = simclr_dls(data, n_train=N, n_valid=64, seed=0, device="cpu", progress=False)

class Seen(Callback):
    "Notes the images of each step that was finished, in each life."
    def __init__(self, path): self.path = path
    def after_step(self):
        rows = self.dl.plan(self.dl.epoch)[0][self.iter].tolist()
        with open(self.path, "a") as f: f.write(json.dumps([self.epoch, self.iter, rows]) + "\\n")

def life(folder, nan=None):
    "One life of a run; writes what it ends with."
    torch.manual_seed(0)
    random.seed(0)
    train = ArrayEpochLoader(dls.train.dataset, bs=BS // world_size(), seed=0, device="cpu")
    kwargs = dict(policy=dls.policy, classes=dls.classes, info=dls.info, device=torch.device("cpu"))
    own = SimCLRDataLoaders(train, dls.valid.new(bs=32 // world_size()), **kwargs)
    learn = simclr_learner(own, width=0.0625, temperature=0.2)
    if nan is not None:
        views = learn.views.two_views
        def spoilt(x): return views(x) * (float("nan") if learn.train_iter == nan else 1.0)
        if rank() == world_size() - 1: learn.views.two_views = spoilt
    saving = CheckpointCallback(folder / "state", every_steps=1, resume=True)
    with learn.no_bar(), learn.no_logging():
        learn.pretrain(EPOCHS, cbs=[saving, Seen(folder / f"seen{rank()}.jsonl")])
    history = {k: torch.tensor(v) for k, v in learn.history().items()}
    end = dict(learn.model.state_dict(), **history, classifier=learn.probe.classifier[1].weight.detach(),
               random=torch.get_rng_state())
    torch.save(end, folder / f"end{rank()}.part")
    os.replace(folder / f"end{rank()}.part", folder / f"end{rank()}.pt")

def start(folder, before=lambda rank: None, world=1, **kwargs):
    "Begin a life in processes of its own."
    folder.mkdir(exist_ok=True)
    meeting = f"file://{folder}/meeting{time.monotonic_ns()}"
    return [fork(folder, before, world, r, meeting, kwargs) for r in range(world)]

def fork(folder, before, world, r, meeting, kwargs):
    if pid := os.fork(): return pid
    try:
        before(r)
        if world > 1:
            for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"): os.environ[name] = str(world)
            for name in ("RANK", "LOCAL_RANK"): os.environ[name] = str(r)
            torch.distributed.init_process_group("gloo", init_method=meeting, rank=r, world_size=world,
                                                 timeout=timedelta(seconds=30))
        life(folder, **kwargs)
        os._exit(0)
    except SystemExit as e: os._exit(e.code)
    except BaseException as e:
        print(f"{type(e).__name__}: {e}", flush=True)
        os._exit(1)

def first_state(folder, pids):
    "Wait until a run has saved its state; a life that ends before that is an error."
    deadline = time.monotonic() + 120
    while not list((folder / "state").glob("*.ckpt")):
        ended = [pid for pid in pids if os.waitpid(pid, os.WNOHANG)[0]]
        assert not ended, "a life ended before it saved a state"
        assert time.monotonic() < deadline, "no state within two minutes"
        time.sleep(0.01)

def exit_code(pid, deadline):
    "Of a life that ends; one that goes on is aborted, which no test takes for a kill."
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline: os.kill(pid, signal.SIGABRT)
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(ended[1])

def end(pids):
    deadline = time.monotonic() + 120
    codes = [exit_code(pid, deadline) for pid in pids]
    return codes[0] if len(codes) == 1 else codes

def all_ended(code): return code if world == 1 else [code] * world

began = time.monotonic()
assert end(start(root / "whole", world=world)) == all_ended(0)
took = time.monotonic() - began
"""

KILLED = """
rng, kills, writes, finished = random.Random(7), 0, 0, 0

def dies_writing(left):
    "Die at a flush to the disk, when a checkpoint is half there."
    def fsync(fd):
        nonlocal left
        left -= 1
        if not left: os.kill(os.getpid(), signal.SIGKILL)
    def prepare(r): os.fsync = fsync
    return prepare

def is_over(folder): return all((folder / f"end{r}.pt").exists() for r in range(world))

while kills < n_kills or not is_over(root / f"{finished}"):
    folder = root / f"{finished}"
    if is_over(folder):
        finished += 1
        continue
    if kills >= n_kills: codes = end(start(folder, world=world))
    elif rng.random() < 0.3: codes = end(start(folder, dies_writing(rng.randint(1, 4)), world=world))
    else:
        pids = start(folder, world=world)
        time.sleep(rng.uniform(0, 0.6) * took)
        os.kill(rng.choice(pids), signal.SIGKILL)             # the others notice
        codes = end(pids)
    codes = [codes] if world == 1 else codes
    killed = -9 in codes
    kills += killed
    assert set(codes) <= ({0, -9, 1} if killed else {0}), codes
(root / "killed.json").write_text(json.dumps(dict(kills=kills, runs=finished + 1)))
"""

TERMINATED = """
pids = start(root / "cut", world=world)
first_state(root / "cut", pids)
os.kill(pids[-1], signal.SIGTERM)                             # one is asked, all stop
assert end(pids) == all_ended(143)
assert end(start(root / "cut", world=world)) == all_ended(0)
"""

ELASTIC = """
pids = start(root / "fewer", world=2)
first_state(root / "fewer", pids)
os.kill(pids[0], signal.SIGKILL)
assert end(pids)[0] == -9
assert end(start(root / "fewer")) == 0                        # goes on in one process
"""

SPOILT = """
assert end(start(root / "nan", nan=4, world=world)) == all_ended(1)
assert end(start(root / "nan", world=world)) == all_ended(0)  # without the fault it goes on
"""


def run(root: Path, data: str, world: int, kills: int, **scenarios: str) -> dict[str, str]:
    "Printed lines of the lives of each scenario, in processes that one process starts."
    parts = [f"print('== {name}', flush=True)\n{text}" for name, text in scenarios.items()]
    (path := root / "lives.py").write_text(LIVES + "".join(parts))
    code, told = script(path, data, root, world, kills, log=root / "log", timeout=900)
    assert code == 0, told
    return dict(part.split("\n", 1) for part in told.split("== ")[1:])


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    "Folder of the runs of a number of processes, and what they printed; they run once."
    @cache
    def both(world: int) -> tuple[Path, dict]:
        root = tmp_path_factory.mktemp("lives")
        scenarios = dict(killed=KILLED, terminated=TERMINATED, spoilt=SPOILT)
        if world == 2: scenarios["elastic"] = ELASTIC
        return root, run(root, "digits", world, 6, **scenarios)
    return both


def seen(folder: Path, world: int = 1) -> dict[int, list[int]]:
    "Images of each epoch on all ranks, by the last life in which each step was made."
    steps = {}
    for r in range(world):
        for line in (folder / f"seen{r}.jsonl").read_text().splitlines():
            epoch, step, rows = json.loads(line)
            steps[epoch, (step, r)] = rows
    return {e: sum((rows for (epoch, _), rows in sorted(steps.items()) if epoch == e), [])
            for e in {epoch for epoch, _ in steps}}


def same_end(a: Path, b: Path, world: int = 1) -> None:
    for r in range(world):
        first, second = (torch.load(p / f"end{r}.pt", weights_only=True) for p in (a, b))
        assert first.keys() == second.keys()
        for name in first: assert torch.equal(first[name], second[name]), name


def check_kills(root: Path, world: int, least: int):
    "Every run ends as the one that nobody killed, to the last bit."
    told = json.loads((root / "killed.json").read_text())
    assert told["kills"] >= least
    for i in range(told["runs"]):
        same_end(root / "whole", root / f"{i}", world)
        for rows in seen(root / f"{i}", world).values(): assert sorted(rows) == list(range(192))
        assert len(seen(root / f"{i}", world)) == 3
        assert not list((root / f"{i}" / "state").glob(".*.tmp"))


@pytest.mark.parametrize("world", [1, 2])
def test_kills_change_nothing(lives, world):
    "6 kills at random moments and in the middle of writing."
    check_kills(lives(world)[0], world, 6)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_many_kills_change_nothing(tmp_path, cifar10, world):
    "20 kills, of a run with the larger images of CIFAR-10."
    run(tmp_path, "cifar10", world, 20, killed=KILLED)
    check_kills(tmp_path, world, 20)


@pytest.mark.parametrize("world", [1, 2])
def test_asked_to_stop_it_saves_and_goes_on_later(lives, world):
    root, told = lives(world)
    assert told["terminated"].count("asked to stop (SIGTERM): the state is in") == 1
    same_end(root / "whole", root / "cut", world)


def test_goes_on_in_fewer_processes(lives):
    "With the same batch of all; no image is seen twice or left out."
    root, _ = lives(2)
    one, two = root / "fewer" / "seen0.jsonl", root / "fewer" / "seen1.jsonl"
    steps = {}
    for line in two.read_text().splitlines() + one.read_text().splitlines():
        epoch, step, rows = json.loads(line)
        steps.setdefault((epoch, step), []).append(rows)
    for epoch in range(3):
        last = [max(steps[epoch, i], key=len) for i in range(6) if len(steps[epoch, i][-1]) == 32]
        halves = [rows for i in range(6) if len(steps[epoch, i][-1]) == 16 for rows in steps[epoch, i][:2]]
        assert sorted(sum(last + halves, [])) == list(range(192))


@pytest.mark.parametrize("world", [1, 2])
def test_not_a_number_stops_with_a_diagnosis(lives, world):
    "On the last rank; all say so and stop."
    (root, told), last = lives(world), world - 1
    told = told["spoilt"]
    rows = json.loads((root / "whole" / f"seen{last}.jsonl").read_text().splitlines()[4])[2][:8]
    assert told.count("FloatingPointError") == world
    assert told.count("the projections are not finite at epoch 0, step 4, learning rate") == world
    assert told.count(f"rank {last}, images {', '.join(map(str, rows))}, ...") == world
    assert told.count("the last good state is") == told.count("step-000000004") == world
    same_end(root / "whole", root / "nan", world)


def fill_the_disk(folder: str):
    "As a disk with no more room."
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    try: write_checkpoint(folder, 2, dict(x=torch.zeros(100_000)))
    except OSError as e: print(e, flush=True)


def test_no_room_left(tmp_path):
    write_checkpoint(tmp_path, 1, dict(x=torch.ones(3)))
    log = tmp_path / "log"
    process = start(log, fill_the_disk, str(tmp_path))
    process.join(60)
    assert process.exitcode == 0
    told = log.read_text()
    assert "cannot write a checkpoint" in told and "step-000000001" in told and "still there" in told
    assert [p.name[:14] for p in find_checkpoints(tmp_path)] == ["step-000000001"]
    assert torch.equal(latest_checkpoint(tmp_path)["x"], torch.ones(3))
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")
def test_full_disk(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path])
    if mounted.returncode: pytest.skip("no right to mount here")
    try:
        write_checkpoint(tmp_path / "state", 1, dict(x=torch.ones(3)))
        with pytest.raises(OSError, match="No space left.*step-000000001.* is still there"):
            write_checkpoint(tmp_path / "state", 2, dict(x=torch.zeros(1_000_000)))
        assert torch.equal(latest_checkpoint(tmp_path / "state")["x"], torch.ones(3))
    finally: subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM])
def test_handler_is_given_back(signal_number):
    before = signal.getsignal(signal_number)
    from simclr_nb.data import simclr_dls
    from simclr_nb.learner import simclr_learner
    dls = simclr_dls("digits", bs=64, n_train=128, n_valid=64, seed=0, device="cpu")
    learn = simclr_learner(dls, width=0.0625)
    import tempfile
    with learn.no_bar(), learn.no_logging(), tempfile.TemporaryDirectory() as folder:
        learn.pretrain(1, checkpoints=folder)
        assert signal.getsignal(signal_number) is before
        learn.remove_cbs(learn.cbs.filter(lambda cb: cb.name == "views"))  # an error in each step
        with pytest.raises(Exception): learn.pretrain(1, checkpoints=Path(folder) / "other")
    assert signal.getsignal(signal_number) is before


@pytest.mark.parametrize("first, second", [("bf16", "fp32"), ("fp32", "bf16")])
def test_a_run_keeps_the_precision_that_it_chose(tmp_path, monkeypatch, first, second):
    "`auto` measures, and a busy machine measures something else in the next life."
    chosen = iter([first, first, second, second])
    monkeypatch.setattr("simclr_nb.learner.auto_precision", lambda device: next(chosen))

    def learner(**kwargs):
        torch.manual_seed(0)
        dls = simclr_dls("digits", bs=32, n_train=64, n_valid=32, seed=0, device="cpu", progress=False)
        return simclr_learner(dls, width=0.125, **kwargs)

    class Stop(Callback):
        order = 71
        def after_batch(self):
            if self.training and self.train_iter == 3: signal.raise_signal(signal.SIGTERM)

    def pretrain(learn, **kwargs):
        torch.manual_seed(1)
        with learn.no_bar(), learn.no_logging(): learn.pretrain(2, **kwargs)
        return learn.model.state_dict()

    whole = pretrain(learner())
    with pytest.raises(SystemExit): pretrain(learner(), checkpoints=tmp_path, cbs=[Stop()])
    resumed = pretrain(learner(), checkpoints=tmp_path, resume=True)
    for name, value in whole.items(): assert torch.equal(value, resumed[name]), name
    with pytest.raises(ValueError, match=f"computes in {first}, not fp16: give precision='{first}'"):
        pretrain(learner(precision="fp16"), checkpoints=tmp_path, resume=True)
