"`simclr-evaluate` on weights of other origins: the accuracy that the source's own features give."
import pytest
import torch
import torchvision
from torch import nn

from bundles import golden_bundle, write_bundle
from simclr_nb.cli import convert, evaluate
from simclr_nb.core.store import read_json
from simclr_nb.data import simclr_dls
from simclr_nb.evaluate.features import encoder_features
from simclr_nb.evaluate.frozen import logistic_accuracy
from simclr_nb.learner import simclr_learner
from simclr_nb.model.inputs import evaluating
from test_convert_in import official_arrays

IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    "torchvision's own network, with weights of its own and statistics that it has seen."
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    for _ in range(3): model(torch.rand(16, 3, 32, 32))
    return model.eval()


class Own(nn.Module):
    "A source library's network and its own preparation of pixels, nothing of this package."
    def __init__(self, network: nn.Module, normalise: bool):
        super().__init__()
        self.network, self.normalise = network, normalise

    def forward(self, x):
        if self.normalise: x = (x - IMAGENET[0]) / IMAGENET[1]
        return self.network(x).flatten(1)


class OfficialTF1(nn.Module):
    "The official network in NumPy's layout, written anew from its definition: ResNet-18, CIFAR stem."
    def __init__(self, values: dict):
        super().__init__()
        self.values = {k: torch.from_numpy(v.copy()) for k, v in values.items()}
        self.device_of = nn.Parameter(torch.zeros(1))  # says where images go

    def layer(self, i: int, x, stride: int = 1, relu: bool = True):
        suffix = f"_{i}" if i else ""
        kernel = self.values[f"base_model/conv2d{suffix}/kernel"].permute(3, 2, 0, 1)
        x = nn.functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        bn = {k: self.values[f"base_model/batch_normalization{suffix}/{k}"]
              for k in ("moving_mean", "moving_variance", "gamma", "beta")}
        x = nn.functional.batch_norm(x, *bn.values(), eps=1e-5)
        return x.relu() if relu else x

    def forward(self, x):
        x, i = self.layer(0, x), 1
        for group in range(4):
            for block in range(2):
                stride, shortcut = (2 if group and block == 0 else 1), x
                if block == 0:
                    shortcut = self.layer(i, x, stride, relu=False)
                    i += 1
                inner = self.layer(i + 1, self.layer(i, x, stride), relu=False)
                x, i = (inner + shortcut).relu(), i + 2
        return x.mean((2, 3))


def accuracies(source, own: nn.Module, tmp_path) -> tuple[float, float]:
    "Logistic regression on digits: of the command, and on the source's own features."
    own.out_dim = None
    options = "--data digits --protocol logistic --n-train 600 --n-valid 400".split()
    assert evaluate([str(source), *options, "--out", str(tmp_path / "run")]) == 0
    ours = read_json(tmp_path / "run" / "logistic.json")["value"]
    dls = simclr_dls("digits", None, None, n_train=600, n_valid=400, seed=0)
    theirs = logistic_accuracy(encoder_features(own.eval(), dls, "own")).value
    print(f"{source.name}: simclr-evaluate {ours:.4f}, the source's own features {theirs:.4f}")
    return ours, theirs


def test_a_torchvision_file(resnet, tmp_path):
    torch.save(resnet.state_dict(), tmp_path / "resnet18.pth")
    own = torchvision.models.resnet18(num_classes=10)
    own.load_state_dict(resnet.state_dict())
    own.fc = nn.Identity()
    ours, theirs = accuracies(tmp_path / "resnet18.pth", Own(own, True), tmp_path)
    assert abs(ours - theirs) <= 0.001 and ours > 0.3


def test_a_lightly_file(resnet, tmp_path):
    "The backbone as lightly's tutorials build it: numbered children of torchvision's network."
    backbone = nn.Sequential(*list(resnet.children())[:-1])
    head = nn.Sequential(nn.Linear(512, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16, bias=False))
    state = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    state |= {f"projection_head.layers.{k}": v for k, v in head.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "lightly.ckpt")
    ours, theirs = accuracies(tmp_path / "lightly.ckpt", Own(backbone, True), tmp_path)
    assert abs(ours - theirs) <= 0.001 and ours > 0.3


def test_an_official_file(tmp_path):
    values = dict(official_arrays(dict(depth=18, width=0.25, sk=0.0, cifar=True)))
    (tmp_path / "official").mkdir()
    write_bundle(tmp_path / "official" / "model.ckpt-1", values)
    ours, theirs = accuracies(tmp_path / "official", Own(OfficialTF1(values), False), tmp_path)
    assert abs(ours - theirs) <= 0.001 and ours > 0.3


def test_one_line_for_a_bad_source(tmp_path, capsys):
    (tmp_path / "page.index").write_text("<html>")
    for command, arguments in [(evaluate, [str(tmp_path / "page.index")]),
                               (convert, [str(tmp_path / "page.index"), str(tmp_path / "x")])]:
        with pytest.raises(SystemExit) as stop: command(arguments)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and "web page" in error


def test_dry_run_names_everything(tmp_path, capsys):
    assert convert([str(golden_bundle("tf2_r50_ckpt", tmp_path / "in")), "out", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "TensorFlow 2 checkpoint: arch resnet50, width 0.0625" in told
    assert told.count(" -> encoder.") == 265 and told.count(" -> head.") == 14
    assert told.count(" -> classifier.") == 2 and told.count("a slot of the optimiser") == 169
    assert list(tmp_path.iterdir()) == [tmp_path / "in"]


def test_a_library_network_by_name(tmp_path, monkeypatch):
    "`torchvision/resnet18` means its pretrained weights and their pixels; here none are downloaded."
    from simclr_nb.model import adapt

    asked = {}
    get_model = torchvision.models.get_model
    def without_download(name, weights=None, **options):
        asked.update(name=name, weights=weights)
        return get_model(name, **options)
    monkeypatch.setattr(adapt.torchvision.models, "get_model", without_download)
    options = "--data digits --protocol knn --n-train 200 --n-valid 100".split()
    assert evaluate(["torchvision/resnet18", *options, "--out", str(tmp_path / "run")]) == 0
    assert asked == dict(name="resnet18", weights="DEFAULT")
    with pytest.raises(SystemExit) as stop: evaluate(["torchvision/resnet19", *options])
    assert stop.value.code == 2


def test_a_learner_begins_with_a_foreign_file(resnet, tmp_path):
    "`simclr_learner(init=...)`: same h as the source library's, pixels prepared as there; then it trains."
    backbone = nn.Sequential(*list(resnet.children())[:-1])
    head = nn.Sequential(nn.Linear(512, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(),
                         nn.Linear(64, 16, bias=False))
    state = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    state |= {f"projection_head.layers.{k}": v for k, v in head.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "lightly.ckpt")
    dls = simclr_dls("digits", bs=32, n_train=64, n_valid=32, seed=0)
    learn = simclr_learner(dls, init=tmp_path / "lightly.ckpt", precision="fp32")
    x = torch.rand(4, 3, 32, 32)
    with evaluating(learn.model), torch.no_grad():
        theirs = backbone(((x - IMAGENET[0]) / IMAGENET[1])).flatten(1)
        torch.testing.assert_close(learn.model.encoder(x), theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(learn.model.head(theirs), head.eval()(theirs), rtol=1e-4, atol=1e-4)
    before = [p.detach().clone() for p in learn.model.parameters()]
    with learn.no_bar(), learn.no_logging(): learn.pretrain(1)
    after = list(learn.model.parameters())
    assert len(before) == 60 + 4 and not any(torch.equal(b, a) for b, a in zip(before, after, strict=True))
    assert simclr_learner(dls, init=tmp_path / "lightly.ckpt", head="linear").model.head is not learn.model.head
    with pytest.raises(ValueError, match="decide the architecture: leave out arch, got 'resnet18'"):
        simclr_learner(dls, "resnet18", init=tmp_path / "lightly.ckpt")
    with pytest.raises(FileNotFoundError, match="nowhere"): simclr_learner(dls, init=tmp_path / "nowhere")
