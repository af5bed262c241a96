"Micro-batches: gradients on batches that Hypothesis invents, memory, and many processes."
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.nn.parallel import DistributedDataParallel

from processes import GIVE_BACK, run
from simclr_nb.parallel.loss import GlobalNTXent
from simclr_nb.core.gather import sum_over_ranks
from simclr_nb.parallel.norm import to_global_batch_norm
from simclr_nb.model.encoder import create_encoder
from simclr_nb.model.head import SimCLR, projection_head
from simclr_nb.loss.tiled import NTXent, tiled_nt_xent
from simclr_nb.loss.contrastive import nt_xent
from simclr_nb.parallel.microbatch import micro_batched, replace_norms
from simclr_nb.core.processes import shard_rows, world_size

IMAGES = 12


def simclr(batch_norm: bool = False, dropout: float = 0) -> SimCLR:
    torch.manual_seed(0)
    encoder = create_encoder("resnet18", width=0.0625, stem="cifar", zero_init_last=False)
    head = projection_head(encoder.out_dim, 8, batch_norm=batch_norm)
    model = SimCLR(nn.Sequential(encoder, nn.Dropout(dropout)), head).double()
    return model if batch_norm else replace_norms(model)


def views(n: int = IMAGES, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2 * n, 3, 8, 8, generator=generator, dtype=torch.float64)


def gradients(model: nn.Module) -> dict: return {k: p.grad for k, p in model.named_parameters()}


def error(found: dict, expected: dict) -> float:
    "Largest difference of any tensor, relative to its norm."
    assert found.keys() == expected.keys()
    pairs = [(found[k].double(), v.double()) for k, v in expected.items()]
    return max(((a - b).norm() / b.norm().clamp_min(1e-6)).item() for a, b in pairs)


def backward(model: nn.Module, z: Tensor, loss=nt_xent) -> dict:
    model.zero_grad()
    loss(z).backward()
    return {k: v.clone() for k, v in gradients(model).items()}


def chunked(model: nn.Module, x: Tensor, bounds: list[int]) -> Tensor:
    "All chunks with their graphs, `bounds` in images: an independent reference."
    n = len(x) // 2
    parts = [model(torch.cat([x[a:b], x[n + a:n + b]])).z.chunk(2)
             for a, b in zip(bounds, bounds[1:])]
    return torch.cat([*(p[0] for p in parts), *(p[1] for p in parts)])


# One process

@settings(max_examples=15, deadline=None, derandomize=True)
@given(n=st.integers(2, 9), micro_batch=st.integers(1, 10), seed=st.integers(0, 99),
       tiled=st.booleans())
def test_gradient_is_that_of_one_pass(n, micro_batch, seed, tiled):
    model, x, loss = simclr(), views(n, seed), tiled_nt_xent if tiled else nt_xent
    expected = backward(model, model(x).z)
    assert error(backward(model, micro_batched(model, x, micro_batch).z, loss), expected) < 1e-8


def test_batch_norm_and_dropout_twice_the_same():
    x, model, generator = views(), simclr(True, dropout=0.5), torch.get_rng_state()
    expected, state = backward(model, chunked(model, x, [0, 4, 8, 12])), torch.get_rng_state()
    averages = {k: v.clone() for k, v in model.named_buffers()}
    model = simclr(True, dropout=0.5)
    torch.set_rng_state(generator)
    out = micro_batched(model, x, 4)
    after = {k: v.clone() for k, v in model.named_buffers()}
    assert torch.equal(torch.get_rng_state(), state)
    assert error(backward(model, out.z), expected) < 1e-8
    assert torch.equal(torch.get_rng_state(), state)
    for k, v in model.named_buffers():
        assert torch.equal(v, after[k]), "the second pass moves buffers"
        assert "batches" in k and v == 1 or not torch.equal(v, averages[k])


def test_backward_inside_autocast_loses_nothing():
    "Copies of weights that were cast without gradient must not serve the second pass."
    model, x = simclr().float(), views().float()
    with torch.autocast("cpu", torch.bfloat16):
        found = backward(model, micro_batched(model, x, 5).z)
        expected = backward(model, model(x).z)
    assert error(found, expected) < 0.1  # bfloat16, added up in another order


def test_loss_that_fails_leaves_the_model_alone():
    model = simclr(True)
    loss = NTXent()(micro_batched(model, views() * torch.nan, 4))
    assert loss.isnan() and all(p.grad is None for p in model.parameters())
    z = micro_batched(model, views(1), 4).z
    with pytest.raises(ValueError, match="2 images or more"): nt_xent(z)


# Memory

PEAK = """
import sys, torch
from simclr_nb.model.encoder import create_encoder
from simclr_nb.model.head import SimCLR, projection_head
from simclr_nb.loss.tiled import NTXent
from simclr_nb.parallel.microbatch import micro_batched, replace_norms
torch.set_num_threads(1)
encoder = create_encoder("resnet18", width=0.125, stem="cifar")
model = replace_norms(SimCLR(encoder, projection_head(encoder.out_dim)))
def step(x, micro_batch):
    out = micro_batched(model, x, micro_batch) if micro_batch else model(x)
    NTXent()(out).backward()
    return (out.h.numel() + out.z.numel()) * 4
def held(field):
    return int(next(s for s in open("/proc/self/status") if s.startswith(field)).split()[1]) * 1024
step(torch.rand(4, 3, 32, 32), 0)
x = torch.rand(2 * int(sys.argv[1]), 3, 32, 32)
open("/proc/self/clear_refs", "w").write("5")
before = held("VmRSS")
embeddings = step(x, int(sys.argv[2]))
print(held("VmHWM") - before, embeddings)
"""


def peak(n: int, micro_batch: int) -> list[int]:
    "Most memory of a step in a process of its own, and that of its `h` and `z`, in bytes."
    command = [sys.executable, "-c", PEAK, str(n), str(micro_batch)]
    env = os.environ | GIVE_BACK
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0, done.stderr
    return [int(v) for v in done.stdout.split()]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory as Linux tells")
def test_memory_is_that_of_a_micro_batch():
    (few, _), (many, embeddings) = peak(64, 0), peak(512, 64)
    print(f"batch 64: {few / 2**20:.1f} MiB; 512 by 64: {many / 2**20:.1f} MiB, of which"
          f" embeddings {embeddings / 2**20:.1f} MiB")
    assert few > 20 * embeddings, "activations do not dominate"
    assert many <= 1.3 * (few + embeddings)


# Many processes; without batch statistics see test_dist

def own_views(rank: int, world: int) -> Tensor:
    rows = list(shard_rows(IMAGES, rank, world))
    return views().view(2, IMAGES, 3, 8, 8)[:, rows].flatten(0, 1)


def count(reductions: list, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    "A hook of DDP: its average, counted."
    reductions.append(bucket.index())
    mean = sum_over_ranks(bucket.buffer()) / world_size()
    future = torch.futures.Future()
    future.set_result(mean)
    return future


def step_in_processes(rank: int, world: int) -> dict:
    x, reductions = own_views(rank, world), []
    inner = to_global_batch_norm(simclr(True))
    model = DistributedDataParallel(inner)
    model.register_comm_hook(reductions, count)
    loss = GlobalNTXent(0.2)(micro_batched(model, x, 2))
    loss.backward()
    found = dict(loss=sum_over_ranks(loss) / world,
                 buffers={k: v.clone() for k, v in inner.named_buffers()},
                 gradients={k: v.clone() for k, v in gradients(inner).items()})
    buckets, reductions[:] = len(reductions), []
    model.zero_grad()
    GlobalNTXent(0.2)(model(x)).backward()
    found["reductions"] = [buckets, len(reductions)]
    try: micro_batched(model, x[:4 + 2 * rank], 2)
    except ValueError as e: found["ragged"] = str(e)
    return found


def test_chunks_over_processes(tmp_path):
    "Chunk c of the batch is chunk c of all ranks; statistics are those of that chunk."
    processes = run(step_in_processes, 2, tmp_path)
    n, order = IMAGES, torch.tensor([0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11])
    x, model = views()[torch.cat([order, n + order])], simclr(True)
    loss = nt_xent(chunked(model, x, [0, 4, 8, 12]), 0.2)
    loss.backward()
    once = simclr(True)
    micro_batched(once, x, 4)
    for found in processes:
        assert abs(found["loss"] - loss) < 1e-10
        assert error(found["gradients"], gradients(model)) < 1e-8
        assert error(found["buffers"], dict(once.named_buffers())) < 1e-8
        assert found["reductions"][0] == found["reductions"][1] > 0
        assert "[[4, 192, 8], [6, 192, 8]]" in found["ragged"]
