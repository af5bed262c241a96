"""Inputs of `golden/comparators.json` by its formulas; it holds values of the authors' functions.

The inputs of a case follow from its number `c`: which formula makes which input was found by
reproducing the case, and is written where it is used.
"""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

GOLDEN = json.loads((Path(__file__).parent / "golden" / "comparators.json").read_text())


def approx(value):
    return pytest.approx(value, rel=1e-10, abs=1e-10)


def hash01(n: int, c: int) -> np.ndarray:
    "`n` numbers in [0, 1) that follow from `c`."
    limit = np.uint64(0xFFFFFFFF)
    x = np.arange(n, dtype=np.uint64) * np.uint64(2654435761)
    x = (x + np.uint64(c) * np.uint64(40503) + np.uint64(12345)) & limit
    for _ in range(2):
        x ^= x >> np.uint64(16)
        x = (x * np.uint64(0x45D9F3B)) & limit
    x ^= x >> np.uint64(16)
    return x.astype(np.float64) / 2**32


def hash_t(shape: tuple, c: int) -> Tensor:
    "Numbers in [-1, 1), float64."
    return torch.from_numpy(2 * hash01(math.prod(shape), c) - 1).view(shape)


def index_t(shape: tuple, c: int, high: int) -> Tensor:
    "Whole numbers below `high`."
    return torch.from_numpy(np.floor(hash01(math.prod(shape), c) * high)).long().view(shape)


def unit(x: Tensor, dim: int = 1) -> Tensor:
    return x / x.norm(dim=dim, keepdim=True)


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def same(found: Tensor, expected) -> None:
    "Equal to 1e-10, relative to the largest value."
    expected = tensor(expected)
    assert found.shape == expected.shape
    scale = expected.abs().max().clamp_min(1.0)
    assert (found.detach().double() - expected).abs().max() < 1e-10 * scale


def candidates(own: Tensor, index) -> Tensor:
    "Own row, then the negatives of a case."
    return torch.cat([own[:, None], torch.tensor(index)], 1)
