"Encoders for other libraries: their own loaders, in fresh processes without this package, give the same h."
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from bundles import golden_bundle
from simclr_nb.convert import export_encoder, import_weights
from simclr_nb.convert.export import FORMATS
from simclr_nb.model.encoder import create_encoder, load_encoder
from simclr_nb.model.normalized import normalize_input

SIDES = (64, 75)  # even and odd
LOADERS = dict(
    torchvision="""
import torchvision
model = torchvision.models.resnet50()
found = model.load_state_dict(torch.load(PATH, weights_only=True), strict=False)
assert found.missing_keys == ["fc.weight", "fc.bias"] and not found.unexpected_keys
model.fc = torch.nn.Identity()
h = lambda x, side: model.eval()(x)
""",
    timm="""
import timm
model = timm.create_model(f"local-dir:{PATH}", pretrained=True, num_classes=0).eval()
assert tuple(model.pretrained_cfg["mean"]) == (0, 0, 0)
h = lambda x, side: model(x)
""",
    huggingface="""
import transformers
model = transformers.AutoModel.from_pretrained(PATH).eval()
h = lambda x, side: model(pixel_values=x).pooler_output.flatten(1)
pixels = transformers.AutoImageProcessor.from_pretrained(PATH)
assert list(pixels.image_mean) == [0, 0, 0] and list(pixels.image_std) == [1, 1, 1]
""",
    onnx="""
import onnxruntime
def h(x, side):
    session = onnxruntime.InferenceSession(f"{PATH}{side}.onnx")
    return torch.from_numpy(session.run(["h"], {"images": x.numpy()})[0])
""",
    pytorch="""
import sys
sys.path.insert(0, PATH)
from model import load_plain
h = lambda x, side: load_plain()(x)
""",
)
PACKAGES = dict(timm=["timm"], huggingface=["transformers"], onnx=["onnx", "onnxscript", "onnxruntime"])


def trained(*args, **kwargs) -> nn.Module:
    "An encoder whose BatchNorm has seen images."
    torch.manual_seed(0)
    encoder = create_encoder(*args, zero_init_last=False, **kwargs)
    for _ in range(2): encoder(torch.rand(4, 3, 64, 64))
    return encoder.eval()


@pytest.fixture(scope="module")
def encoder(): return trained("resnet50")


def elsewhere(loader: str, path, folder, images: list) -> list:
    "h of batches of images in a process that cannot import this package."
    torch.save(images, folder / "images.pt")
    code = (f"import torch\nPATH = {str(path)!r}\n{loader}\nimport sys\n"
            "with torch.no_grad(): out = [h(x, x.shape[-1]).clone() for x in torch.load('images.pt')]\n"
            "assert 'simclr_nb' not in sys.modules\ntorch.save(out, 'h.pt')")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
                          timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(folder / "h.pt")


@pytest.mark.parametrize("format", LOADERS)
def test_the_same_h(encoder, tmp_path, format):
    for package in PACKAGES.get(format, []): pytest.importorskip(package)
    images = [torch.rand(2, 3, side, side) for side in SIDES]
    path = tmp_path / "out"
    if format == "onnx":
        for side in SIDES: export_encoder(encoder, tmp_path / f"out{side}.onnx", format, size=side)
    else: export_encoder(encoder, path, format)
    for side, x, theirs in zip(SIDES, images, elsewhere(LOADERS[format], path, tmp_path, images)):
        with torch.no_grad(): ours = encoder(x)
        difference = ((ours - theirs).abs().max() / ours.abs().max()).item()
        print(format, side, f"{difference:.1e}")
        assert difference < 1e-5


@pytest.mark.parametrize("format", ["torchvision", "timm", "huggingface", "safetensors"])
def test_round_trip_is_bit_identical(encoder, tmp_path, format):
    path = export_encoder(encoder, tmp_path / f"out.{format}", format)
    back = import_weights(path, **(dict(pixels="none") if format == "torchvision" else {}))
    for (k, a), (l, b) in zip(encoder.state_dict().items(), back.encoder.state_dict().items(), strict=True):
        assert k == l and torch.equal(a, b), k


def test_hugging_face_takes_any_width(tmp_path):
    pytest.importorskip("transformers")
    narrow = trained("resnet50", width=0.25)
    export_encoder(narrow, tmp_path / "out", "huggingface")
    x = torch.rand(2, 3, 53, 64)
    (theirs,) = elsewhere(LOADERS["huggingface"], tmp_path / "out", tmp_path, [x])
    with torch.no_grad(): ours = narrow(x)
    assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()


@pytest.mark.parametrize("name", ["tf1_r50", "tf1_r50_sk"])
@pytest.mark.parametrize("format", ["onnx", "pytorch"])
def test_official_weights_leave_exactly(tmp_path, name, format):
    "An encoder that the libraries have no place for goes out by ONNX or plain PyTorch."
    for package in PACKAGES.get(format, []): pytest.importorskip(package)
    official = import_weights(golden_bundle(name, tmp_path / "in")).encoder
    images = [torch.rand(3, 3, side, side) for side in SIDES]
    if format == "onnx":
        for side in SIDES: export_encoder(official, tmp_path / f"out{side}.onnx", "onnx", size=side)
    else: export_encoder(official, tmp_path / "out", format)
    found = elsewhere(LOADERS[format], tmp_path / "out", tmp_path, images)
    for x, theirs in zip(images, found):
        with torch.no_grad(): ours = official(x)
        assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()


@pytest.mark.parametrize("library", ["torchvision", "timm", "huggingface"])
@pytest.mark.parametrize("options, why", [
    (dict(pool_padding="same"), "inexact=True"), (dict(stem="cifar"), "3x3 pixels"),
    (dict(shortcut="projection"), "a projection in the first group"),
    (dict(arch="resnet50", sk_ratio=0.0625), "selective kernels"),
    (dict(width=0.5), "wide elsewhere"), (dict(arch="resnet200"), "200 layers"),
])
def test_refusals(tmp_path, library, options, why):
    with torch.device("meta"): other = create_encoder(**{"arch": "resnet18", **options})
    allowed = {"width": ["huggingface"], "200 layers": ["timm", "huggingface"]}
    if why == "wide elsewhere" and library in allowed["width"]: return
    if why == "200 layers" and library in allowed["200 layers"]: return
    with pytest.raises(ValueError) as error: export_encoder(other, tmp_path / "x", library)
    assert why in str(error.value) and "format='onnx'" in str(error.value)
    assert library in str(error.value) and list(tmp_path.iterdir()) == []


def test_inexact_is_measured(tmp_path):
    encoder = trained("resnet18", pool_padding="same")
    with pytest.warns(UserWarning, match=r"differs by \d+\.\d%"):
        export_encoder(encoder, tmp_path / "x.pth", inexact=True)


def test_every_format_takes_a_normalised_encoder(tmp_path):
    encoder = normalize_input(trained("resnet18"), (0.5, 0.4, 0.3), (0.2, 0.2, 0.3)).eval()
    for format in FORMATS:
        if format == "onnx":
            for package in PACKAGES["onnx"]: pytest.importorskip(package)
        path = export_encoder(encoder, tmp_path / f"out.{format}", format, size=64)
        assert path.exists()
    back = load_encoder(tmp_path / "out.safetensors")
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad(): assert torch.equal(back(x), encoder(x))
