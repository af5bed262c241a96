"""On a GPU: the numbers of a CPU, no hidden wait, bit-exact resume, NCCL, the compiler.

Every test is marked `gpu`; `make gpu` runs them, and without a GPU they are skipped. float32 is
compared at 1e-4 and float64 at 1e-9, norm of the difference over norm; TF32 is off meanwhile.
"""
import copy
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fastai.callback.core import Callback
from PIL import Image
from torch import Generator, nn

import gpu_steps
from gpu_steps import METHODS, STEPS, WAITING, StepLosses, losses_of, train, within_steps
from simclr_nb.core.gather import gather_rows, gather_views
from simclr_nb.data import simclr_dls
from simclr_nb.evaluate.features import encoder_features
from simclr_nb.evaluate.frozen import knn_accuracy, linear_evaluation, logistic_accuracy
from simclr_nb.evaluate.tuning import finetune
from simclr_nb.images.arrays import ImageArrays
from simclr_nb.images.source import Source
from simclr_nb.learner import simclr_learner
from simclr_nb.loss.alternatives import LOSSES, ContrastiveLoss
from simclr_nb.loss.amdim import AMDIMLoss
from simclr_nb.loss.tiled import NTXent
from simclr_nb.model.amdim import AMDIM
from simclr_nb.model.encoder import create_encoder, load_encoder
from simclr_nb.model.head import Projection, SimCLR, projection_head
from simclr_nb.parallel.loss import global_loss
from simclr_nb.parallel.microbatch import micro_batched, replace_norms
from simclr_nb.parallel.norm import to_global_batch_norm
from simclr_nb.train.optim import OPTIMIZERS, create_optimizer
from simclr_nb.views.compiled import can_compile, compiled_views
from simclr_nb.views.policy import POLICIES, create_policy
from simclr_nb.views.two_views import TwoViews

DEVICE = os.environ.get("SIMCLR_NB_GPU", "cuda")  # "cpu" to try this file, which then shows nothing
needs_gpu = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
pytestmark = [pytest.mark.gpu, needs_gpu]


@pytest.fixture(autouse=True)
def exact():
    "float32 as on a CPU: matrix units do not round the factors to TF32."
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = flags


def error(found, expected) -> float:
    "Norm of the difference of two tensors, or lists of them, over the norm of the second."
    if isinstance(found, torch.Tensor): found, expected = [found], [expected]
    found, expected = (torch.cat([t.detach().cpu().double().flatten() for t in ts])
                       for ts in (found, expected))
    return ((found - expected).norm() / expected.norm()).item()


def wait():
    if DEVICE == "cuda": torch.cuda.synchronize()


def most_memory(work) -> int:
    "Bytes of the GPU that some work takes at most, beyond what was there."
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# losses

PRECISIONS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2}


def value_and_gradient(loss, z, device, **kwargs) -> list:
    z = z.detach().clone().to(device).requires_grad_()
    value = loss(z, **kwargs)
    value.backward()
    return [value.float() if z.dtype == torch.bfloat16 else value], [z.grad]


def as_on_the_cpu(loss, z, tolerance):
    exact_ = value_and_gradient(loss, z.double(), "cpu")
    found = value_and_gradient(loss, z, DEVICE)
    for own, expected in zip(found, exact_, strict=True): assert error(own, expected) < tolerance


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("n", [8, 1200])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, n, dtype):
    "Values and gradients, also of bf16 projections; semi-hard negatives are a choice, not a number."
    z = torch.randn(2 * n, 64).to(dtype)
    as_on_the_cpu(ContrastiveLoss(name), z, PRECISIONS[dtype])


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.01])
@pytest.mark.parametrize("n", [2, 257, 3000, 5000])
def test_nt_xent(n, temperature, dtype):
    "Dense, tiled in one and in four tiles; the powers need a maximum at 0.01."
    tolerance = PRECISIONS[dtype] * (1 if dtype == torch.float64 else max(1, 0.1 / temperature))
    as_on_the_cpu(NTXent(temperature), torch.randn(2 * n, 128).to(dtype), tolerance)


def test_nt_xent_in_its_memory():
    "16,384 images would need 4 GiB for one matrix of similarities."
    z = torch.randn(2 * 16384, 128, device=DEVICE, requires_grad=True)
    if DEVICE == "cuda": assert most_memory(lambda: NTXent()(z).backward()) < 2**29


@pytest.mark.parametrize("sampled", [True, False])
def test_amdim_loss(sampled):
    n = 12
    z = torch.randn(2 * n, 32, 75, dtype=torch.float64)
    positions = tuple(torch.randint(25, (2, n))) if sampled else None
    loss = AMDIMLoss(sampled=sampled)

    def on(device):
        own = positions and tuple(p.to(device) for p in positions)
        return lambda v: loss(Projection(v, v), positions=own)
    expected = value_and_gradient(on("cpu"), z, "cpu")
    for dtype, tolerance in PRECISIONS.items():
        found = value_and_gradient(on(DEVICE), z.to(dtype), DEVICE)
        for own, other in zip(found, expected, strict=True): assert error(own, other) < tolerance


# views

STEPPED = "broad", "autoaugment", "randaugment"  # they count or round levels: rounding turns some over


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("how", ["operators", "compiled"])
def test_views(how, name):
    "Draws are the CPU's, so views are the same up to rounding."
    if how == "compiled" and not can_compile(DEVICE): pytest.skip("no compiler")
    x = (torch.rand(32, 3, 48, 40) * 255).byte()
    if create_policy(name, 32).crop is None: x = x[:, :, :32, :32]
    views = TwoViews(create_policy(name, 32))
    expected = views(x, Generator().manual_seed(1))
    fast = compiled_views(views) if how == "compiled" else views
    state = Generator().manual_seed(1)
    found = fast(x.to(DEVICE), state).cpu()
    far = ((found - expected).abs() > 1e-3).float().mean().item()
    print(f"{name} {how}: largest {(found - expected).abs().max():.2g}, share above 1e-3 {far:.2g}")
    assert error(found, expected) < (1e-3 if name in STEPPED else 1e-4)
    assert far < (2e-3 if name in STEPPED else 1e-9)


def test_views_of_photographs():
    "224 px out of 300, float images, and pairs of crops."
    x = torch.rand(8, 3, 300, 260)
    views = TwoViews(create_policy("paper", 224))
    for images in (x, (x * 255).byte(), torch.rand(8, 2, 3, 224, 224)):
        expected = views(images, Generator().manual_seed(1))
        found = views(images.to(DEVICE), Generator().manual_seed(1))
        assert error(found, expected) < 1e-4


# networks

def simclr(arch: str, width: float = 0.25, stem: str = "cifar") -> SimCLR:
    encoder = create_encoder(arch, width, stem)
    return SimCLR(encoder, projection_head(encoder.out_dim, 32))


def gradients(model, loss, views) -> list:
    model.zero_grad()
    out = model(views)
    loss(out).backward()
    return [out.z, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "amdim/16-64-1"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_networks(dtype, arch):
    "Projections, and every gradient, channels last there; float32 of a GPU is as far off as a CPU's."
    is_amdim = arch.startswith("amdim")
    if is_amdim: model, loss = AMDIM(create_encoder(arch, size=32)), AMDIMLoss(sampled=False)
    else: model, loss = simclr(arch), NTXent()
    views = torch.rand(64, 3, 32, 32)
    expected = gradients(copy.deepcopy(model).double(), loss, views.double())
    own = gradients(copy.deepcopy(model).to(dtype), loss, views.to(dtype))
    there = copy.deepcopy(model).to(DEVICE, dtype).to(memory_format=torch.channels_last)
    x = views.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
    found = gradients(there, loss, x)
    limit = 1e-9 if dtype == torch.float64 else 1e-4
    errors = error(found[0], expected[0]), error(found[1:], expected[1:])
    cpu = error(own[0], expected[0]), error(own[1:], expected[1:])
    print(f"{arch} {dtype}: GPU {errors}, CPU {cpu}")
    assert errors[0] < limit and errors[1] < max(limit, 3 * cpu[1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    "Twenty steps with the same gradients."
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))
    models = [copy.deepcopy(model).double(), copy.deepcopy(model).double().to(DEVICE)]
    opts = [create_optimizer(name, m.parameters(), 0.1, 1e-2) for m in models]
    for _ in range(20):
        grads = [torch.randn_like(p) for p in models[0].parameters()]
        for m, opt in zip(models, opts, strict=True):
            for p, g in zip(m.parameters(), grads, strict=True): p.grad = g.to(p.device)
            opt.step()
    assert error(list(models[1].parameters()), list(models[0].parameters())) < 1e-9


@pytest.mark.parametrize("micro", [4, 7])
def test_micro_batches(micro):
    "The gradients of the whole batch, to 1e-9 in float64."
    model = replace_norms(simclr("resnet18").double().to(DEVICE))  # norms would see other images
    views = torch.rand(48, 3, 32, 32, dtype=torch.float64, device=DEVICE)
    expected = gradients(model, NTXent(), views)
    model.zero_grad()
    out = micro_batched(model, views, micro)
    NTXent()(out).backward()
    assert error([out.z, *(p.grad for p in model.parameters())], expected) < 1e-9


@needs_cuda
def test_memory_of_micro_batches():
    "An eighth of the images at a time takes less than a third of the memory."
    model = simclr("resnet50", 0.5).cuda()
    views = torch.rand(512, 3, 32, 32, device="cuda")

    def whole(): NTXent()(model(views)).backward()
    def parts(): NTXent()(micro_batched(model, views, 32)).backward()
    for work in (whole, parts): work()  # gradients are there from now on
    most = most_memory(whole), most_memory(parts)
    print(f"whole {most[0] / 2**20:.0f} MiB, parts {most[1] / 2**20:.0f} MiB")
    assert most[1] < most[0] / 3


# learners

def digits(device: str | None = DEVICE): return gpu_steps.digits(device)


@pytest.mark.parametrize("method", METHODS)
def test_epoch(method):
    "The losses of an epoch in float32 are those of a CPU."
    options = dict(splits=1) if method.startswith("moco") else {}  # groups are drawn on the device
    losses = [losses_of(device, method, precision="fp32", **options) for device in ("cpu", DEVICE)]
    print(losses)
    assert len(losses[0]) == 5 and error(losses[1], losses[0]) < 1e-3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", ["simclr", "amdim"])
def test_precisions(method, precision):
    "Losses in 16 bits are those of float32 to 2%; fp16 skips steps until its scale fits."
    whole, notes = losses_of(DEVICE, method, precision="fp32"), StepLosses()
    learn = train(DEVICE, method, precision=precision, cbs=[notes])
    half = torch.stack(notes.values)
    same = slice(1 if precision == "fp16" else 5)
    assert error(half[same], whole[same]) < 2e-2 and half.isfinite().all()
    if DEVICE == "cuda": assert notes.is_scaled == (precision == "fp16")
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in learn.model.parameters())


@needs_cuda
def test_auto_is_bf16_and_images_stay_there():
    learn = simclr_learner(digits(device=None), width=0.25)
    assert next(learn.model.parameters()).is_cuda
    assert learn.precision.amp_mode.value == "bf16"
    assert learn.dls.train.dataset.at("cuda").is_cuda
    assert learn.dls.train.one_batch()[0].is_cuda


def waiting(mode: str) -> None:
    "Action when the processor waits for the device: \"error\", or nothing."
    if DEVICE == "cuda": torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("method, options", [*STEPS, ("simclr", dict(compiled=True))], ids=str)
def test_no_hidden_wait(method, options):
    "A step waits for the device only where losses are read, every 50 steps; probes are in it."
    cbs = within_steps(lambda: waiting("error"), lambda: waiting("default"))
    try: train(DEVICE, method, cbs=cbs, **dict(precision="fp32") | options)
    finally: waiting("default")


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in WAITING])
def test_no_hidden_wait_of_views(name):
    "Policies work on images that lie on the device, without waiting for it."
    x = (torch.rand(8, 3, 32, 32) * 255).byte().to(DEVICE)
    views = TwoViews(create_policy(name, 32))
    views(x)
    wait()
    try:
        waiting("error")
        views(x)
    finally: waiting("default")


class Stop(Callback):
    "Asks the run to end, as a scheduler would."
    order = 71

    def __init__(self, step: int): self.step = step
    def after_batch(self):
        if self.training and self.train_iter == self.step: signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_stopped_run_ends_alike(tmp_path, precision):
    "With deterministic kernels to the last bit."
    def learner():
        torch.manual_seed(0)
        return simclr_learner(digits(), width=0.25, precision=precision)
    def run(learn, **kwargs):
        torch.manual_seed(1)
        with learn.no_bar(), learn.no_logging(): learn.pretrain(2, **kwargs)
    flags = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        whole, first, second = learner(), learner(), learner()
        run(whole)
        with pytest.raises(SystemExit): run(first, checkpoints=tmp_path, cbs=[Stop(7)])
        run(second, checkpoints=tmp_path, resume=True)
    finally: torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = flags
    assert second.recorder.values[-1] == whole.recorder.values[-1]
    for a, b in zip(whole.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_compiled_learner():
    "Encoder and views compiled: the same losses."
    if not can_compile(DEVICE): pytest.skip("no compiler")
    losses = [losses_of(DEVICE, precision="fp32", compiled=c) for c in (False, True)]
    assert error(losses[1], losses[0]) < 1e-3


@needs_cuda
def test_loss_in_a_graph():
    "A captured loss, replayed with other numbers, is the loss of these numbers."
    z = torch.randn(2048, 128, device="cuda", requires_grad=True)
    loss = NTXent()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3): torch.autograd.grad(loss(z), z)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = loss(z)
        (grad,) = torch.autograd.grad(value, z)
    other = torch.randn(2048, 128)
    with torch.no_grad(): z.copy_(other)
    graph.replay()
    expected = value_and_gradient(loss, other.double(), "cpu")
    assert error(value, expected[0][0]) < 1e-5 and error(grad, expected[1][0]) < 1e-4


# evaluation

def test_evaluation(tmp_path):
    "k-NN, logistic regression, linear evaluation and fine-tuning are those of a CPU; weights travel."
    learn = train(DEVICE, epochs=2, precision="fp32")
    learn.save_encoder(tmp_path / "encoder.safetensors")
    found = {}
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        encoder, dls = load_encoder(tmp_path / "encoder.safetensors").to(device), digits(device=device)
        features = encoder_features(encoder, dls)
        knn, logistic = knn_accuracy(features), logistic_accuracy(features)
        linear = linear_evaluation(encoder, dls, epochs=2, seed=0, progress=False)
        tuned = finetune(encoder, dls, epochs=2, seed=0, progress=False)
        found[device] = features.h_test, [r.value for r in (knn, logistic, linear, tuned)]
    print(found["cpu"][1], found[DEVICE][1])
    assert error(found[DEVICE][0], found["cpu"][0]) < 1e-4
    few = 2 / len(digits().valid.dataset)  # of the test images, at the edge of two classes
    for a, b, limit in zip(found["cpu"][1], found[DEVICE][1], [few, few, 0.06, 0.06], strict=True):
        assert abs(a - b) <= limit


# JPEG files

def smooth(i: int, width: int, height: int) -> Image.Image:
    "A picture without noise, of which two decoders give nearly the same pixels."
    y, x = np.mgrid[:height, :width] / 40
    planes = [np.sin(x * (i + 1) / 3 + c) + np.cos(y + c * i) for c in range(3)]
    return Image.fromarray((np.stack(planes, -1) * 60 + 128).astype("uint8"))


def test_jpegs_decoded_there(tmp_path):
    "Crops of files decoded by the device are those of workers: full colours, grey, CMYK, turned."
    for i in range(24):
        folder = tmp_path / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        image = smooth(i, 150 + 7 * i, 140 + 5 * i)
        if i in (5, 11): image = image.convert("L" if i == 5 else "CMYK")
        exif = Image.Exif()
        if i == 7: exif[0x0112] = 6
        image.save(folder / f"{i:02}.jpg", quality=95, exif=exif,
                   progressive=i == 3, subsampling=0)
    both = {}
    for decode in ("workers", "device"):
        dls = simclr_dls(tmp_path, size=64, bs=8, seed=0, num_workers=0, decode=decode, device=DEVICE,
                         progress=False)
        both[decode] = torch.cat([x.cpu() for x, _ in dls.train]).float()
    off = (both["workers"] - both["device"]).abs()
    print(f"mean {off.mean():.3f}, largest {off.max():.0f}")
    assert off.mean() < 1 and off.max() < 8


def test_a_damaged_jpeg_is_named(tmp_path):
    for i in range(8): smooth(i, 200, 200).save(tmp_path / f"{i}.jpg")
    dls = simclr_dls(tmp_path, size=64, bs=2, n_valid=2, seed=0, num_workers=0, decode="device",
                     device=DEVICE, progress=False)
    for i in range(8): (tmp_path / f"{i}.jpg").write_bytes((tmp_path / f"{i}.jpg").read_bytes()[:20])
    with pytest.raises(ValueError, match=r"\d\.jpg"): list(dls.train)


# processes

def port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


PROCESSES = """
import os, sys, json, copy, torch
import torch.distributed as dist
sys.path.insert(0, {tests!r})
import test_cuda
test_cuda.member(sys.argv[1])
"""


def member(backend: str):
    "Gather, its gradient, BatchNorm and a step on this rank, against all in one process."
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = f"cuda:{rank % torch.cuda.device_count()}"
    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group(backend, rank=rank, world_size=world)
    torch.manual_seed(0)
    model = simclr("resnet18", 0.125).double().to(device)
    images = torch.rand(2, 16, 3, 32, 32, dtype=torch.float64).to(device)
    whole = gradients(copy.deepcopy(model), NTXent(), images.flatten(0, 1))
    own = images[:, rank * 16 // world:(rank + 1) * 16 // world].flatten(0, 1)
    part = gradients(to_global_batch_norm(copy.deepcopy(model)), global_loss(NTXent()), own)
    for g in part[1:]:
        dist.all_reduce(g)
        g /= world
    z, _ = gather_views(part[0].detach())
    print("ERRORS", rank, error(z, whole[0]), error(part[1:], whole[1:]),
          sum(isinstance(m, nn.SyncBatchNorm) for m in to_global_batch_norm(model).modules()), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def launch(world: int, *argv, script: list | None = None) -> str:
    "Printed lines of the processes of a launch."
    env = dict(os.environ, MASTER_ADDR="localhost", MASTER_PORT=str(port()), WORLD_SIZE=str(world))
    running = [subprocess.Popen([sys.executable, *(script or ["-c", PROCESSES.format(tests=str(Path(__file__).parent))]),
                                 *argv], env=dict(env, RANK=str(r), LOCAL_RANK=str(r), LOCAL_WORLD_SIZE=str(world)),
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
               for r in range(world)]
    try: printed = [p.communicate(timeout=120)[0] for p in running]
    finally:
        for p in running: p.kill()
    assert not any(p.returncode for p in running), "\n".join(printed)
    return "\n".join(printed)


@needs_cuda
@pytest.mark.parametrize("backend, world", [("gloo", 2), ("nccl", 1), ("nccl", 2)])
def test_processes(backend, world):
    "W processes give the gradients of one, in float64; two may share a GPU over gloo, not over NCCL."
    if backend == "nccl" and torch.cuda.device_count() < world: pytest.skip(f"needs {world} GPUs")
    lines = [line.split() for line in launch(world, backend).splitlines() if line.startswith("ERRORS")]
    print(lines)
    assert len(lines) == world
    assert all(float(z) < 1e-9 and float(g) < 1e-9 for _, _, z, g, _ in lines)
    if backend == "nccl" and world > 1: assert all(int(n[-1]) > 0 for n in lines)


NCCL = """
import os, torch, torch.distributed as dist
import simclr_nb.core.gather as gather
dist.init_process_group("nccl", rank=0, world_size=1)
torch.cuda.set_device(0)
x = torch.randn(6, 4, device="cuda", requires_grad=True)
gather.world_size = lambda: 2  # as if another were there; NCCL itself knows of one
real = gather.all_tensors
gather.all_tensors = lambda x: [x.detach()]
w = torch.randn(6, 4, device="cuda")
(gather._GatherRows.apply(x) * w).sum().backward()
print("SAME", torch.equal(x.grad, w))
dist.destroy_process_group()
"""


@needs_cuda
def test_reduce_scatter():
    "The backward pass of the gather, over NCCL."
    assert "SAME True" in launch(1, script=["-c", NCCL])


@needs_cuda
@pytest.mark.parametrize("module", ["simclr_nb.cli"])
def test_command(tmp_path, module):
    "The main command, on the GPU by itself."
    call = [sys.executable, "-m", module, "digits", "--epochs", "2", "--out", str(tmp_path / "run")]
    done = subprocess.run(call, capture_output=True, text=True, timeout=200)
    assert not done.returncode, done.stdout + done.stderr
    print(done.stdout)
