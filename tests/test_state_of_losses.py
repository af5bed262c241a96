"A loss or a callback that remembers: trained, moved, the same on all ranks, and kept by a resumed run."
import warnings
from collections import deque

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.optimizer import Adam, OptimWrapper
from torch import nn

from simclr_nb.core.processes import launch, rank, world_size
from simclr_nb.data import simclr_dls
from simclr_nb.learner import simclr_learner
from simclr_nb.loss.tiled import NTXent
from simclr_nb.model.encoder import load_encoder
from simclr_nb.train.checkpoint import CheckpointCallback


class Bank(nn.Module):
    "NT-Xent with a temperature that is learned, and memory of every kind."

    def __init__(self):
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(-1.0))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("bank", torch.zeros(16, 128))
        self.place, self.recent, self.plain = 0, deque(maxlen=3), torch.zeros(128)
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, out, *labels):
        temperature = self.log_temperature.exp()
        z = nn.functional.normalize(out.z.float())
        old = (z @ self.bank.clone().T / temperature).logsumexp(1).mean() + z.mv(self.plain).mean()
        loss = NTXent(1.0)(out.z / out.z.norm(dim=1, keepdim=True)) / temperature + 0.1 * old
        if self.training: self._remember(z.detach())
        return loss

    def _remember(self, z):
        row = torch.randint(len(z), (), generator=self.generator)
        self.bank[self.place] = z[row]
        self.place = (self.place + 1) % len(self.bank)
        self.recent.append(z[row])
        self.plain = sum(self.recent)
        self.seen += 1


class Average(Callback):
    "Averages the weights of the encoder, and counts; says nothing about its state."

    def __init__(self, rate): self.rate, self.steps, self.rows = rate, 0, []

    def before_fit(self): self.average = nn.Linear(1, 1, bias=False)

    def after_step(self):
        self.steps += 1
        self.rows.append(self.steps)
        weight = next(self.model.encoder.parameters()).detach().mean()
        self.average.weight.data.lerp_(weight, self.rate)


class Stop(Callback):
    order = 100
    def __init__(self, step): self.step = step
    def after_batch(self):
        if self.training and self.train_iter == self.step: raise KeyboardInterrupt


def learner(**kwargs):
    torch.manual_seed(0)
    dls = simclr_dls("digits", n_train=128, n_valid=64, bs=32, seed=0, device="cpu", progress=False)
    return simclr_learner(dls, width=0.0625, **kwargs)


def quiet(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.pretrain(*args, **kwargs)
    return learn


def all_of(learn, average) -> dict:
    "Everything that a run ends with."
    loss = learn.loss_func
    extra = dict(place=loss.place, recent=torch.stack([*loss.recent]), plain=loss.plain,
                 drawn=loss.generator.get_state(), steps=average.steps, rows=average.rows,
                 average=average.average.weight.detach(),
                 **{f"column {k}": torch.tensor(v) for k, v in learn.history().items()})
    return {**learn.model.state_dict(), **loss.state_dict(), **extra}


def same(a, b): return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


OPTIMIZERS = dict(lars={}, adam=dict(optimizer="adam"), fastai=dict(opt_func=Adam))


@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("step", [3, 4, 6])
def test_resumed_as_never_stopped(tmp_path, step, options):
    "In the middle of an epoch, and at its end: the loss and a callback that knows nothing of resuming."
    averages = [Average(0.1), Average(0.1)]
    whole = quiet(learner(loss=Bank(), **options), 3, cbs=[averages[0]])
    saving = dict(folder=tmp_path, every_steps=1)
    with pytest.raises(KeyboardInterrupt):
        quiet(learner(loss=Bank(), **options), 3,
              cbs=[Average(0.1), Stop(step), CheckpointCallback(**saving)])
    again = learner(loss=Bank(), **options)
    quiet(again, 3, cbs=[averages[1], CheckpointCallback(resume=True, **saving)])
    assert again.loss_func.seen == averages[1].steps == 12
    first, second = map(all_of, (whole, again), averages)
    assert first.keys() == second.keys()
    assert [name for name in first if not same(first[name], second[name])] == []


@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_temperature_is_learned(options):
    learn = learner(loss=Bank(), **options)
    quiet(learn, 1)
    assert learn.loss_func.log_temperature.item() != -1


def test_a_search_for_a_learning_rate_leaves_no_trace():
    from fastai.callback.schedule import lr_find  # noqa: F401, adds `lr_find` to Learner
    learn = learner(loss=Bank())
    before = {k: v.clone() for k, v in learn.loss_func.state_dict().items()}
    with learn.no_bar(): learn.lr_find(num_it=10, show_plot=False)
    assert all(torch.equal(before[k], v) for k, v in learn.loss_func.state_dict().items())
    assert learn.loss_func.place == 0 and not learn.loss_func.plain.any()


def test_a_parameter_that_nobody_trains_is_refused():
    "An optimiser that was made by hand, and a loss that came later."
    learn = learner()
    learn.opt_func = OptimWrapper(opt=torch.optim.SGD(learn.model.parameters(), 0.1))
    learn.loss_func = Bank()
    with pytest.raises(ValueError, match="does not train log_temperature of the loss: set learn.opt"):
        quiet(learn, 1)
    learn.loss_func.log_temperature.requires_grad_(False)
    quiet(learn, 1)


def test_early_stopping_counts_on(tmp_path):
    "Callbacks of fastai: three epochs without a better value, not three in each life."
    def stopping(): return EarlyStoppingCallback("valid_loss", min_delta=100.0, patience=3)
    def saving(): return CheckpointCallback(tmp_path, every_steps=1, resume=True)
    whole = quiet(learner(), 8, cbs=[stopping()])
    with pytest.raises(KeyboardInterrupt): quiet(learner(), 8, cbs=[stopping(), saving(), Stop(10)])
    again = quiet(learner(), 8, cbs=[stopping(), saving()])
    assert len(whole.recorder.values) == len(again.recorder.values) == 4


class Opens(Callback):
    "Holds something that no checkpoint can hold."
    def before_batch(self): self.handle = lambda: None


def test_what_cannot_be_kept_is_named_once(tmp_path):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet(learner(), 1, cbs=[Opens(), CheckpointCallback(tmp_path, every_steps=1)])
    lines = [str(w.message) for w in seen if "a resumed run will lose" in str(w.message)]
    assert lines == ["a resumed run will lose 'handle' of Opens, a function: give the class "
                     "state_dict and load_state_dict"]


class Fickle(Callback):
    "Has a state, or not."
    def state_dict(self): return {}
    def load_state_dict(self, state): pass


def test_a_callback_that_the_checkpoint_does_not_know(tmp_path):
    quiet(learner(), 1, checkpoints=tmp_path)
    with pytest.raises(ValueError, match="holds no state of Fickle"):
        quiet(learner(), 1, cbs=[Fickle()], checkpoints=tmp_path, resume=True)


class Shifted(nn.Module):
    "A loss with one parameter, whose name is given."

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.register_parameter(name, nn.Parameter(torch.zeros(1)))

    def __repr__(self): return "Shifted"
    def forward(self, out, *labels): return NTXent()(out) + getattr(self, self.name).square().sum()


def test_another_loss_is_refused(tmp_path):
    quiet(learner(loss=Shifted("a")), 1, checkpoints=tmp_path)
    with pytest.raises(ValueError, match=r"other parts of the loss \(a\) than this loss has \(b\)"):
        quiet(learner(loss=Shifted("b")), 1, checkpoints=tmp_path, resume=True)


def test_a_learned_temperature_of_nt_xent(tmp_path):
    "Saved with the encoder as a number, and no reason to refuse to resume."
    def own():
        loss = NTXent(0.5)
        loss.temperature = nn.Parameter(torch.tensor(0.5))
        return loss
    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        quiet(learner(loss=own()), 2, cbs=[Stop(5)], checkpoints=state)
    again = quiet(learner(loss=own()), 2, checkpoints=state, resume=True)
    whole = quiet(learner(loss=own()), 2)
    assert again.loss_func.temperature.item() == whole.loss_func.temperature.item() != 0.5
    saved = load_encoder(again.save_encoder(tmp_path / "e.safetensors"))
    assert saved.metadata["temperature"] == again.loss_func.temperature.item()


class Note(Callback):
    "Gradients of the loss's parameter, in the order of the steps."
    order = 90
    def __init__(self): self.grads = []
    def after_backward(self):
        self.grads.append(next(self.loss_func.parameters()).grad.item())


def gradients_and_end() -> tuple:
    "Of the loss's parameter; what became of it, and of the bank."
    torch.manual_seed(0)
    dls = simclr_dls("digits", n_train=128, n_valid=64, bs=32, seed=0, device="cpu", progress=False)
    loss = Bank()
    loss.log_temperature.data.add_(rank())  # rank 0 decides
    learn = simclr_learner(dls, width=0.0625, loss=loss)
    learn.views.two_views = lambda x: torch.cat([x, x.flip(3)]).float() / 255
    note = Note()
    quiet(learn, 1, cbs=[note])
    return note.grads, loss.log_temperature.item(), loss.bank.sum().item()


def test_two_processes_agree_with_one():
    "On the gradients of the loss's parameter, and with each other to the end."
    one, two = (launch(gradients_and_end, processes=n) for n in (1, 2))
    assert two[0] == two[1]
    assert two[0][0] == pytest.approx(one[0][0], rel=1e-3, abs=1e-5)  # sums in another order
    assert two[0][1] == pytest.approx(one[0][1], rel=1e-3)
