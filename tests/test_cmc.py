"""CMC: the authors' numbers, colours of scikit-image, processes, killed runs.

`golden/comparators.json` holds values of the authors' loss and memory, and of scikit-image's
conversions; everything here is float64.
"""
import pytest
import torch
from torch import Tensor

from comparators import GOLDEN, approx, candidates, hash_t, same, unit
from processes import run
from simclr_nb.data import simclr_dls
from simclr_nb.loss.memory import bank_logits
from simclr_nb.methods.cmc import CMC, CMCLoss, cmc_learner
from simclr_nb.model.encoder import load_encoder
from simclr_nb.model.head import Projection
from simclr_nb.model.lab import LabEncoder
from simclr_nb.views.color import ColorJitter, RandomGrayscale
from simclr_nb.views.crop import RandomResizedCrop
from simclr_nb.views.lab import COLOR_SPACES, rgb_to_lab, rgb_to_ydbdr, split_colors
from simclr_nb.views.policy import Policy
from test_instdisc import killed_runs_end_alike
from test_parallel import Rounded, close

CASES = ["cmc_softmax", "cmc_nce"]


def model_of(case: dict) -> CMC:
    "A model with the case's banks."
    i = case["inputs"]
    encoder = LabEncoder("resnet18", 1 / 8, "cifar")
    model = CMC(encoder, i["n_data"], i["dim"], i["momentum"]).double()
    for k, memory in enumerate(model.memories):
        memory.rows.copy_(unit(hash_t((i["n_data"], i["dim"]), i["c"] + 2 + k)))
        memory.images = torch.tensor(i["y"])
    return model


def losses_of(case: dict, memories) -> tuple[Tensor, Tensor, list]:
    "Loss, gradient, unit vectors."
    i = case["inputs"]
    halves = [unit(hash_t((i["batch"], i["dim"]), i["c"] + k)) for k in (0, 1)]
    z = torch.cat(halves, 1).requires_grad_()
    kind = "softmax" if i["softmax"] else "nce"
    loss = CMCLoss(memories, i["T"], i["K"], kind)
    index = candidates(torch.tensor(i["y"]), i["idx"])
    mean = loss.losses(Projection(z, z), index).mean()
    (gradient,) = torch.autograd.grad(mean, z)
    return mean, gradient, halves


@pytest.mark.parametrize("name", CASES)
def test_loss_and_banks_of_the_authors(name):
    case = GOLDEN[name]
    i = case["inputs"]
    model = model_of(case)
    index = candidates(torch.tensor(i["y"]), i["idx"])
    mean, gradient, (light, color) = losses_of(case, model.memories)
    of_light, of_color = model.memories
    pairs = (light, of_color), (color, of_light)
    scores = [bank_logits(v, bank.rows, i["T"], index) for v, bank in pairs]
    if not i["softmax"]:
        z = [of_color.normalizer, of_light.normalizer]  # of the scores of lightness, and of colours
        assert [v.item() for v in z] == approx(case["Z"])
        scores = [s.exp() / v for s, v in zip(scores, z)]
    same(scores[0], case["out_l"])
    same(scores[1], case["out_ab"])
    assert mean.item() == approx(case["loss_l"] + case["loss_ab"])
    same(gradient.chunk(2, 1)[0], case["grad_l"])
    same(gradient.chunk(2, 1)[1], case["grad_ab"])
    model.remember(Projection(light, torch.cat([light, color], 1)))
    same(of_light.rows[i["y"]], case["memory_l_rows_y"])
    same(of_color.rows[i["y"]], case["memory_ab_rows_y"])


@pytest.mark.parametrize("name", CASES)
def test_swapped_banks_are_not_the_authors(name):
    "So the test above can fail: each view against its own memory is another loss."
    case = GOLDEN[name]
    swapped = torch.nn.ModuleList(reversed(model_of(case).memories))
    mean, _, _ = losses_of(case, swapped)
    assert abs(mean.item() - case["loss_l"] - case["loss_ab"]) > 0.1


def test_colours_of_scikit_image():
    "Seven colours in two spaces, as they are and as CMC normalises them."
    case = GOLDEN["lab"]
    rgb = torch.tensor(case["rgb"], dtype=torch.float64)[:, :, None, None] / 255
    assert COLOR_SPACES["lab"].mean == tuple(case["mean"])
    assert COLOR_SPACES["lab"].std == tuple(case["std"])
    for convert, name in ((rgb_to_lab, "lab"), (rgb_to_ydbdr, "ydbdr")):
        expected = torch.tensor(case[name], dtype=torch.float64)
        assert (convert(rgb)[..., 0, 0] - expected).abs().max() < 1e-10
    for space, name in (("lab", "normalised"), ("ydbdr", "ydbdr_normalised")):
        found = torch.cat(split_colors(rgb, space), 1)[..., 0, 0]
        expected = torch.tensor(case[name], dtype=torch.float64)
        assert (found - expected).abs().max() < 1e-10


def colored(**options):
    "Digits in orange on blue."
    dls = simclr_dls("digits", seed=0, device="cpu", progress=False, **options)
    paper, pen = (torch.tensor(c).view(3, 1, 1) for c in ((0.1, 0.2, 0.5), (1.0, 0.7, 0.2)))
    for loader in dls:
        ink = loader.dataset.images.float() / 255
        loader.dataset.images = (255 * torch.lerp(paper, pen, ink)).round().byte()
    return dls


def small(**options):
    torch.manual_seed(0)
    dls = colored(bs=16, n_train=64, n_valid=32)
    return cmc_learner(dls, width=0.125, temperature=0.1, precision="fp32", **options)


def learner_in_processes(rank: int, world: int) -> dict:
    learn = small(cbs=[Rounded()])
    learn.model.double()
    for memory in learn.model.memories: memory.rows.add_(rank)  # rank 0 decides
    learn.model.encoder.register_forward_pre_hook(lambda m, x: x[0].double())
    learn.views.two_views = lambda x: x.double() / 255
    learn.probe._start(torch.empty(0, learn.model.encoder.out_dim))  # equal in all runs
    with learn.no_bar(), learn.no_logging(): learn.pretrain(2, lr=0.1)
    columns = {k: v for k, v in learn.history().items() if k != "valid_loss"}
    history = {f"history {k}": torch.tensor(v) for k, v in columns.items()}
    weights = {k: v for k, v in learn.model.state_dict().items() if v.is_floating_point()}
    return {**weights, **history}


def test_learner_is_that_of_one_process(tmp_path):
    "Weights, running statistics, both banks, losses, accuracies, on both ranks."
    expected = run(learner_in_processes, 1, tmp_path / "one")[0]
    assert {"memories.0.rows", "memories.1.rows"} < expected.keys()
    for found in run(learner_in_processes, 2, tmp_path / "two"):
        close(found, expected)
        for bank in ("memories.0.rows", "memories.1.rows"):
            assert (found[bank] - expected[bank]).abs().max() < 1e-6


def test_a_killed_run_ends_alike(tmp_path):
    killed_runs_end_alike("cmc", [5], tmp_path)


def test_a_saved_encoder_is_both_halves(tmp_path):
    learn = small()
    with learn.no_bar(), learn.no_logging(): learn.pretrain(1)
    encoder = load_encoder(learn.save_encoder(tmp_path / "cmc.safetensors"))
    x = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        h = encoder(x)
        light, color = split_colors(x)
        ours = learn.model.encoder.eval()
        assert torch.allclose(h, ours(x), atol=1e-5) and h.shape[1] == 2 * ours.light.out_dim
        assert torch.allclose(h, torch.cat([ours.light(light), ours.color(color)], 1), atol=1e-6)


def test_the_second_view_is_never_empty():
    "Colour drop is refused, alone or shared, and so are grey images; jitter before Lab is not."
    crop = RandomResizedCrop(16)
    dls = colored(bs=16, n_train=32, n_valid=32)
    gray = RandomGrayscale()
    for policy in (Policy("mine", [crop, gray]), Policy("mine", [crop], [gray])):
        with pytest.raises(ValueError, match="the mine policy drops colours"):
            cmc_learner(dls, width=0.125, policy=policy)
    grey = simclr_dls("digits", bs=16, n_train=32, n_valid=32, device="cpu", progress=False)
    with pytest.raises(ValueError, match="the images are grey"): cmc_learner(grey, width=0.125)
    learn = cmc_learner(dls, width=0.125, policy=Policy("mine", [crop, ColorJitter()]))
    assert "colour jitter" in repr(learn.views.two_views)
    assert "colour" not in repr(cmc_learner(dls, width=0.125).views.two_views)
