"Benchmarks start, and what they state agrees with the card of their last run."
import ast
import importlib
import json
import re
import runpy
import sys
from pathlib import Path
from statistics import median

import pytest
import torch

from simclr_nb.model.encoder import create_encoder
from simclr_nb.loss.contrastive import nt_xent

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPTS = [p for p in sorted(BENCHMARKS.glob("*.py")) if "\ndef main(" in p.read_text("utf-8")]
NAMES = [path.stem for path in SCRIPTS]
README, RESULTS = ((BENCHMARKS / f"{n}.md").read_text("utf-8") for n in ("README", "RESULTS"))
PINS = dict(re.findall(r"^([\w-]+)==(\S+)$", (BENCHMARKS / "requirements.txt").read_text(), re.M))
UNMEASURED = "Unmeasured.\n"


def read(name: str) -> dict:
    "The card of the last run; a test of one that there is not is skipped."
    path = BENCHMARKS / "results" / f"{name}.json"
    if not path.exists(): pytest.skip(f"not measured yet: python benchmarks/{name}.py")
    return json.loads(path.read_text(encoding="utf-8"))


def spreads(part) -> list[dict]:
    "All medians with their runs in a card."
    if isinstance(part, list): return []
    own = [part] if "runs" in part else []
    return own + [s for v in part.values() if isinstance(v, dict) for s in spreads(v)]


def idle(card: dict) -> bool:
    hardware = card["hardware"]
    return card["steady"] and hardware["load_before"] < hardware["cores"] / 2


@pytest.fixture(scope="module")
def loss() -> dict: return read("loss")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_script(path, monkeypatch, capsys):
    "Says how to use it without what it compares with, and has its place in both texts."
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as end: runpy.run_path(str(path), run_name="__main__")
    assert end.value.code == 0 and "--output" in capsys.readouterr().out
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert f"python benchmarks/{path.name}" in README
    assert RESULTS.count(f"<!-- {path.stem} -->\n") == 1 == RESULTS.count(f"<!-- /{path.stem} -->")


@pytest.mark.parametrize("name", NAMES)
def test_results_show_the_card(name, monkeypatch):
    "The table is that of the card, or says that there is none."
    monkeypatch.syspath_prepend(BENCHMARKS)
    make, shown = runpy.run_path(str(BENCHMARKS / f"{name}.py"))["table"], UNMEASURED
    if (BENCHMARKS / "results" / f"{name}.json").exists(): shown = make(read(name))
    assert f"<!-- {name} -->\n{shown}<!-- /{name} -->" in RESULTS


@pytest.mark.parametrize("name", NAMES)
def test_card_is_complete_and_agrees_with_its_runs(name):
    card = read(name)
    assert {"torch", "simclr_nb", "python"} <= set(card["versions"])
    assert {k: v for k, v in PINS.items() if card["versions"].get(k, v) != v} == {}
    assert {"cpu", "cores", "load_before", "gpu"} <= set(card["hardware"])
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT[\d:]+\+00:00", card["date"])
    for spread in spreads(card):
        runs = spread["runs"]
        assert len(runs) == card["settings"].get("repeats", len(runs)) >= 3
        assert [spread[k] for k in ("median", "min", "max")] == [median(runs), min(runs), max(runs)]


def test_augment_agrees_with_itself():
    card = read("augment")
    assert dict(data="real", workers=2).items() <= card["settings"].items()
    assert set(card["sizes"]) == {"32", "224"}
    for size, chance in {"32": 0.03, "224": 0.08}.items():  # 512 images in a batch, and 64
        found = card["sizes"][size]
        speeds, pixels = found["speeds"], found["pixels"]
        assert set(speeds) == set(pixels)
        for name, ratio in found["ratios"].items():
            assert ratio == round(speeds[name]["median"] / speeds["lightly"]["median"], 2)
            for k in ("mean", "std"):  # of all pixels: the same work, but for rounding and chance
                assert pixels[name][k] == pytest.approx(pixels["lightly"][k], abs=chance)


def test_augment_is_ahead_of_lightly():
    card = read("augment")
    assert idle(card), "a busy machine"
    ratios = card["sizes"]["32"]["ratios"]
    assert ratios["eager"] >= 6 and ratios["ours"] >= 12


def test_photos_are_ahead_of_lightly():
    card = read("photos")
    assert idle(card), "a busy machine"
    theirs = card["speeds"]["lightly"]["median"]
    for name, ratio in card["ratios"].items():
        assert ratio == round(card["speeds"][name]["median"] / theirs, 2)
    assert card["settings"]["size"] == 224 and card["ratios"]["ours"] >= 1.5


def test_embedding_is_ahead_of_lightlys_command():
    card = read("embed")
    assert idle(card), "a busy machine"
    speeds = card["speeds"]
    for name, ratio in card["ratios"].items():
        assert ratio == round(speeds[name]["median"] / speeds["command"]["median"], 2)
    assert card["settings"]["images"] == 20_000 and card["largest_difference"] < 1e-4
    assert card["ratios"]["csv"] >= 1.5 and card["ratios"]["npy"] >= 1.5


LOSSES = {"ours", "dense", "in_place", "lightly", "pytorch_metric_learning"}


def test_loss_card_is_complete(loss):
    assert {"torch", "lightly", "pytorch-metric-learning", "simclr_nb", "python"} == set(
        loss["versions"])
    settings = "images small large dim repeats threads temperature device seed".split()
    assert set(settings) == set(loss["settings"])
    expected = dict(images=4096, small=128, large=32_768, dim=128, device="cpu", temperature=0.5)
    assert expected.items() <= loss["settings"].items(), "not what acceptance asks for"
    assert set(loss["small_losses"]) == LOSSES
    assert set(loss["losses"]) == LOSSES - {"pytorch_metric_learning"}
    assert loss["agreement"]["tolerance"]["float64"] <= 1e-10


def test_loss_card_agrees_with_itself(loss):
    ours, roof = loss["losses"]["ours"], loss["limit"]
    for name, ratio in loss["ratios"].items():
        other = loss["losses"][name]
        assert ratio["time"] == round(other["median"] / ours["median"], 2)
        assert ratio["time_worst"] == round(other["min"] / ours["max"], 2)
        assert ratio["memory"] == round(other["peak_mib"] / ours["peak_mib"], 2)
    assert roof["flop"] == 4 * (2 * loss["settings"]["images"])**2 * loss["settings"]["dim"]
    assert loss["share_of_limit"] == round(roof["seconds"] / ours["median"], 3) <= 1


def test_tiled_loss_is_fast_and_small(loss):
    assert idle(loss), "a busy machine"
    lightly, in_place = loss["ratios"]["lightly"], loss["ratios"]["in_place"]
    assert lightly["time"] >= 6 and lightly["memory"] >= 12
    assert in_place["time"] >= 3
    assert loss["large"]["images"] == 32_768 and loss["large"]["peak_mib"] <= 1024


def test_knn_is_as_fast_and_bounded():
    card = read("knn")
    assert idle(card), "a busy machine"
    assert "lightly" in card["versions"] and card["agreement"] >= 0.999
    assert card["ratio"] == round(card["lightly"]["median"] / card["ours"]["median"], 2)
    assert card["ratio"] >= 0.9 and card["ours"]["peak_mib"] < card["lightly"]["peak_mib"] / 2
    large, settings = card["large"], card["settings"]
    assert large["bank"] == 1_000_000 and large["peak_mib"] < 1024
    assert large["peak_mib"] < 0.2 * 4 * large["bank"] * settings["queries"] / 2**20  # of one matrix


@pytest.fixture(scope="module")
def logistic() -> dict: return read("logistic")


PEERS = {"float32", "float32_warm", "float64", "float64_warm"}


def test_logistic_card_is_complete(logistic):
    assert {"torch", "scikit-learn", "scipy", "numpy", "simclr_nb", "python"} == set(
        logistic["versions"])
    expected = dict(images=10_000, columns=512, classes=10, strengths=45, data="cifar10", tol=1e-4,
                    processes=logistic["hardware"]["cores"])
    assert expected.items() <= logistic["settings"].items(), "not what acceptance asks for"
    assert set(logistic["solvers"]) == {"ours", *PEERS}


def test_logistic_card_agrees_with_itself(logistic):
    solvers, tol = logistic["solvers"], logistic["settings"]["tol"]
    reached = {k for k in PEERS if solvers[k]["largest_gradient"] <= 1.05 * tol}
    assert set(logistic["matched"]) == reached != set()
    ours, best = solvers["ours"], solvers[logistic["best_peer"]]
    assert best["median"] == min(solvers[k]["median"] for k in reached)
    assert logistic["ratio"] == round(best["median"] / ours["median"], 2)
    assert logistic["ratio_worst"] == round(best["min"] / ours["max"], 2)
    fastest = min(solvers[k]["median"] for k in PEERS)
    assert logistic["ratio_fastest"] == round(fastest / ours["median"], 2)


def test_logistic_is_twice_as_fast_at_matched_convergence(logistic):
    assert idle(logistic), "a busy machine"
    solvers, tol = logistic["solvers"], logistic["settings"]["tol"]
    assert solvers["ours"]["largest_gradient"] <= 1.05 * tol
    assert all(solvers[k]["agreement"] >= 0.97 for k in logistic["matched"])  # least of 45
    assert logistic["ratio"] >= 2


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("peers")


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_peers_have_the_same_network(peers, arch):
    "Layer for layer, by name and shape; and with the same weights the same h."
    ours = create_encoder(arch, 0.25, "cifar").eval()
    theirs, dim = peers.torchvision_encoder(arch, 0.25)
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert dim == ours.out_dim
    torch.testing.assert_close(theirs.eval()(x), ours(x))


def test_peers_have_the_same_loss(peers):
    z = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(peers.plain_loss(z, 0.3), nt_xent(z, 0.3))


def test_decode_agrees_with_itself():
    card = read("decode")
    assert card["settings"]["folder"] == "imagenet_sample" and card["settings"]["size"] == 224
    for n, ways in card["speeds"].items():
        roof = max(ways["pillow"]["median"], ways["torchvision"]["median"])
        assert card["limit"][n] == roof
        assert card["share_of_limit"][n] == round(ways["two_crops"]["median"] / roof, 3)


def test_step_agrees_with_itself():
    for network in read("step")["networks"].values():
        steps = network["steps"]
        for name, said in network["compared"].items():
            assert said["to_eager"] == round(
                steps["fp32 contiguous eager"]["median"] / steps[name]["median"], 2)
            assert 0 < said["share_of_peak"] <= 1


def test_resnet50_step_is_faster_than_plain_pytorch():
    "Than float32, in the precision in which this processor multiplies faster, as `auto` takes it."
    card = read("step")
    assert idle(card) and card["settings"]["width"] == 1 and card["settings"]["repeats"] >= 5
    peak, said = card["peak_gflop_per_s"], card["networks"]["resnet50"]["compared"]
    precision = "bf16" if peak["bf16"] > 1.2 * peak["fp32"] else "fp32"
    assert said[f"{precision} channels_last compiled"]["to_eager"] >= 1.8


def test_end_to_end_agrees_with_itself():
    networks = read("end_to_end")["networks"]
    assert set(networks) == {"imagenet", "cifar"}
    for found in networks.values():
        loops = found["loops"]
        assert set(loops) == {"lightly", "bare", "pretrain", "compiled", "auto"}
        for name, ratio in found["ratios"].items():
            theirs = loops["lightly"]["median"]
            assert ratio["median"] == round(loops[name]["median"] / theirs, 2)
        pairs = zip(loops["bare"]["runs"], loops["pretrain"]["runs"])
        assert found["overhead"]["share"] == round(median(a / b for a, b in pairs) - 1, 4)


def test_end_to_end_is_ahead_and_fastai_costs_little():
    "With the documented stem; with the other, products alone leave room for less."
    card = read("end_to_end")
    assert idle(card) and card["settings"]["repeats"] >= 5
    documented, small = card["networks"]["imagenet"], card["networks"]["cifar"]
    assert min(documented["ratios"][name]["median"] for name in ("bare", "pretrain")) >= 1.4
    assert max(found["overhead"]["share"] for found in (documented, small)) <= 0.05
    assert small["ratios"]["pretrain"]["median"] > 1 and small["share_of_limit"] >= 0.8


def test_import_is_quick_and_memory_that_of_the_images():
    card = read("footprint")
    imports, memory = card["imports"], card["memory"]
    pairs = zip(imports["base"]["runs"], imports["package"]["runs"])
    assert card["extra_seconds"] == round(median(b - a for a, b in pairs), 3) < 3
    assert (card["settings"]["images"], card["settings"]["valid"]) == (50_000, 10_000)
    assert memory["held_ratio"] == round(memory["held_mib"] / memory["images_mib"], 3) <= 1.15


def test_loss_scales():
    card = read("scaling")
    assert idle(card)
    assert [int(n) for n in card["losses"]] == [256 << i for i in range(8)]  # to 32,768
    for n, at in card["losses"].items():
        ours, other = at["losses"]["ours"], at["losses"].get("lightly")
        assert at["share_of_limit"] == round(at["limit_seconds"] / ours["median"], 3)
        if int(n) >= 4096: assert at["share_of_limit"] >= 0.5
        if other: assert at["ratio"]["time"] == round(other["median"] / ours["median"], 2)
        if other and int(n) >= 4096: assert at["ratio"]["time"] >= 8 and at["ratio"]["memory"] >= 12
