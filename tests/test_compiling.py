"""Which runs compile their views, for which sizes of batches, and that nothing else changes.

The compiler itself is replaced by one that gives the operators back and notes what it is asked for;
`test_fused.py` compiles for real.
"""
import json
from dataclasses import replace

import pytest
import torch

from simclr_nb.data import simclr_dls
from simclr_nb.learner import simclr_learner
from simclr_nb.run import pretrain
from simclr_nb.run.config import RunConfig
from simclr_nb.run.pretrain import run_pretraining
from simclr_nb.train import compiling
from simclr_nb.views.two_views import TwoViews

EPOCHS, SIZE = 2, 16
PIXELS = 2 * 96 * EPOCHS * SIZE**2  # 3 batches of 32 in each epoch


class Noted(TwoViews):
    "Views by the operators; counts their batches."

    def __call__(self, x, generator=None):
        self.batches.append((len(x), generator is not None))
        return super().__call__(x, generator)


@pytest.fixture
def trained(monkeypatch, capsys):
    "Trains in the same way each time; gives the weights, the batches of compiled views, the output."
    def compiled(two_views):
        views = Noted(two_views.policy, two_views.second)
        views.batches = batches
        return views

    batches = []
    monkeypatch.setattr(compiling, "compiled_views", compiled)
    monkeypatch.setattr(compiling, "can_compile", lambda device: True)

    def train(limit, **options):
        batches.clear()
        monkeypatch.setattr(compiling, "LONG_RUN", limit)
        torch.manual_seed(0)
        dls = simclr_dls("digits", bs=32, n_train=100, n_valid=20, seed=0, device="cpu", progress=False)
        learn = simclr_learner(dls, width=1 / 16, **options)
        plain = learn.views.two_views
        with learn.no_bar(), learn.no_logging(): learn.pretrain(EPOCHS)
        assert learn.views.two_views is plain  # also after the fit
        weights = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
        return weights, list(batches), capsys.readouterr().out
    return train


def test_a_long_run(trained):
    short, none, said = trained(PIXELS + 1)
    assert none == [] and "compiled" not in said
    long, batches, said = trained(PIXELS)
    assert torch.equal(short, long)  # draws and steps are those of the operators, bit for bit
    assert said.count("a long run: its views were compiled in") == 1
    warm = [n for n, is_own in batches if is_own]
    assert warm == [32, 20]  # batches of training and of validation
    assert {n for n, is_own in batches if not is_own} <= set(warm)


def test_switched_off(trained):
    weights, batches, said = trained(0, compiled=False)
    assert batches == [] and "compiled" not in said


def test_a_run_by_the_clock_keeps_the_operators(monkeypatch):
    monkeypatch.setattr(compiling, "LONG_RUN", 0)
    monkeypatch.setattr(compiling, "can_compile", lambda device: True)
    dls = simclr_dls("digits", bs=32, n_train=100, n_valid=20, seed=0, device="cpu", progress=False)
    learn = simclr_learner(dls, width=1 / 16)
    callback, = learn.cbs.filter(lambda cb: isinstance(cb, compiling.CompileViewsCallback))
    callback.plain, learn.n_epoch = learn.views.two_views, 1
    assert callback.is_worth_it()
    learn.minutes = None  # as in `learn.pretrain(minutes=...)`
    assert not callback.is_worth_it()


def test_resumed_as_begun(tmp_path, monkeypatch, capsys):
    "Left open, the setting is that of a run begun without; a run begun with it asks for it again."
    def killed(*args, **kwargs): raise KeyboardInterrupt

    out = tmp_path / "run"
    config = RunConfig("digits", epochs=EPOCHS, width=1 / 16, n_train=96, n_valid=32, bs=32,
                       out=str(out), resume=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "_finish", killed)
        run_pretraining(replace(config, compiled=False))
    monkeypatch.setattr(compiling, "LONG_RUN", 0)
    begun = json.loads((out / "config.json").read_text())
    begun["config"]["compiled"] = True
    (out / "config.json").write_text(json.dumps(begun))
    with pytest.raises(ValueError, match="compiled True, now None"): run_pretraining(config)
    begun["config"]["compiled"] = False
    (out / "config.json").write_text(json.dumps(begun))
    run_pretraining(config)
    assert "were compiled" not in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["config"]["compiled"] is False
