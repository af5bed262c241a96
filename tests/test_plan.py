"The cost model against counts on real tensors, measured memory and measured steps; the command."
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from processes import GIVE_BACK
from simclr_nb.cli import config_parser
from simclr_nb.plan.cost import LINKS, communication, count_encoder, count_step, memory_parts
from simclr_nb.model.encoder import create_encoder
from simclr_nb.model.resnet import encoder_stem
from simclr_nb.model.head import SimCLR, projection_head
from simclr_nb.plan.devices import DEVICES, measure_device
from simclr_nb.plan.plan import PlanConfig, op_seconds, run_plan

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
DATA_SHEET = [name for name in DEVICES if "bf16" in DEVICES[name].peak]


def simclr(arch: str = "resnet18", width: float = 0.125, size: int = 32) -> SimCLR:
    encoder = create_encoder(arch, width, encoder_stem(size))
    return SimCLR(encoder, projection_head(encoder.out_dim))


# Counts

@pytest.mark.parametrize("arch, size", [("resnet18", 32), ("resnet50", 32), ("resnet18", 96)])
def test_counts_are_those_of_real_tensors(arch, size):
    "Operations and saved bytes on a processor; the small rest are statistics of BatchNorm."
    model, kept, views = simclr(arch, size=size), {}, 16
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    x = torch.rand(views, 3, size, size)
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t): z = model(x).z
        forward = counter.get_total_flops()
        z.backward(torch.ones_like(z))
    count = count_step(model, size)
    assert count.flops(False) * views == forward
    assert count.flops() * views == counter.get_total_flops()
    saved = sum(kept.values()) - kept[x.untyped_storage().data_ptr()]
    assert count.saved * views == pytest.approx(saved, rel=0.01)
    assert count.saved <= count.peak < 1.2 * count.saved


def test_counting_leaves_the_model_alone():
    model = simclr()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    count_step(model, 32, "bf16")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert next(model.parameters()).dtype == torch.float32 and model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_shared_memory_counts_once():
    class Twice(nn.Module):
        def forward(self, x): return (x.exp() ** 2).mean((2, 3))
    model = SimCLR(nn.Sequential(nn.Conv2d(3, 5, 1), Twice()), nn.Identity())
    assert count_step(model, 8).saved == 5 * 64 * 4  # exp keeps its output, the square its input


# Memory

@settings(max_examples=30, deadline=None, derandomize=True)
@given(n=st.integers(1, 5000), micro=st.integers(1, 5000), devices=st.sampled_from([1, 2, 8]))
def test_memory_grows_with_the_batch_and_shrinks_with_micro_batches(n, micro, devices):
    count = count_encoder("resnet18", 0.25, 32)
    def total(*args): return sum(memory_parts(count, 32, *args, devices=devices).values())
    assert total(n) < total(n + 1)
    kept, all_kept = (memory_parts(count, 32, n, m)["activations"] for m in (micro, None))
    assert kept <= all_kept
    assert memory_parts(count, 32, n, n) == memory_parts(count, 32, n)
    assert min(memory_parts(count, 32, n, micro).values()) >= 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory as Linux tells")
@pytest.mark.parametrize("name", ["small", "photos"])
def test_memory_of_a_step(name):
    "Predicted, and held by a process of its own with a C library that gives back what is freed."
    command = [sys.executable, BENCHMARKS / "plan.py", f"--peak={name}", "--threads=1"]
    env = os.environ | GIVE_BACK
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=env)
    assert done.returncode == 0, done.stderr
    held = json.loads(done.stdout.splitlines()[-1])["peak_mib"] * 2**20
    configs = dict(small=("resnet18", 0.25, 32, 256, None), photos=("resnet18", 0.5, 96, 256, 64))
    arch, width, size, n, micro = configs[name]
    count = count_encoder(arch, width, size, "bf16")
    parts = memory_parts(count, size, n, micro, mixed=True, tile=896)
    print(f"{name}: predicted {sum(parts.values()) / 2**20:.0f} MiB, held {held / 2**20:.0f} MiB")
    assert sum(parts.values()) == pytest.approx(held, rel=0.25)


# Time

def test_a_step_never_takes_longer_on_a_better_device():
    count = count_encoder("resnet18", 1.0, 32, "bf16")

    def seconds(name: str, views: int) -> float:
        return sum(op_seconds(count.ops, views, DEVICES[name], "bf16").values())
    assert seconds("h100", 512) < seconds("a100", 512)
    assert seconds("a100", 1024) == pytest.approx(2 * seconds("a100", 512))


def test_measured_device():
    device = measure_device("fp32")
    assert set(device.peak) == {"fp32"} and 1e9 < device.peak["fp32"] < 1e14
    count = count_encoder("resnet18", 0.25, 32)
    parts = op_seconds(count.ops, 64, device)
    fastest = max(device.peak["fp32"], *device.rates["convolution"])
    roof = 64 * count.flops() / fastest
    assert 0.99 * roof < parts["compute"] < 100 * roof
    assert sum(op_seconds(count.ops, 64, device, first=0.0).values()) < sum(parts.values())


def test_network():
    count, place = count_encoder("resnet50"), (4, 8, LINKS["nvlink3"])
    links = LINKS["ethernet10"], LINKS["infiniband400"]
    slow, fast = (communication(count, 64, *place, link) for link in links)
    assert all(slow[k] > fast[k] for k in slow)
    chunked = communication(count, 64, *place, LINKS["ethernet10"], chunks=4)
    assert chunked["gradients"] == slow["gradients"]
    assert 4 * slow["statistics"] < chunked["statistics"] < 8 * slow["statistics"]


@pytest.mark.parametrize("gpus", DATA_SHEET)
def test_devices(gpus):
    one = run_plan(PlanConfig("cifar10", "resnet18", batch=64, gpus=gpus))
    many = run_plan(PlanConfig("cifar10", "resnet18", batch=64, gpus=f"2x4x{gpus}"))
    assert one.fits and one.devices == 1 and many.devices == 8
    assert one.seconds["network"] == 0 < many.seconds["network"]
    assert 0 < one.step < 1


def test_dense_loss_limits_the_batch():
    config = PlanConfig("1000000x32", "resnet18", 0.25, batch=65536, gpus="h100", micro_batch=256)
    assert run_plan(config).fits and not run_plan(replace(config, dense=True)).fits


# Measured here

@pytest.fixture(scope="module")
def card() -> dict:
    return json.loads((BENCHMARKS / "results/plan.json").read_text(encoding="utf-8"))


def test_card_agrees_with_itself(card):
    assert len(card["steps"]) >= 3 and card["settings"]["repeats"] >= 3
    for step in card["steps"].values():
        ratio = step["predicted"]["seconds"] / step["seconds"]["median"]
        assert step["time_ratio"] == pytest.approx(ratio, abs=1e-3)
        ratio = step["predicted"]["mib"] / step["held_mib"]
        assert step["memory_ratio"] == pytest.approx(ratio, abs=1e-3)
        before, after = step["predicted"]["both"]  # the device was measured twice
        assert math.fsum(step["parts"].values()) == pytest.approx(before, rel=1e-3)
        assert step["predicted"]["seconds"] == pytest.approx((before + after) / 2, rel=1e-3)


def test_predictions_hold(card):
    "Acceptance: time and memory of three configurations within 25%."
    hardware = card["hardware"]
    for name, step in card["steps"].items():
        print(f"{name}: time {step['time_ratio']}, memory {step['memory_ratio']}")
        assert 0.75 <= step["time_ratio"] <= 1.25, name
        assert 0.75 <= step["memory_ratio"] <= 1.25, name
    assert card["steady"] and hardware["load_before"] < hardware["cores"] / 2, "a busy machine"


# The command

def answer(*argv: str) -> str:
    options = vars(config_parser("simclr-plan", PlanConfig).parse_args(argv))
    return str(run_plan(PlanConfig(**options)))


def test_command():
    text = answer("--arch", "resnet50", "--batch", "4096", "--gpus", "8xh100")
    assert "512 images on each of 8" in text and "What limits it: memory bandwidth" in text
    assert ", fits" in text and "photos/s needed" in text
    text = answer("--batch", "8192", "--gpus", "4xa100", "--dense")
    assert "DOES NOT FIT" in text and "--micro-batch" in text
    text = answer("cifar10", "--arch", "resnet18", "--batch", "512", "--gpus", "a100")
    assert "decoding" in text and "photos/s" not in text


def test_nothing_fits():
    options = dict(batch=2**20, gpus="t4", precision="fp16")
    plan = run_plan(PlanConfig("5000000x224", "resnet200", 4.0, **options))
    assert not plan.fits and plan.micro_batch == 0 and "no micro-batch fits" in str(plan)


def test_unknown_encoder():
    with pytest.raises(ValueError, match="resnet51"): run_plan(PlanConfig(arch="resnet51"))
    with pytest.raises(ValueError, match="did you mean .resnet50"):
        run_plan(PlanConfig(arch="torchvision/resnett"))
    with pytest.raises(ValueError, match="has no width, got 2.0: leave it out"):
        run_plan(PlanConfig(arch="torchvision/resnet18", width=2.0))


def test_loss_memory_is_what_was_measured():
    "`benchmarks/results/loss.json`: tiled and dense; the projections were there before."
    loss = json.loads((BENCHMARKS / "results/loss.json").read_text(encoding="utf-8"))
    count, n, large = count_encoder("resnet18"), loss["settings"]["images"], loss["large"]
    for images, dense, peak in ((large["images"], False, large["peak_mib"]),
                                (n, True, loss["losses"]["dense"]["peak_mib"])):
        predicted = memory_parts(count, 224, images, dense=dense, tile=896)["loss"] / 2**20
        assert predicted == pytest.approx(peak + 2 * images * 128 * 4 / 2**20, rel=0.1)
