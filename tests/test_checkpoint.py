"Runs that are killed, stopped, short of disk or spoilt: each goes on, or says what is wrong."
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simclr_nb.checkpoint import find_checkpoints, latest_checkpoint, write_checkpoint

LIVES = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from fastai.callback.core import Callback
from simclr_nb.checkpoint import CheckpointCallback
from simclr_nb.data import SimCLRDataLoaders, simclr_dls
from simclr_nb.learner import simclr_learner
from simclr_nb.loader import EpochLoader

EPOCHS, N, BS = 3, 192, 32
dls = simclr_dls("cifar10", n_train=N, n_valid=64, seed=0, device="cpu", progress=False)

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
    train = EpochLoader(dls.train.dataset, bs=BS, seed=0, device="cpu")
    kwargs = dict(policy=dls.policy, classes=dls.classes, info=dls.info, device=torch.device("cpu"))
    own = SimCLRDataLoaders(train, dls.valid, **kwargs)
    learn = simclr_learner(own, width=0.0625, temperature=0.2)
    if nan is not None:
        views = learn.views.two_views
        def spoilt(x): return views(x) * (float("nan") if learn.train_iter == nan else 1.0)
        learn.views.two_views = spoilt
    saving = CheckpointCallback(folder / "state", every_steps=1, resume=True)
    with learn.no_bar(), learn.no_logging():
        learn.pretrain(EPOCHS, cbs=[saving, Seen(folder / "seen.jsonl")])
    history = {k: torch.tensor(v) for k, v in learn.history().items()}
    end = dict(learn.model.state_dict(), **history, classifier=learn.probe.classifier[1].weight.detach(),
               random=torch.get_rng_state())
    torch.save(end, folder / "end.part")
    os.replace(folder / "end.part", folder / "end.pt")

def start(folder, before=lambda: None, **kwargs):
    "Begin a life in a process of its own."
    folder.mkdir(exist_ok=True)
    if pid := os.fork(): return pid
    try:
        before()
        life(folder, **kwargs)
        os._exit(0)
    except SystemExit as e: os._exit(e.code)
    except BaseException as e:
        print(f"{type(e).__name__}: {e}", flush=True)
        os._exit(1)

def end(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""

KILLS = LIVES + """
root, n_kills = Path(sys.argv[1]), int(sys.argv[2])
began = time.monotonic()
assert end(start(root / "whole")) == 0
took = time.monotonic() - began
rng, kills, writes, finished = random.Random(7), 0, 0, 0

def dies_writing(left):
    "Die at a flush to the disk, when a checkpoint is half there."
    def fsync(fd):
        nonlocal left
        left -= 1
        if not left: os.kill(os.getpid(), signal.SIGKILL)
    def prepare(): os.fsync = fsync
    return prepare

while kills < n_kills or not (root / f"{finished}" / "end.pt").exists():
    folder = root / f"{finished}"
    if (folder / "end.pt").exists():
        finished += 1
        continue
    if kills >= n_kills: code = end(start(folder))
    elif rng.random() < 0.3: code = end(start(folder, dies_writing(rng.randint(1, 4))))
    else:
        pid = start(folder)
        time.sleep(rng.uniform(0, 0.6) * took)
        os.kill(pid, signal.SIGKILL)
        code = end(pid)
    kills += code == -9
    assert code in (0, -9), code
print(json.dumps(dict(kills=kills, runs=finished + 1)))
"""


def run(script: str, *args, code: int = 0) -> str:
    "Output of a script in a process of its own."
    env = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script, *map(str, args)], env=env,
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def seen(folder: Path) -> dict[int, list[int]]:
    "Images of each epoch, by the last life in which each step was made."
    steps = {}
    for line in (folder / "seen.jsonl").read_text().splitlines():
        epoch, step, rows = json.loads(line)
        steps[epoch, step] = rows
    return {e: sum((rows for (epoch, _), rows in sorted(steps.items()) if epoch == e), [])
            for e in {epoch for epoch, _ in steps}}


def same_end(a: Path, b: Path) -> None:
    first, second = (torch.load(p / "end.pt", weights_only=True) for p in (a, b))
    assert first.keys() == second.keys()
    for name in first: assert torch.equal(first[name], second[name]), name


def test_kills_change_nothing(tmp_path):
    "20 kills at random moments and in the middle of writing: the same end, to the last bit."
    told = json.loads(run(KILLS, tmp_path, 20).splitlines()[-1])
    assert told["kills"] >= 20
    for i in range(told["runs"]):
        same_end(tmp_path / "whole", tmp_path / f"{i}")
        for rows in seen(tmp_path / f"{i}").values(): assert sorted(rows) == list(range(192))
        assert len(seen(tmp_path / f"{i}")) == 3
        assert not list((tmp_path / f"{i}" / "state").glob(".*.tmp"))


TERMINATED = LIVES + """
root = Path(sys.argv[1])
assert end(start(root / "whole")) == 0
pid = start(root / "cut")
while not list((root / "cut" / "state").glob("*.ckpt")): time.sleep(0.01)
os.kill(pid, signal.SIGTERM)
assert end(pid) == 143
assert end(start(root / "cut")) == 0
"""


def test_asked_to_stop_it_saves_and_goes_on_later(tmp_path):
    assert "asked to stop (SIGTERM): the state is in" in run(TERMINATED, tmp_path)
    same_end(tmp_path / "whole", tmp_path / "cut")


SPOILT = LIVES + """
root = Path(sys.argv[1])
assert end(start(root / "nan", nan=4)) == 1
print(*dls.train.dataset.images.shape)
assert end(start(root / "nan")) == 0                       # without the fault it goes on
assert end(start(root / "whole")) == 0
"""


def test_not_a_number_stops_with_a_diagnosis(tmp_path):
    told = run(SPOILT, tmp_path)
    rows = seen(tmp_path / "whole")[0][4 * 32:][:8]
    assert "FloatingPointError" in told
    assert "the projections are not finite at epoch 0, step 4, learning rate" in told
    assert f"rank 0, images {', '.join(map(str, rows))}, ..." in told
    assert "the last good state is" in told and "step-000000004" in told
    same_end(tmp_path / "whole", tmp_path / "nan")


FULL = """
import resource, sys, torch
from simclr_nb.checkpoint import write_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))     # as a disk with no more room
try: write_checkpoint(sys.argv[1], 2, dict(x=torch.zeros(100_000)))
except OSError as e: print(e)
"""


def test_no_room_left(tmp_path):
    write_checkpoint(tmp_path, 1, dict(x=torch.ones(3)))
    told = run(FULL, tmp_path)
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
