"""Gradients of every convolution against float64, as processors without AVX-512 compute them.

There, in channels-last memory, strided 1x1 convolutions of few channels crash, hang or go wrong in the
backward pass. So each layer runs in a child process that may die, in the layout the package picks.
"""
import json
import os
import subprocess
import sys

import pytest

OLDER = dict(ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="avx2")
PATIENT = dict(OMP_WAIT_POLICY="PASSIVE")  # else threads that share a core spin instead of working
CHECK = """
import json, sys
from itertools import product
import torch
from torch import nn
from simclr_nb.model.encoder import create_encoder
from simclr_nb.model.resnet import DEPTHS, _shortcut_conv
from simclr_nb.model.inputs import memory_format_for

def error(layer, shape, rounds):
    "Largest error of the gradients of weight and input, as a share of the largest gradient."
    layout, worst = memory_format_for(layer), 0.0
    layer = layer.to(memory_format=layout).requires_grad_(True)
    exact = type(layer).__new__(type(layer))
    exact.__dict__.update(layer.__dict__)
    exact._parameters = {k: None if p is None else p.detach().double().contiguous().requires_grad_()
                         for k, p in layer.named_parameters()} | dict(
                             bias=None if layer.bias is None else layer.bias.detach().double())
    for _ in range(rounds):
        layer.zero_grad()
        x = torch.rand(shape).contiguous(memory_format=layout).requires_grad_()
        y = layer(x)
        g = torch.randn_like(y)
        y.backward(g)
        x64 = x.detach().double().contiguous().requires_grad_()
        found = torch.autograd.grad(exact(x64), [exact.weight, x64], g.double())
        for a, b in zip((layer.weight.grad, x.grad), found):
            worst = max(worst, ((a - b).abs().max() / b.abs().max()).item())
    return worst

def shapes():
    "Strided 1x1 convolutions: a user's own and those of our shortcuts."
    channels = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 32, 64)
    for i, o, size in product(channels, (16, 64), (4, 8, 16, 32)):
        for layer in (nn.Conv2d(i, o, 1, 2, bias=False), _shortcut_conv(i, o, 2)):
            yield f"{type(layer).__name__} {i} to {o}, {size} px", layer, (8, i, size, size), 8

def networks():
    "Each convolution of each network of the package, once."
    names = [(f"resnet{d}", dict(width=w, stem=stem), size) for d in DEPTHS
             for w in (1/16, 1/8, 1/4, 1/2, 1) for stem, size in (("cifar", 32), ("imagenet", 64))]
    names += [(f"resnet{d}", dict(width=w, stem="cifar", shortcut="projection"), 32)
              for d in (18, 50) for w in (1/16, 1)]
    names += [(f"amdim/{a}", dict(size=s), s) for a in ("16-128-1", "32-256-2", "64-512-3")
              for s in (32, 64)]
    seen = {}
    def note(m, inputs, out):
        key = (type(m), m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding,
               getattr(m, "step", 1), inputs[0].shape[-1], m.bias is None)
        seen.setdefault(key, (m, inputs[0].shape[1:]))
    for arch, options, size in names:
        with torch.device("meta"):
            encoder = create_encoder(arch, **options)
            hooks = [m.register_forward_hook(note) for m in encoder.modules() if isinstance(m, nn.Conv2d)]
            encoder.eval()(torch.rand(2, 3, size, size))
    for key, (m, shape) in seen.items():
        layer = m.to_empty(device="cpu")
        layer._forward_hooks.clear()
        nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
        if layer.bias is not None: nn.init.zeros_(layer.bias)
        yield f"{layer} on {tuple(shape)}", layer, (4, *shape), 2

torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
found = {}
for kind in (shapes, networks):
    found[kind.__name__] = errors = {}
    for name, layer, shape, rounds in kind():
        print(name, file=sys.stderr, flush=True)                  # the last line names what died
        errors[name] = error(layer, shape, rounds)
print(json.dumps(found))
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_without_avx512(threads):
    command = [sys.executable, "-W", "ignore", "-c", CHECK, str(threads)]
    done = subprocess.run(command, env=dict(os.environ, **OLDER, **PATIENT), capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for which, least in dict(shapes=112, networks=150).items():
        errors = json.loads(done.stdout)[which]
        assert len(errors) >= least
        wrong = {name: error for name, error in errors.items() if error > 2e-5}
        assert not wrong, wrong
