r"""How LoRA starts: the first factors A (r, in) and B (out, r), one function per init, in one table.

Where the product of the first factors is not zero, the update is measured from them, s (B A - B0 A0), and the base stays as
it is. U S V^T is a singular value decomposition, G the gradient of a loss in W, X the layer's inputs, C their covariance.

========== ============================================ ==================================
init       A                                            B
========== ============================================ ==================================
True       uniform, bound :math:`1 / \sqrt{in}`         0
False      the same                                     uniform, bound :math:`1/\sqrt r`
gaussian   normal, deviation 1 / r                      0
orthogonal rows that are orthogonal to B's columns      columns, so that B A = 0
pissa      :math:`\sqrt{S_{:r} / s} \, V_{:r}^T` of W   :math:`U_{:r} \sqrt{S_{:r} / s}`
olora      R[:r] of W = Q R                             Q[:, :r]
loftq      as pissa, of W - dequant(Q)                  likewise
mica       0                                            U[:, -r:] of W, frozen
eva        leading principal directions of X            0
corda      as pissa, of W C, times the inverse of C     likewise
lora_ga    leading right singular vectors of G          next left ones, times S
========== ============================================ ==================================

Imports weights, rng, fields, errors.

References:
    He et al., 2015, arXiv 1502.01852. Meng et al., PiSSA, 2024, arXiv 2404.02948, eq. (2). Halko et al., Finding structure
    with randomness, 2009, arXiv 0909.4061, algorithms 4.4 and 5.1. Bueyuekakyuez, OLoRA, 2024, arXiv 2406.01775. Li et al.,
    LoftQ, 2023, arXiv 2310.08659, eq. (7). MiCA: Minor Component Adaptation, 2026, arXiv 2604.01694. Paischer et al., EVA,
    2024, arXiv 2410.07170, section 3. Yang et al., CorDA, 2024, arXiv 2406.05223, section 3. Wang et al., LoRA-GA, 2024,
    arXiv 2407.05000, section 3.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.fields import FrozenDict
from funcpeft.tree import Leaves
from funcpeft.weights import Base

Factors = tuple[Tensor, Tensor]


class Informed(Base):
    """The view of a layer with what ``init`` was given for it beyond the base."""

    __slots__ = ("given",)

    def __init__(self, base: Base, given: Mapping[str, Any]) -> None:
        super().__init__(base.site, base._expr, base._raw_bias)
        self.given = given


@dataclass(frozen=True, eq=False)
class Start:
    """What an init function is given at one site.

    Attributes:
        base: The layer.
        r: The rank.
        scaling: The scaling.
        gen: The generator of its draws.
        a: A as a layer of torch draws it, in the shape to be returned.
        b: B likewise.
        given: What is known beyond the base, by name.
        config: Options of this init.
    """

    base: Base
    r: int
    scaling: float
    gen: torch.Generator
    a: Tensor
    b: Tensor
    given: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Init:
    """One row of the table.

    Attributes:
        factors: Makes A and B.
        kinds: The layer kinds it takes, ``None`` for all.
        share: The rank times this is at most min(out, in).
        need: The argument of ``net.init`` that it takes, ``""`` if there is none.
        entry: The tensor of that argument that it reads at a site, ``""`` where there is one only.
        measured: Whether the update is measured from the first factors.
        rebuilt: Whether these follow from the base alone, so that a file need not hold them.
        kept: Whether a file names the init; else it is one of plain LoRA.
        trains_b: Whether B is trained.
    """

    factors: Callable[[Start], Factors]
    kinds: frozenset[str] | None = None
    share: int = 0
    need: str = ""
    entry: str = ""
    measured: bool = False
    rebuilt: bool = True
    kept: bool = True
    trains_b: bool = True


# -- from draws alone --------------------------------------------------------------------------------------------------------


def zero(start: Start) -> Factors:
    """Draws A anew and sets B to zero."""
    return rng.kaiming(tuple(start.a.shape), start.gen), torch.zeros_like(start.b)


def drawn(start: Start) -> Factors:
    """Takes both as they were drawn."""
    return start.a, start.b


def gaussian(start: Start) -> Factors:
    """Draws A from N(0, 1 / r^2) and sets B to zero."""
    return rng.normal(tuple(start.a.shape), start.gen, 1 / start.r), torch.zeros_like(start.b)


def orthogonal(start: Start) -> Factors:
    """Draws A and B from the even and odd rows of a random orthogonal matrix, so that B A = 0 up to rounding."""
    out, in_, r, gen = *start.base.shape[-2:], start.r, start.gen
    q = torch.linalg.qr(rng.randn((r, r), gen)).Q
    a = (rng.randn((in_, r // 2), gen) @ q[0::2]).T / 10.0
    return a, (rng.randn((r // 2, out), gen).T @ q[1::2]) / 10.0


# -- from the weight ---------------------------------------------------------------------------------------------------------


def principal(matrix: Tensor, r: int, scaling: float) -> Factors:
    """Returns the factors A, B of the r largest singular triplets of a matrix, with ``scaling * B @ A`` their sum."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return _split(u[:, :r], s[:r], vh[:r], scaling)


def _split(u: Tensor, s: Tensor, vh: Tensor, scaling: float) -> Factors:
    root = (s / scaling).sqrt()
    return root[:, None] * vh, u * root


def svd_lowrank(matrix: Tensor, q: int, iterations: int, gen: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Returns U, S, V of a randomised singular value decomposition: that of ``torch.svd_lowrank``, from a generator."""
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.mT if wide else matrix
    basis = torch.linalg.qr(tall @ rng.randn((tall.shape[1], q), gen).to(tall)).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(tall.mT @ basis).Q
        basis = torch.linalg.qr(tall @ basis).Q
    u, s, vh = torch.linalg.svd(basis.mT @ tall, full_matrices=False)
    return (vh.mT, s, basis @ u) if wide else (basis @ u, s, vh.mT)


def pissa(start: Start) -> Factors:
    """Returns the principal factors of the weight."""
    return principal(start.base.weight, start.r, start.scaling)


def pissa_niter(start: Start) -> Factors:
    """Returns nearly the principal factors of the weight, by a randomised decomposition."""
    u, s, v = svd_lowrank(start.base.weight, start.r, start.config["iterations"], start.gen)
    return _split(u, s, v.mT, start.scaling)


def olora(start: Start) -> Factors:
    """Returns the first r rows of R and columns of Q of the QR decomposition of the weight."""
    q, upper = torch.linalg.qr(start.base.weight)
    return upper[: start.r].clone(), q[:, : start.r].clone()


def mica(start: Start) -> Factors:
    """Returns zero and the left singular vectors of the weight's smallest singular values."""
    u = torch.linalg.svd(start.base.weight, full_matrices=False).U
    return torch.zeros_like(start.a), u[:, -start.r :].contiguous()


def loftq(start: Start) -> Factors:
    """Returns the principal factors of what the stored weight lacks of the dense one."""
    if not start.given:  # a file has the factors
        return drawn(start)
    weight = start.base.weight
    lost = start.base.kind.matrix(start.given["weights"]).to(weight) - weight
    return principal(lost, start.r, start.scaling)


# -- from data ---------------------------------------------------------------------------------------------------------------


def eva(start: Start) -> Factors:
    """Returns the leading principal directions of the inputs, and zero; where no input is observed, starts as by default."""
    if not start.given:
        return zero(start)
    found = start.given["statistics"]
    a = found["components"][: start.r].clone()
    if start.config["whiten"]:
        a = a / found["singular"][: start.r].sqrt()[:, None]
    return a, torch.zeros_like(start.b)


def shared_ranks(explained: Mapping[str, Tensor], ranks: Mapping[str, int], rho: float) -> dict[str, int]:
    """Gives the ranks of all sites, as many as there are in sum, to the directions that explain most.

    Args:
        explained: By site, the fractions of the inputs' variance along their principal directions, largest first.
        ranks: By site, the rank that it would have by itself.
        rho: No site gets more than rho times this.
    """
    paths = [path for path in ranks for _ in explained[path][: round(ranks[path] * rho)]]
    values = torch.cat([explained[path][: round(r * rho)].double().cpu() for path, r in ranks.items()])
    best = values.argsort(descending=True, stable=True)[: sum(ranks.values())]
    found = dict.fromkeys(ranks, 0)
    for i in best.tolist():
        found[paths[i]] += 1
    return found


#: Times that ``damped`` doubles what it adds before it gives up; at 2^20 times 0.01 any finite matrix inverts.
_DOUBLINGS = 20


def damped(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a covariance with a multiple of the identity added, 0.01 or more so that it inverts, and the inverse."""
    one, size = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device), covariance.diagonal().mean()
    if not (covariance.isfinite().all() and size > 0):
        rule = "a covariance must be finite, with a diagonal whose mean is above 0"
        raise ValueError(errors.say("init 'corda'", rule, float(size), "collect it from inputs that are not all zero"))
    for doubled in range(_DOUBLINGS):
        made = covariance + 0.01 * 2**doubled * size * one
        inverse, info = torch.linalg.inv_ex(made)
        if not info and torch.dist(made @ inverse, one) < 0.05:
            return made, inverse
    raise ValueError(errors.say("init 'corda'", "a covariance must invert with a multiple of the identity added", "none does"))


def corda(start: Start) -> Factors:
    """Returns factors of the weight's parts that matter most (``"ipm"``) or least (``"kpm"``) for the inputs."""
    if not start.given:
        return drawn(start)
    weight, r = start.base.weight, start.r
    covariance, inverse = damped(start.given["statistics"]["covariance"].to(weight))
    u, s, vh = torch.linalg.svd(weight @ covariance, full_matrices=False)
    rows = slice(r) if start.config["corda_method"] == "ipm" else slice(len(s) - r, None)
    return _split(u[:, rows], s[rows], (vh @ inverse)[rows], start.scaling)


def lora_ga(start: Start) -> Factors:
    """Returns factors along which the first steps of the update follow the gradient of the weight."""
    if not start.given:
        return drawn(start)
    base, r, gen = start.base, start.r, start.gen
    gradient = start.given["gradients"].to(base.weight)
    u, s, v = svd_lowrank(gradient, min(4 * r, *gradient.shape), 4, gen)
    rows, columns = _chosen(start.config["direction"], r, gen)
    a, b = v.mT[rows], u[:, columns] * s[columns]
    match start.config["scale"]:
        case "stable":
            b = b * (base.shape[-2] ** 0.25 / start.config["stable_gamma"] ** 0.5)
        case "weight_svd":
            largest, own = svd_lowrank(base.weight, r, 4, gen)[1][0], s[columns][0]
            b = b * torch.where(own > 0, largest / own, 1.0)
        case "gd_scale":
            a, b = a / start.scaling, b / start.scaling
        case _:  # "unit"
            pass
    return a, b


def _chosen(direction: str, r: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns which of the 2r leading singular vectors A takes, and which B."""
    every = torch.arange(2 * r)
    match direction:
        case "ArBr":
            return every[1::2], every[0::2]
        case "A2rBr":
            return every[r:], every[:r]
        case "ArB2r":
            return every[:r], every[r:]
        case _:  # "random"
            some = torch.randperm(2 * r, generator=gen)[:r]
            return some, some


# -- the table ---------------------------------------------------------------------------------------------------------------

_LINEAR = frozenset({"linear", "transposed"})

TABLE: dict[bool | str, Init] = {
    True: Init(zero),
    False: Init(drawn),
    "gaussian": Init(gaussian),
    "orthogonal": Init(orthogonal, _LINEAR),
    "pissa": Init(pissa, _LINEAR, 1, measured=True),
    "pissa_niter_N": Init(pissa_niter, _LINEAR, 1, measured=True, rebuilt=False, kept=False),
    "olora": Init(olora, _LINEAR, 1, measured=True),
    "loftq": Init(loftq, _LINEAR, 1, "weights", kept=False),
    "mica": Init(mica, _LINEAR | {"embedding"}, 1, trains_b=False),
    "eva": Init(eva, None, 0, "statistics", "components"),
    "corda": Init(corda, _LINEAR, 1, "statistics", "covariance", measured=True, rebuilt=False, kept=False),
    "lora_ga": Init(lora_ga, _LINEAR, 2, "gradients", measured=True, rebuilt=False, kept=False),
}

#: What each argument of ``net.init`` is, and how to pass it, for messages.
_WANTED = {
    "weights": ("the dense weight that was quantized", "call net.init(quantized, seed, weights=dense params)"),
    "statistics": ("statistics of the inputs", "call net.init(params, seed, statistics=calibrate(...))"),
    "gradients": ("the gradient of the weight", "call net.init(params, seed, gradients=weight_gradients(...))"),
}


def key_of(name: object) -> bool | str | None:
    """Returns the key in the table of a value of ``init_lora_weights``, ``None`` if there is none."""
    if isinstance(name, bool):
        return name
    if isinstance(name, str) and re.fullmatch(r"pissa_niter_\d+", name):
        return "pissa_niter_N"
    return name if isinstance(name, str) and name in TABLE and name != "pissa_niter_N" else None


def row_of(name: bool | str) -> Init:
    """Returns the row of the table for a value of ``init_lora_weights``."""
    key = key_of(name)
    assert key is not None
    return TABLE[key]


def options_in(name: bool | str) -> dict[str, int]:
    """Returns the options that the name of an init holds."""
    return {"iterations": int(name.rpartition("_")[2])} if key_of(name) == "pissa_niter_N" and isinstance(name, str) else {}


def is_linear(base: Base) -> bool:
    """Whether a layer is linear; others start without data."""
    return base.kind.name in _LINEAR


def takes_data(row: Init, base: Base) -> bool:
    """Whether an init takes data at a site: a linear layer, whose inputs are observed if it is about these."""
    return bool(row.need) and is_linear(base) and (base.met or row.need != "statistics")


def given_at(label: str, name: bool | str, base: Base, needs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what an init reads at a site of the arguments of ``net.init``.

    Raises:
        ValueError: If it is not there, is empty or not finite, or belongs to a layer of another shape.
    """
    row = row_of(name)
    everything = needs.get(row.need)
    found = None if everything is None else everything.get(base.site.weight if row.need == "weights" else base.path)
    tensor = found.get(row.entry) if row.entry and isinstance(found, Mapping) else found
    wanted, remedy = _WANTED[row.need]
    where = f"{label} at {base.path!r}"
    if not isinstance(tensor, Tensor):
        what = f"{wanted}, its {row.entry}" if row.entry and found is not None else wanted
        raise ValueError(errors.say(where, f"init {name!r} needs {what}", None, remedy))
    out, in_ = base.shape[-2:]
    shapes = {"components": (len(tensor), in_), "covariance": (in_, in_)}
    shape = tuple(base.site.shape) if row.need == "weights" else shapes.get(row.entry, (out, in_))
    if tuple(tensor.shape) != shape:
        raise ValueError(errors.say(where, f"{wanted} must have shape {shape}", tuple(tensor.shape), remedy))
    numbers = [t for t in (found.values() if isinstance(found, Mapping) else (tensor,)) if isinstance(t, Tensor)]
    if not tensor.numel() or not all(t.isfinite().all() for t in numbers):
        raise ValueError(errors.say(where, f"{wanted} must be finite and not empty", None, remedy))
    return {row.need: found}


def informed(
    label: str,
    name: bool | str,
    sites: Mapping[str, Base],
    ranks: Mapping[str, int],
    needs: Mapping[str, Any],
    eva_config: Mapping[str, Any] | None,
) -> dict[str, Base]:
    """Returns the views of all sites, linear ones with what the init was given there, and the rank that EVA gives them."""
    need = row_of(name).need
    if not isinstance(needs.get(need, {}), Mapping):
        raise TypeError(errors.say(label, f"{need} must be a dict from paths", type(needs[need]).__name__, _WANTED[need][1]))
    given = {path: given_at(label, name, base, needs) for path, base in sites.items() if takes_data(row_of(name), base)}
    if name == "eva" and given:
        assert eva_config is not None
        explained = {path: found["statistics"]["explained"] for path, found in given.items()}
        shared = shared_ranks(explained, {path: ranks[path] for path in given}, eva_config["rho"])
        given = {path: {**found, "rank": shared[path]} for path, found in given.items()}
    return {path: Informed(base, given[path]) if path in given else base for path, base in sites.items()}


def in_file(name: bool | str, leaves: Leaves) -> Factors:
    """Returns A and B as a file has them: with the first factors unless reading finds these again, and of rank 1 at least."""
    a, b, row = leaves["A"], leaves["B"], row_of(name)
    if "A0" in leaves and not (row.measured and row.rebuilt):
        a, b = torch.cat([a, leaves["A0"]], -2), torch.cat([b, -leaves["B0"]], -1)
    if not a.shape[-2]:
        a, b = F.pad(a, (0, 0, 0, 1)), F.pad(b, (0, 1))
    return a, b


def samples(name: bool | str, sites: Mapping[str, Base], seed: int) -> dict[str, Any]:
    """Returns made-up data for an init."""
    row, found = row_of(name), {}
    if row.need not in ("statistics", "gradients"):
        return {}
    for path, base in sites.items():
        if not takes_data(row, base):
            continue
        (out, in_), gen = base.shape, rng.generator(seed, f"{path}/{row.need}")
        x = rng.randn((2 * in_ + 3, in_), gen) @ rng.randn((in_, in_), gen)
        s, components = torch.linalg.svd(x, full_matrices=False)[1:]
        data = {
            "components": {"components": components, "singular": s, "explained": s**2 / (s**2).sum()},
            "covariance": {"covariance": x.T @ x / len(x)},
        }
        found[path] = data[row.entry] if row.entry else rng.randn((out, in_), gen)
    return {row.need: found}


# -- options -----------------------------------------------------------------------------------------------------------------

_FLAG = ("True or False", lambda v: isinstance(v, bool))
_PATH = ("a path or None", lambda v: v is None or isinstance(v, str))


def _choice(*values: str) -> tuple[str, Callable[[Any], bool]]:
    return f"one of {errors.listed(values)}", lambda v: v in values


def _number(text: str, test: Callable[[Any], bool]) -> tuple[str, Callable[[Any], bool]]:
    return text, lambda v: isinstance(v, int | float) and not isinstance(v, bool) and test(v)


#: Options by init: default, what a value must be, and the test of that.
OPTIONS: dict[str, dict[str, tuple[Any, tuple[str, Callable[[Any], bool]]]]] = {
    "eva": {
        "rho": (2.0, _number("at least 1", lambda v: v >= 1)),
        "tau": (0.99, _number("in [0, 1]", lambda v: 0 <= v <= 1)),
        "use_label_mask": (True, _FLAG),
        "label_mask_value": (-100, _number("an int", lambda v: isinstance(v, int))),
        "whiten": (False, _FLAG),
        "adjust_scaling_factors": (True, _FLAG),
    },
    "corda": {
        "cache_file": (None, _PATH),
        "covariance_file": (None, _PATH),
        "corda_method": ("ipm", _choice("ipm", "kpm")),
        "verbose": (False, _FLAG),
        "use_float16_for_covariance": (False, _FLAG),
        "prune_temporary_fields": (True, _FLAG),
    },
    "lora_ga": {
        "direction": ("ArB2r", _choice("ArBr", "A2rBr", "ArB2r", "random")),
        "scale": ("stable", _choice("stable", "weight_svd", "gd_scale", "unit")),
        "stable_gamma": (16, _number("positive", lambda v: v > 0)),
    },
}


def options(label: str, name: str, given: Mapping[str, Any] | None) -> FrozenDict:
    """Returns the options of an init, those that are not given at their defaults.

    Raises:
        ValueError: If a key is unknown or a value is not valid.
    """
    where, known = f"{label}: {name}_config", OPTIONS[name]
    for key, value in (given or {}).items():
        if key not in known:
            raise ValueError(errors.say(where, "keys must be known", repr(key), errors.nearest(str(key), known)))
        rule, test = known[key][1]
        if not test(value):
            raise ValueError(errors.say(where, f"{key} must be {rule}", repr(value)))
    return FrozenDict({**{key: default for key, (default, _) in known.items()}, **(given or {})})
