"""Memory bank and queue: authors' numbers, processes, memory of the tiled loss.

`golden/comparators.json` holds values of the authors' functions; everything here is float64.
"""
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from comparators import GOLDEN, approx, candidates, hash_t, index_t, same, unit
from processes import run
from simclr_nb.core.gather import sum_over_ranks
from simclr_nb.core.processes import shard_rows
from simclr_nb.loss.memory import KeyQueue, MemoryBank, bank_cross_entropy, bank_logits
from simclr_nb.methods.instdisc import InstDiscLoss
from simclr_nb.methods.pirl import PIRLLoss
from simclr_nb.model.head import Projection


def bank_of(case: dict, c: int) -> MemoryBank:
    "The bank of a case: unit rows."
    i = case["inputs"]
    bank = MemoryBank(i["n_data"], i["dim"], i["momentum"]).double()
    bank.rows.copy_(unit(hash_t((i["n_data"], i["dim"]), c)))
    bank.images = torch.tensor(i["y"])
    return bank


@pytest.mark.parametrize("tile", [None, 1, 30])
@pytest.mark.parametrize("name", ["inst_disc_nce_first_Z", "inst_disc_nce_fixed_Z"])
def test_nce_of_lemniscate(name, tile):
    case = GOLDEN[name]
    i, c = case["inputs"], case["inputs"]["c"]
    bank = bank_of(case, c + 1)
    x = unit(hash_t((i["batch"], i["dim"]), c)).requires_grad_()
    drawn = index_t((i["batch"], i["K"] + 1), c + 2, i["n_data"])[:, 1:]
    assert drawn.tolist() == i["idx"]
    assert (drawn == bank.images[:, None]).sum() == i["negatives_that_are_the_positive"]
    index = candidates(bank.images, i["idx"])
    if i["Z_given"] > 0: bank.normalizer.fill_(i["Z_given"])
    losses = bank.losses(x, bank.images, i["T"], index, "nce", i["eps"], tile)
    losses.mean().backward()
    assert bank.normalizer.item() == approx(case["Z"])
    same(bank_logits(x, bank.rows, i["T"], index).exp() / bank.normalizer, case["out"])
    assert losses.mean().item() == approx(case["loss"])
    same(x.grad, case["grad_x"])
    others = torch.ones(i["n_data"], dtype=bool).index_fill_(0, bank.images, False)
    kept = bank.rows[others].clone()
    bank.update(bank.images, x.detach())
    same(bank.rows[bank.images], case["memory_rows_y"])
    assert torch.equal(bank.rows[others], kept)


@pytest.mark.parametrize("tile", [None, 1, 9])
def test_softmax_of_lemniscate(tile):
    case = GOLDEN["inst_disc_softmax_all"]
    i, c = case["inputs"], case["inputs"]["c"]
    bank = bank_of(case, c + 1)
    x = unit(hash_t((i["batch"], i["dim"]), c)).requires_grad_()
    loss = bank.losses(x, bank.images, i["T"], tile=tile).mean()
    loss.backward()
    same(bank_logits(x, bank.rows, i["T"]), case["logits"])
    assert loss.item() == approx(case["loss"])
    same(x.grad, case["grad_x"])
    bank.update(bank.images, x.detach())
    same(bank.rows[bank.images], case["memory_rows_y"])


def step(rank: int, world: int, kind: str) -> dict:
    "Two steps of a linear encoder against a bank and a queue; what they are afterwards."
    torch.manual_seed(0)
    weight = hash_t((6, 10), 1).requires_grad_()
    bank, queue = MemoryBank(30, 6).double(), KeyQueue(12, 6).double()
    bank.rows.copy_(hash_t((30, 6), 2))
    queue.keys.copy_(unit(hash_t((12, 6), 3)))
    loss_func = InstDiscLoss(bank, 0.1, None if kind == "softmax" else 7)
    if kind == "pirl": loss_func = PIRLLoss(bank, 0.1, 7)
    found = {}
    for s in range(2):
        rows = list(shard_rows(8, rank, world))
        x = hash_t((8, 10), 10 + s)[rows]
        images = torch.tensor([5, 9, 0, 29, 13, 2, 7, 21])
        bank.images = images[rows]
        index = candidates(images, index_t((8, 7), 20 + s, 30).tolist())[rows]
        z = F.normalize(x @ weight.T)
        if kind == "pirl":
            z = torch.cat([z, F.normalize(x.flip(1) @ weight.T)])
            other = index.roll(1, 1)[:, [1, *range(1, 8)]]
            losses = loss_func.losses(Projection(x, z), [index, other])
        elif kind == "nce": losses = loss_func.losses(Projection(x, z), index)
        else: losses = loss_func.losses(Projection(x, z))
        loss = losses.mean()
        grad, = torch.autograd.grad(loss, weight)
        grad = sum_over_ranks(grad) / world
        found |= {f"loss {s}": sum_over_ranks(loss) / world, f"gradient {s}": grad}
        bank.update(bank.images, z.detach()[:len(rows)])
        queue.add(z.detach()[:len(rows)])
        with torch.no_grad(): weight -= 0.1 * grad
    end = {"rows": bank.rows, "Z": bank.normalizer, "keys": queue.keys, "weight": weight,
           "pointer": queue.pointer.double()}
    return {k: v.detach() for k, v in (found | end).items()}


KINDS = ["softmax", "nce", "pirl"]


def steps(rank: int, world: int) -> list: return [step(rank, world, kind) for kind in KINDS]


@pytest.mark.parametrize("world", [2, 4])
def test_processes_agree_with_one(world, tmp_path):
    "Loss, gradient, bank, Z, queue and pointer, in float64 to 1e-10, on every rank."
    expected = steps(0, 1)
    for of_rank in run(steps, world, tmp_path):
        for kind, found, reference in zip(KINDS, of_rank, expected, strict=True):
            assert found.keys() == reference.keys()
            for name, value in reference.items():
                assert torch.allclose(found[name], value, rtol=0, atol=1e-10), (kind, name)
    assert expected[1]["Z"] > 0 and expected[0]["Z"] == 0


MEASURED = """
import sys, torch
from simclr_nb.loss.memory import bank_cross_entropy, nce_loss
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"): return int(line.split()[1]) * 1024
torch.manual_seed(0)
kind, n, b, d, k, tile = sys.argv[1], *map(int, sys.argv[2:])
bank = torch.nn.functional.normalize(torch.randn(n, d))
v = torch.nn.functional.normalize(torch.randn(b, d)).requires_grad_()
images = torch.randperm(n)[:b]
index = torch.cat([images[:, None], torch.randint(n, (b, k))], 1)
def loss(rows):
    if kind == "softmax": return bank_cross_entropy(v[:rows], bank, images[:rows], tile=tile)
    return nce_loss(v[:rows], bank, index[:rows], 0.07, 1e4, tile=tile)
loss(2).mean().backward()  # what libraries allocate once
open("/proc/self/clear_refs", "w").write("5")
before = peak()
loss(b).mean().backward()
print(peak() - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
@pytest.mark.parametrize("kind", ["softmax", "nce"])
def test_memory_at_50_000_rows_and_a_batch_of_512(kind):
    "A matrix would hold 102 MB, thrice in a backward pass; rows of 4,096 negatives 1 GB."
    tile = 2**20
    sizes = map(str, (50_000, 512, 128, 4096, tile))
    env = dict(os.environ, OMP_NUM_THREADS="1", MALLOC_MMAP_THRESHOLD_="65536",
               MALLOC_TRIM_THRESHOLD_="65536")
    done = subprocess.run([sys.executable, "-c", MEASURED, kind, *sizes], env=env, timeout=120,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    used = int(done.stdout)
    print(f"{kind}: {used / 1e6:.1f} MB, a tile has {4 * tile / 1e6:.1f} MB")
    assert used < 8 * 4 * tile, f"{used / 1e6:.1f} MB"  # 17 to 22 MB, by the allocator


def test_one_bank_and_many_tiles_in_half_precision():
    "Scores are computed in float32 under autocast, as the tiled loss does."
    torch.manual_seed(0)
    bank = F.normalize(torch.randn(100, 16))
    v = F.normalize(torch.randn(8, 16))
    expected = bank_cross_entropy(v, bank, torch.arange(8))
    with torch.autocast("cpu", torch.bfloat16):
        found = bank_cross_entropy(v, bank, torch.arange(8), tile=64)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-5)
