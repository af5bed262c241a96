"""No protocol looks at the labels of test images before its final scoring.

Those labels are *sealed*: each is a number that no class has, one for each image. A dispatch mode
follows the sealed values through every copy of them. The first operation that reads them, and
does not merely move them, breaks the seal, and the true labels are filled in. From then on nothing
may be fitted, predicted or chosen: a matrix product, convolution, softmax or argmax after it fails
the test. Work outside PyTorch is not seen here; the second test sees its effect. To add a protocol,
add a line to `PROTOCOLS`.
"""
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from test_frozen import assert_same, state
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from simclr_nb.data import SimCLRDataLoaders, clean_loader, simclr_dls
from simclr_nb.measure.representations import represent
from simclr_nb.model.encoder import create_encoder
from simclr_nb.evaluate.features import Features, encoder_features
from simclr_nb.evaluate.frozen import knn_accuracy, linear_evaluation, logistic_accuracy
from simclr_nb.evaluate.tuning import finetune
from simclr_nb.evaluate.logistic import L2_STRENGTHS
from simclr_nb.evaluate.result import Result

SEALED = 10**12  # above any class; and the row is added
# Operations that move values and do not look at them (names as PyTorch's dispatcher has them)
MOVES = """alias cat clone copy_ detach empty_like expand index index_select lift_fresh
           narrow permute select slice split split_with_sizes squeeze stack _to_copy t transpose
           unbind unsqueeze _unsafe_view view _reshape_alias new_empty pin_memory""".split()
WORK = """mm addmm bmm baddbmm mv dot addmv convolution convolution_backward linear
          _scaled_dot_product_flash_attention_for_cpu _linalg_eigh _softmax _log_softmax argmax
          topk""".split()
ESCAPES = {"numpy", "__array__", "tolist", "__dlpack__"}  # read memory, past the dispatcher
STEP = 3  # strengths of L2 that are left out between two: enough to choose from


class LookedTooEarly(AssertionError):
    "Something was fitted, predicted or chosen after test labels had been read."


class Sealed(TorchDispatchMode):
    "Seals a tensor of labels while it is entered; `reads` lists what has read them."
    def __init__(self, labels: Tensor):
        super().__init__()
        self.labels, self.true, self.reads = labels, labels.clone(), []
        self.escapes = Escapes(self)

    def __enter__(self):
        self.labels.copy_(SEALED + torch.arange(len(self.labels)))
        self.holders = {self.labels.untyped_storage().data_ptr(): self.labels}
        super().__enter__()
        self.escapes.__enter__()
        return self

    def __exit__(self, *error):
        self.escapes.__exit__(*error)
        super().__exit__(*error)
        self.labels.copy_(self.true)

    def is_held(self, x) -> bool:
        "Whether something is a tensor that shares memory with sealed labels."
        return isinstance(x, Tensor) and x.untyped_storage().data_ptr() in self.holders

    def read(self, what: str):
        "Note a read; at the first, fill in the labels wherever they have been moved to."
        if not self.reads:
            for held in self.holders.values():
                sealed = held >= SEALED
                held[sealed] = self.true[(held[sealed] - SEALED).long()].to(held.dtype)
        self.reads.append(what)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        held = any(map(self.is_held, tree_leaves((args, kwargs))))
        if name in WORK and self.reads: raise LookedTooEarly(f"{name} after {self.reads}")
        if held and name not in MOVES: self.read(name)
        out = func(*args, **kwargs)
        if held and name in MOVES: tree_map(self.hold, out)
        return out

    def hold(self, x):
        "Follow a copy; a boolean or a small number could not hold what is sealed."
        if not isinstance(x, Tensor) or not x.numel(): return
        if x.dtype != torch.int64 and not self.reads: self.read(f"copy as {x.dtype}")
        base = x if x._base is None else x._base
        self.holders.setdefault(x.untyped_storage().data_ptr(), base)


class Escapes(TorchFunctionMode):
    "Ways out of PyTorch, which the dispatcher does not see."
    def __init__(self, sealed: Sealed):
        super().__init__()
        self.sealed = sealed

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ESCAPES and self.sealed.is_held(args[0]): self.sealed.read(name)
        return func(*args, **(kwargs or {}))


@dataclass
class Protocol:
    "A way from encoder and data to a result."
    run: Callable[[nn.Module, SimCLRDataLoaders], Result]
    frozen: bool = True  # Whether it leaves the encoder bit-identical


def logistic(encoder, dls, **kwargs) -> Result:
    return logistic_accuracy(encoder_features(encoder, dls), l2=L2_STRENGTHS[::STEP], **kwargs)


def linear(encoder, dls, **kwargs) -> Result:
    return linear_evaluation(encoder, dls, epochs=2, bs=64, progress=False, **kwargs)


def tune(encoder, dls, **kwargs) -> Result:
    "It trains a copy: the encoder itself stays as it was."
    return finetune(encoder, dls, epochs=2, bs=64, progress=False, **kwargs)


PROTOCOLS = {
    "k-NN": Protocol(lambda e, dls: knn_accuracy(encoder_features(e, dls))),
    "logistic": Protocol(logistic),
    "logistic, few labels": Protocol(lambda e, dls: logistic(e, dls, per_class=5, draws=2)),
    "linear": Protocol(lambda e, dls: linear(e, dls, augment=True)),
    "linear, not augmented": Protocol(lambda e, dls: linear(e, dls, augment=False)),
    "linear, few labels": Protocol(lambda e, dls: linear(e, dls, augment=False, per_class=5)),
    "fine-tuning": Protocol(tune),
    "fine-tuning, few labels": Protocol(lambda e, dls: tune(e, dls, per_class=5)),
}
EVERY = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)


@pytest.fixture
def dls():
    "Digits; the labels of test images lie in memory of their own."
    dls = simclr_dls("digits", bs=50, n_train=200, n_valid=100, seed=0)
    dls.valid.dataset.labels = dls.valid.dataset.labels.clone()
    return dls


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return create_encoder("resnet18", 0.125, "cifar", zero_init_last=False)


def evaluate(protocol: Protocol, encoder, dls, seed: int = 1) -> Result:
    torch.manual_seed(seed)
    return protocol.run(encoder, dls)


def decisions(result: Result) -> dict:
    "Facts of a card, without measured times, memory and scores."
    measured = {"seconds", "images_per_second", "peak_memory_mib", "values", "top_5"}
    return {k: v for k, v in result.card.items() if k not in measured}


@EVERY
def test_test_labels_are_sealed_until_the_end(protocol, encoder, dls):
    "With sealed labels the result is the honest one, and nothing is fitted after the seal broke."
    honest = evaluate(protocol, encoder, dls)
    if not protocol.frozen:  # the first run has changed it
        torch.manual_seed(0)
        encoder = create_encoder("resnet18", 0.125, "cifar", zero_init_last=False)
    with Sealed(dls.valid.dataset.labels) as sealed: result = evaluate(protocol, encoder, dls)
    assert sealed.reads, "test labels were never read"
    assert (result.value, result.low, result.high) == (honest.value, honest.low, honest.high)
    assert decisions(result) == decisions(honest)


@EVERY
def test_test_labels_change_the_score_alone(protocol, encoder, dls):
    "Other test labels: the same predictions and the same card; every right answer becomes wrong."
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    first, labels = evaluate(protocol, encoder, dls), dls.valid.dataset.labels
    trained = {k: v.clone() for k, v in encoder.state_dict().items()}
    encoder.load_state_dict(before)
    dls.valid.dataset.labels = (labels + 1) % 10
    second = evaluate(protocol, encoder, dls)
    assert decisions(second) == decisions(first)
    assert second.value != first.value
    if first.correct is not None: assert not (first.correct & second.correct).any()
    for name, value in encoder.state_dict().items(): assert torch.equal(value, trained[name]), name


@EVERY
@pytest.mark.parametrize("training", [True, False])
def test_the_encoder_stays_as_it_was(protocol, training, encoder, dls):
    "Parameters, buffers, gradients, modes and `requires_grad` (more in test_frozen.py)."
    if not protocol.frozen: pytest.skip("trains the encoder, or a copy")
    encoder(torch.rand(8, 3, 16, 16)).square().sum().backward()
    encoder.conv1.weight.requires_grad_(False)
    encoder.train(training)
    before = state(encoder)
    evaluate(protocol, encoder, dls)
    assert_same(state(encoder), before)


# What these tests must see

def peek_at_strength(features: Features) -> Result:
    "Chooses its L2 by accuracy on test images, as is often done."
    tried = [logistic_accuracy(features, l2=[l2]) for l2 in L2_STRENGTHS[::15]]
    return max(tried, key=lambda result: result.value)


def peek_at_epoch(encoder, dls) -> Result:
    "Reports the best of several epochs."
    tried = [linear_evaluation(encoder, dls, epochs=n, progress=False, augment=False)
             for n in (1, 2)]
    return max(tried, key=lambda result: result.value)


def peek_through_numpy(encoder, dls) -> Result:
    features = encoder_features(encoder, dls)
    k = 1 + int(features.y_test.numpy().sum()) % 5
    return knn_accuracy(features, k=k)


def peek_by_list(encoder, dls) -> Result:
    features = encoder_features(encoder, dls)
    return knn_accuracy(features, k=len(set(features.y_test.tolist())))


def transduce(encoder, dls) -> Result:
    "Trains on all labels there are."
    h, y = represent(encoder, clean_loader(dls, 1))
    f = encoder_features(encoder, dls)
    f.h_train, f.y_train = torch.cat([f.h_train, h]), torch.cat([f.y_train, y])
    return knn_accuracy(f)


CHEATS = {
    "strength": lambda e, dls: peek_at_strength(encoder_features(e, dls)), "epoch": peek_at_epoch,
    "numpy": peek_through_numpy, "list": peek_by_list, "transduction": transduce,
}


@pytest.mark.parametrize("cheat", CHEATS.values(), ids=CHEATS)
def test_cheating_is_seen(cheat, encoder, dls):
    with Sealed(dls.valid.dataset.labels), pytest.raises(LookedTooEarly):
        evaluate(Protocol(cheat), encoder, dls)


def test_the_seal_follows_copies():
    "Moved labels are read as what they were; a wrong order would show."
    labels = torch.arange(10) % 4
    true = labels.clone()
    with Sealed(labels) as sealed:
        order = torch.randperm(10)
        moved = torch.cat([labels[order].clone(), labels.view(2, 5)[1]]).to(torch.int64)
        assert not sealed.reads
        equal = moved == torch.cat([true[order], true[5:]])
        assert sealed.reads == ["eq"] and equal.all()
        with pytest.raises(LookedTooEarly): torch.ones(2, 2) @ torch.ones(2, 2)
    assert torch.equal(labels, true)
