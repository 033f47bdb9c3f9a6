"""Randomness: seeded generators for init, and counter-based draws inside a call.

At init a seed is an int; each site draws from its own generator, made from the seed and the site's path, so adding a site
changes no other site's draw. Inside a call a generator would neither compile nor vmap, so draws there are a hash of
(key, element index) in integer tensor operations: the same bits eagerly, under ``vmap``, compiled, and on replay.

The only file that makes a generator. Imports torch alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def fold_in(seed: int, *data: str | int) -> int:
    """Derives a new 63-bit seed from a seed and some data, by SHA-256; stable across platforms and releases."""
    text = "\x1f".join([str(seed), *map(str, data)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@dataclass(frozen=True)
class Stream:
    """One generator shared by every site in module order: how peft draws, for parity with it."""

    seed: int
    generator: torch.Generator = field(compare=False)


def stream(seed: int) -> Stream:
    """Makes a shared stream that equals torch's global CPU stream after ``torch.manual_seed(seed)``."""
    return Stream(seed, torch.Generator().manual_seed(seed))


@contextmanager
def lent(gen: torch.Generator) -> Iterator[None]:
    """Lets functions that draw from torch's global CPU generator draw from another one, and leaves the global one as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(gen.get_state())
        yield
        gen.set_state(torch.get_rng_state())


def generator(seed: int | Stream, path: str) -> torch.Generator:
    """Returns the generator a site draws from: its own for an int seed, the shared one for a ``Stream``."""
    if isinstance(seed, Stream):
        return seed.generator
    return torch.Generator().manual_seed(fold_in(seed, path))


def kaiming(shape: tuple[int, ...], gen: torch.Generator, a: float = 5**0.5) -> Tensor:
    """Draws U(+-bound) with bound = sqrt(6 / ((1 + a^2) fan_in)), float32, fan_in = product of all dims but the first.

    With a = sqrt(5) the bound is 1 / sqrt(fan_in), the default of torch's linear layers. Reference: He et al., 2015,
    arXiv 1502.01852.
    """
    drawn = torch.empty(shape, dtype=torch.float32)
    if not drawn.numel():
        return drawn
    return torch.nn.init.kaiming_uniform_(drawn, a=a, generator=gen)


def normal(shape: tuple[int, ...], gen: torch.Generator, std: float = 1.0, mean: float = 0.0) -> Tensor:
    """Draws N(mean, std^2) in float32, consuming a generator as ``torch.nn.init.normal_`` does."""
    return torch.empty(shape, dtype=torch.float32).normal_(mean, std, generator=gen)


def uniform(shape: tuple[int, ...], gen: torch.Generator, bound: float) -> Tensor:
    """Draws U(-bound, bound) in float32."""
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=gen)


def randn(shape: tuple[int, ...], gen: torch.Generator) -> Tensor:
    """Draws N(0, 1) in float32, consuming a generator as ``torch.randn`` does."""
    return torch.randn(shape, generator=gen, dtype=torch.float32)


def _mix(h: Any) -> Any:
    """Mixes 32 bits held in an int or an int64 tensor (multiplicative xorshift); multipliers below 2^31 cannot overflow."""
    h = ((h ^ (h >> 16)) * 0x21F0AAAD) & _MASK
    h = ((h ^ (h >> 15)) * 0x735A2D97) & _MASK
    return h ^ (h >> 15)


def key(seed: int | Tensor, *salts: int) -> tuple[Any, Any]:
    """Makes the key of a draw, two 32-bit words, from a seed (all 64 bits count) and salts.

    Affine in the seed, so that a compiler that inlines every use of a value does not meet an exponential expression.

    Args:
        seed: An int, or a 0-d integer tensor (one that vmaps per member, or changes without a recompile).
        salts: Ints that tell this draw from others of the same seed.
    """
    salt = 0x9E3779B9
    for s in salts:
        salt = _mix((salt * 31 + s) & _MASK)
    seed = seed.to(torch.int64) if isinstance(seed, Tensor) else seed
    low, high = seed & _MASK, (seed >> 32) & _MASK
    first = (low * 0x2545F491 + high * 0x6A09E667 + salt) & _MASK
    second = (low * 0x3C6EF372 + high * 0x510E527F + _mix(salt)) & _MASK
    return first, second


def bits(key: tuple[Any, Any], shape: tuple[int, ...] | torch.Size, device: torch.device) -> Tensor:
    """Draws uniform 32-bit integers (int64 tensor of ``shape``) by hashing the element index with the key."""
    first, second = (k.to(device) if isinstance(k, Tensor) else k for k in key)
    count = 1
    for n in shape:
        count *= n
    index = torch.arange(count, device=device, dtype=torch.int64).reshape(shape)
    return _mix((_mix(index ^ first) + second) & _MASK)


def dropout(x: Tensor, p: float, key: tuple[Any, Any]) -> Tensor:
    """Zeroes elements with probability ``p`` and divides the rest by ``1 - p``; the mask depends on key and shape alone."""
    if p >= 1.0:
        return x * 0.0
    keep = bits(key, x.shape, x.device) >= int(p * 2**32)
    return torch.where(keep, x / (1.0 - p), torch.zeros_like(x))


def unit(like: Tensor, key: tuple[Any, Any]) -> Tensor:
    """Draws U[0, 1) in the shape, dtype and device of a tensor, in steps of 2^-24, by hashing as ``bits`` does."""
    return ((bits(key, like.shape, like.device) >> 8).to(torch.float32) * 2.0**-24).to(like.dtype)


def gaussian(like: Tensor, key: tuple[Any, Any]) -> Tensor:
    """Draws N(0, 1) in the shape, dtype and device of a tensor, computed in float32.

    References:
        Box and Muller, A Note on the Generation of Random Normal Deviates, 1958, eq. (1).
    """
    first, second = key
    wide = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    radius = (-2 * torch.log(1 - unit(wide, key))).sqrt()
    angle = 2 * torch.pi * unit(wide, (second, _mix((first + 1) & _MASK)))
    return (radius * torch.cos(angle)).to(like.dtype)
