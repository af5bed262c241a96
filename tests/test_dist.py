"""Many processes are one: loss, gradients, weights, BatchNorm, shards; with real processes.

The functions `*_in_processes` run in each process. The reference is one with the whole batch.
"""
from functools import cache, partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from processes import run
from simclr_nb.parallel.norm import GlobalBatchNorm, batch_norms, to_global_batch_norm
from simclr_nb.parallel.loss import GlobalNTXent, global_loss, global_nt_xent
from simclr_nb.core.gather import gather_in_order, gather_rows, gather_views, sum_over_ranks
from simclr_nb.model.encoder import create_encoder
from simclr_nb.model.head import Projection, SimCLR, projection_head
from simclr_nb.loss.contrastive import nt_xent
from simclr_nb.parallel.microbatch import micro_batched, replace_norms
from simclr_nb.train.optim import LARS
from simclr_nb.core.processes import is_main, rank, shard_rows, world_size

WORLDS = 1, 2, 4
IMAGES, STEPS, TEMPERATURE = 16, 5, 0.2


# Loss, gradients, weights

def simclr(batch_norm: bool) -> SimCLR:
    torch.manual_seed(0)
    encoder = create_encoder("resnet18", width=0.0625, stem="cifar", zero_init_last=False)
    model = SimCLR(encoder, projection_head(encoder.out_dim, 8, batch_norm=batch_norm)).double()
    return model if batch_norm else replace_norms(model, "group")


def views(step: int, rank: int = 0, world: int = 1) -> Tensor:
    "This rank's images of a step, two views of each."
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(IMAGES, 3, 8, 8, generator=generator, dtype=torch.float64)
    second = images.flip(3) + 0.1 * torch.randn(images.shape, generator=generator)
    rows = list(shard_rows(IMAGES, rank, world))
    return torch.cat([images[rows], second[rows]])


def train(model: nn.Module, forward, loss_func, rank: int = 0, world: int = 1, steps=STEPS) -> dict:
    "Loss and gradients of the first of some LARS steps, and the weights after the last."
    found, inner = {}, getattr(model, "module", model)
    optimizer = LARS(model.parameters(), lr=0.5, weight_decay=1e-4)
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_func(forward(model, views(step, rank, world)).z)
        loss.backward()
        if step == 0:
            found["loss"] = sum_over_ranks(loss) / world
            found["gradients"] = {k: p.grad.clone() for k, p in inner.named_parameters()}
        optimizer.step()
    return {**found, "weights": {k: v.detach() for k, v in inner.state_dict().items()}}


class OwnSlice(torch.autograd.Function):
    "The gather of some packages: backward keeps what this rank alone says."

    @staticmethod
    def forward(ctx, z):
        parts = [torch.empty_like(z) for _ in range(world_size())]
        dist.all_gather(parts, z)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, g): return g.chunk(world_size())[rank()]


def wrong_loss(z: Tensor, anchors: str) -> Tensor:
    world, n = world_size(), len(z) // 2
    rows = OwnSlice.apply(z).view(world, 2, n, -1).transpose(0, 1).reshape(2 * world * n, -1)
    losses = nt_xent(rows, TEMPERATURE, reduction="none").view(2, world, n)
    return (losses if anchors == "all" else losses[:, rank()]).mean()


def plain(model, x): return model(x)


class AnyLoss(nn.Module):
    "One that the package does not know."
    def forward(self, out): return nt_xent(out.z, TEMPERATURE)


dense, tiled = (partial(global_nt_xent, temperature=TEMPERATURE, tiled=t) for t in (False, True))
micro = partial(micro_batched, micro_batch=3)
RIGHT = dict(dense=(True, plain, dense), tiled=(True, plain, tiled),
             group_dense=(False, plain, dense), group_tiled=(False, plain, tiled),
             micro_dense=(False, micro, dense), micro_tiled=(False, micro, tiled),
             any_loss=(True, plain, lambda z: global_loss(AnyLoss())(Projection(z, z))))
WRONG = dict(all_anchors_own_slice=(True, plain, partial(wrong_loss, anchors="all")),
             own_anchors_own_slice=(True, plain, partial(wrong_loss, anchors="own")),
             no_gather=(True, plain, partial(nt_xent, temperature=TEMPERATURE)),
             local_batch_norm=(True, plain, dense))


def train_in_processes(rank: int, world: int) -> dict:
    found = {}
    for name, (batch_norm, forward, loss_func) in {**RIGHT, **WRONG}.items():
        model = simclr(batch_norm)
        if name != "local_batch_norm": model = to_global_batch_norm(model)
        model = DistributedDataParallel(model)
        steps = STEPS if name in RIGHT else 1
        found[name] = train(model, forward, loss_func, rank, world, steps)
    return found


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    "Findings of each of a number of processes, for all tests below; they run once."
    return cache(lambda world: run(all_in_processes, world, tmp_path_factory.mktemp("processes")))


@cache
def alone(batch_norm: bool) -> dict:
    "One process, one batch, the dense loss of one process, PyTorch's BatchNorm."
    return train(simclr(batch_norm), plain, partial(nt_xent, temperature=TEMPERATURE))


def error(found: dict, expected: dict) -> float:
    "Largest difference of any tensor, relative to its largest entry, or to 1e-3 of that of all."
    assert found.keys() == expected.keys()
    floor = 1e-3 * max(v.abs().max() for v in expected.values())
    return max(((found[k] - v).abs().max() / v.abs().max().clamp_min(floor)).item()
               for k, v in expected.items())


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", RIGHT)
def test_processes_are_one(name, world, processes):
    expected = alone(RIGHT[name][0])
    for found in (process["train"][name] for process in processes(world)):
        assert abs(found["loss"] - expected["loss"]) < 1e-6
        assert error(found["gradients"], expected["gradients"]) < 1e-6
        assert error(found["weights"], expected["weights"]) < 1e-5


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_schemes_are_found(name, world, processes):
    found = processes(world)[0]["train"][name]["gradients"]
    assert error(found, alone(True)["gradients"]) > 1e-2


def test_wrong_scale_is_one_over_w(processes):
    "And nothing else is wrong with it, which is why LARS hides it."
    for world in WORLDS[1:]:
        found = processes(world)[1]["train"]["all_anchors_own_slice"]["gradients"]
        scaled = {k: v / world for k, v in alone(True)["gradients"].items()}
        assert error(found, scaled) < 1e-6


# BatchNorm

SHARDS = {2: ((3, 3), (5, 1), (6, 0)), 4: ((2, 2, 2, 2), (1, 4, 0, 3))}
SHAPES = dict(rows=(6,), signal=(6, 5), image=(6, 4, 3), volume=(6, 2, 3, 2))
LAYERS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
OPTIONS = dict(plain={}, cumulative=dict(momentum=None), eps=dict(eps=0.1, momentum=0.3),
               bare=dict(affine=False), stateless=dict(track_running_stats=False), no_bias={})
CASES = [(kind, option) for kind in SHAPES for option in OPTIONS
         if option == "plain" or kind == "image"]


def norm_and_batches(kind: str, option: str, n: int) -> tuple:
    generator = torch.Generator().manual_seed(n)
    norm = LAYERS[1 + len(SHAPES[kind])](6, **OPTIONS[option]).double()
    if option == "no_bias": norm.register_parameter("bias", None)
    for p in norm.parameters(): nn.init.uniform_(p, 0.5, 2, generator=generator)
    shape = 2, 2, n, *SHAPES[kind]  # two steps, values and gradients
    steps = 5 + 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return norm, steps


def normalise(norm: nn.Module, steps: Tensor, rows: slice, layout=torch.contiguous_format) -> dict:
    "Outputs and input gradients of some rows in two steps, gradients of parameters, buffers."
    outputs, inputs = [], []
    for x, g in steps:
        x = x[rows].contiguous(memory_format=layout).requires_grad_()
        y = norm(x)
        y.backward(g[rows])
        outputs.append(y.detach())
        inputs.append(x.grad)
    found = {f"of {k}": p.grad for k, p in norm.named_parameters()}
    return {**found, **dict(norm.named_buffers()), "y": torch.cat(outputs), "x": torch.cat(inputs)}


def layout_of(kind: str): return torch.channels_last if kind == "image" else torch.contiguous_format


def norms_in_processes(rank: int, world: int) -> dict:
    found = {}
    for shards in SHARDS[world]:
        rows = slice(sum(shards[:rank]), sum(shards[:rank + 1]))
        for kind, option in CASES:
            norm, steps = norm_and_batches(kind, option, sum(shards))
            out = normalise(to_global_batch_norm(norm), steps, rows, layout_of(kind))
            for k in out:
                if k.startswith("of "): out[k] = sum_over_ranks(out[k])
            found[f"{kind}-{option}-{shards}"] = out
    return found


def whole(parts: list[Tensor]) -> Tensor:
    "Rows of all ranks in two steps, in the order of one process."
    return torch.cat([torch.cat([p.view(2, len(p) // 2, *p.shape[1:])[i] for p in parts])
                      for i in range(2)])


@pytest.mark.parametrize("shards", [s for world in SHARDS for s in SHARDS[world]], ids=str)
@pytest.mark.parametrize("kind, option", CASES)
def test_global_batch_norm_is_that_of_the_whole_batch(kind, option, shards, processes):
    norm, steps = norm_and_batches(kind, option, sum(shards))
    found = [p["norms"][f"{kind}-{option}-{shards}"] for p in processes(len(shards))]
    for key, expected in normalise(norm, steps, slice(None)).items():
        values = [part[key] for part in found]
        for value in [whole(values)] if key in ("x", "y") else values:
            assert torch.allclose(value, expected, rtol=1e-10, atol=1e-10), key


def precision_in_processes(rank: int, world: int) -> dict:
    "bfloat16 and large means in float32, as under autocast; memory layout of what comes out."
    x = 1000 + torch.randn(8, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    norm, n = GlobalBatchNorm(4), 8 // world
    rows = slice(n * rank, n * rank + n)
    own = x[rows].contiguous(memory_format=torch.channels_last).requires_grad_()
    y = norm(own)
    y.sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert own.grad.is_contiguous(memory_format=torch.channels_last)
    half = (x[rows] - 1000).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16): low = GlobalBatchNorm(4)(half)
    low.float().square().sum().backward()
    assert low.dtype == half.grad.dtype == torch.bfloat16
    assert norm.weight.grad.dtype == torch.float32
    return dict(y=y.detach(), low=low.float().detach(), var=norm.running_var)


def test_precision_and_layout(processes):
    found = [p["precision"] for p in processes(2)]
    x = 1000 + torch.randn(8, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    exact = nn.BatchNorm2d(4).double()
    y = exact(x.double()).detach()
    low = nn.BatchNorm2d(4)((x - 1000).bfloat16().float()).detach()
    assert (torch.cat([p["y"] for p in found]) - y).abs().max() < 1e-3  # x itself carries 6e-5
    assert (torch.cat([p["low"] for p in found]) - low).abs().max() < 0.05
    assert (found[1]["var"] - exact.running_var).abs().max() < 1e-4


# Rows in order, errors on all ranks, no hang

def message(function, *args) -> str:
    try: function(*args)
    except ValueError as e: return str(e)
    return "no error"


def rows_in_processes(rank: int, world: int) -> dict:
    z = torch.arange(4.0).view(4, 1) + 10 * rank
    found = dict(who=[rank, world, is_main()], rows=gather_rows(z), sum=sum_over_ranks(z))
    found["views"], found["anchors"] = gather_views(z)
    for n in (0, 1, 7, 8):
        own = torch.tensor(shard_rows(n, rank, world), dtype=torch.long)
        found[f"long {n}"] = gather_in_order(own, n)
        found[f"bool {n}"] = gather_in_order(own % 3 == 0, n)
        found[f"wide {n}"] = gather_in_order(own.view(-1, 1) * torch.ones(2), n)
    found["ragged"] = message(gather_rows, z[:3 + rank])
    found["ragged loss"] = message(GlobalNTXent(), torch.ones(4 + 2 * rank, 3))
    found["other width"] = message(gather_rows, torch.ones(4, 3 + rank))
    found["odd"] = message(gather_views, z[:3])
    found["not all"] = message(gather_in_order, z[:2 + rank], 6)
    found["one value"] = message(GlobalBatchNorm(3), torch.ones(1 - min(rank, 1), 3))
    z = torch.full((4, 3), 0.0 if rank else torch.nan).requires_grad_()
    found["refused"] = message(global_nt_xent, z)
    loss = GlobalNTXent()(z)
    loss.backward()
    return dict(found, nan=[loss.item(), z.grad.isnan().all().item()])


@pytest.mark.parametrize("world", WORLDS[1:])
def test_rows_and_errors(world, processes):
    for r, found in enumerate(p["rows"] for p in processes(world)):
        assert found["who"] == [r, world, r == 0]
        every = torch.arange(4.0) + 10 * torch.arange(world).view(-1, 1)
        ordered = torch.cat([every[:, :2].flatten(), every[:, 2:].flatten()])
        assert found["rows"].flatten().tolist() == every.flatten().tolist()
        assert found["sum"].flatten().tolist() == every.sum(0).tolist()
        assert found["views"].flatten().tolist() == ordered.tolist()
        assert found["views"][found["anchors"]].flatten().tolist() == every[r].tolist()
        for n in (0, 1, 7, 8):
            assert found[f"long {n}"].tolist() == list(range(n))
            assert found[f"bool {n}"].tolist() == [i % 3 == 0 for i in range(n)]
            assert found[f"wide {n}"].tolist() == [[i, i] for i in range(n)]
        assert "[[3, 1, 4], [4, 1, 4]" in found["ragged"] and "drop_last" in found["ragged"]
        assert "[[4, 3, 4], [6, 3, 4]" in found["ragged loss"]
        assert "[[4, 3, 4], [4, 4, 4]" in found["other width"]
        assert "3 rows" in found["odd"] and "more than 1 value" in found["one value"]
        assert f"{[len(shard_rows(6, i, world)) for i in range(world)]} rows" in found["not all"]
        assert f"4 of {4 * world}" in found["refused"]
        assert found["nan"] == [pytest.approx(torch.nan, nan_ok=True), True]


def all_in_processes(rank: int, world: int) -> dict:
    found = dict(train=train_in_processes(rank, world))
    if world == 1: return found
    return dict(found, norms=norms_in_processes(rank, world), rows=rows_in_processes(rank, world),
                precision=precision_in_processes(rank, world))


def test_layers_are_found():
    model = simclr(True)
    assert len(batch_norms(model)) == 22 and not batch_norms(simclr(False))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for m in batch_norms(to_global_batch_norm(model)): assert type(m) is GlobalBatchNorm
    model.load_state_dict(before)
    with pytest.raises(ValueError, match="expected .N, C"): GlobalBatchNorm(2)(torch.ones(2))
