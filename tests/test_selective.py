"Selective kernels train: in bf16, and with global BatchNorm on two processes as on one."
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from processes import run
from simclr_nb.core.processes import shard_rows, world_size
from simclr_nb.loss.contrastive import nt_xent
from simclr_nb.model.encoder import create_encoder
from simclr_nb.model.head import SimCLR, projection_head
from simclr_nb.parallel.loss import global_nt_xent
from simclr_nb.parallel.norm import batch_norms, to_global_batch_norm

IMAGES = 8


def simclr(**options) -> SimCLR:
    torch.manual_seed(0)
    encoder = create_encoder("resnet50", width=1 / 16, sk_ratio=0.0625, zero_init_last=False, **options)
    return SimCLR(encoder, projection_head(encoder.out_dim, 8, batch_norm=True))


def views(rank: int = 0, world: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(IMAGES, 3, 32, 32, generator=generator, dtype=torch.float64)
    rows = list(shard_rows(IMAGES, rank, world))
    return torch.cat([images[rows], images.flip(3)[rows].square()])


def step(model: torch.nn.Module, z_loss, x: Tensor) -> dict:
    "Loss, gradients and running statistics after one step."
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss = z_loss(model(x).z)
    loss.backward()
    inner = getattr(model, "module", model)
    gradients = {k: p.grad.clone() for k, p in inner.named_parameters()}
    optimizer.step()
    return dict(loss=loss.detach(), state={k: v.clone() for k, v in inner.state_dict().items()}, **gradients)


def two_processes(rank: int, world: int) -> dict:
    model = to_global_batch_norm(simclr().double())
    assert len(list(batch_norms(model))) == 73  # 71 of the encoder, 2 of the head
    return step(DistributedDataParallel(model), global_nt_xent, views(rank, world))


def test_two_processes_are_one(tmp_path):
    one = step(simclr().double(), nt_xent, views())
    two = run(two_processes, 2, tmp_path)
    assert abs(sum(r["loss"] for r in two) / 2 - one["loss"]) < 1e-9
    names = [k for k in one if k not in ("loss", "state")]
    assert any("squeeze" in name for name in names) and any("mix" in name for name in names)
    for name in names:
        scale = one[name].abs().max() + 1e-12
        assert ((two[0][name] - one[name]).abs().max() / scale) < 1e-6, name
    for name, value in one["state"].items():
        assert torch.allclose(two[1]["state"][name].double(), value.double(), atol=1e-8), name


def test_a_step_in_bf16_lowers_the_loss():
    model, x = simclr(stem="cifar"), views().float()
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16): z = model(x).z
        loss = nt_xent(z.float())
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print("losses in bf16", [f"{loss:.3f}" for loss in losses])
    assert min(losses[1:]) < losses[0]
