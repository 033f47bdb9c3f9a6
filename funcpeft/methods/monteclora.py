r"""MonteCLoRA: LoRA whose first factor is drawn around its mean in training.

.. math:: A_{\mathrm{eff}} = A + c \sum_e w_e \, (z_e L)^\top, \quad
   L L^\top = \mathrm{diag}(e^{2 \sigma} \odot \chi^2_r), \quad w = \mathrm{softmax}(\sqrt{T} z + \mu)

A (r, in), B (out, r), sigma (r,), omega (n,): trained; z_e (in, r), z (n,): standard normal; chi^2_r: r independent numbers,
which is how the diagonal of a Wishart matrix with r degrees of freedom is distributed, the only part of it that counts;
variances are 1e-3 at least. mu and T: the logistic-normal approximation of a Dirichlet with concentrations exp(omega);
c: ``sample_scaler``; n: number of samples. In evaluation, and merged, it is plain LoRA.

Every draw is of the call's seed and the site, so nothing is kept from call to call. Draws are laid out such that those of a
member of a stack do not depend on the ranks of the others. peft keeps the last variances and w in its files; they are written
as they are before a call, and mean nothing when read.

``penalty`` of the context of a training call is that call's variational loss: the Kullback-Leibler divergences of the
Dirichlet, the Wishart and the normal distribution from their priors times ``kl_loss_weight``, and the sum of squares of w if
``use_entropy``, as it was where each site was met first; the mean over sites, 0 in evaluation.

References:
    Sengupta et al., Robust and Efficient Fine-tuning of LLMs with Bayesian Reparameterization of Low-Rank Adaptation, 2024,
    arXiv 2411.04358, eq. (3) to (8).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcpeft import errors, lorainits, rng
from funcpeft.context import EVAL, Context
from funcpeft.method import FrozenDict, Method
from funcpeft.methods.lora import LoRA
from funcpeft.tree import Adapter, Leaves
from funcpeft.weights import Base, salt_of

_DEFAULTS: dict[str, Any] = {
    "num_samples": 8,
    "use_entropy": False,
    "dirichlet_prior": 0.1,
    "sample_scaler": 1e-4,
    "kl_loss_weight": 1e-5,
    "buffer_size": 150,
}

_KEYS = {
    "sigma": "lora_monteclora_sampler.std_prior",
    "omega": "lora_monteclora_sampler.expert_weights_prior",
    "variance": "lora_monteclora_sampler.gaussian_var_prior",
    "w": "lora_monteclora_sampler.expert_weights",
}


def square(flat: Tensor, size: int) -> Tensor:
    """Returns the first size^2 of some numbers as a matrix, whose leading parts are those of smaller sizes."""
    i = torch.arange(size, device=flat.device)
    row, column = i[:, None], i[None]
    return flat[torch.where(row >= column, row * row + row + column, column * column + row)]


@dataclass(frozen=True, kw_only=True)
class MonteCLoRA(LoRA):
    """Low-rank adaptation with a Bayesian first factor.

    Args:
        monteclora_config: ``num_samples`` (8): n; ``use_entropy`` (False); ``dirichlet_prior`` (0.1): concentrations of the
            prior; ``sample_scaler`` (1e-4): c; ``kl_loss_weight`` (1e-5); ``buffer_size`` (150): how many draws peft makes
            ahead, without a meaning here.

    Other fields are those of ``LoRA``, whose ``init_lora_weights`` must be one that keeps the rank and is found again from a
    file and the base.
    """

    monteclora_config: Mapping[str, Any] | None = None

    peft_switch: ClassVar[str] = "monteclora_config"
    kinds: ClassVar[frozenset[str]] = LoRA.kinds - {"raw"}
    keys: ClassVar[dict[str, Any]] = {**LoRA.keys, **_KEYS, "embedding": {**LoRA.keys["embedding"], **_KEYS}}
    leaf_names: ClassVar[tuple[str, ...]] = (
        *("A", "B", "A0", "B0", "bias", "sigma", "omega", "variance", "w", "scaling", "rank"),
    )
    rank_axes: ClassVar[dict[str, int]] = {**LoRA.rank_axes, "sigma": -1, "variance": -1}
    size: ClassVar[str] = ""  # the number of samples is an entry of a field

    def __post_init__(self) -> None:
        super().__post_init__()
        given = dict(self.monteclora_config or {})
        for name in given.keys() - _DEFAULTS.keys():
            raise ValueError(errors.one_of(self.label, "an entry of monteclora_config", name, _DEFAULTS))
        settled = {**_DEFAULTS, **given}
        for name in ("num_samples", "buffer_size"):
            v = settled[name]
            self.require(type(v) is int and v > 0, f"{name} of monteclora_config", "a positive integer", v)
        for name in ("dirichlet_prior", "sample_scaler", "kl_loss_weight"):
            v, least = settled[name], "positive" if name == "dirichlet_prior" else "non-negative"
            number = isinstance(v, int | float) and (v > 0 if least == "positive" else v >= 0)
            self.require(number, f"{name} of monteclora_config", f"a {least} number", v)
        object.__setattr__(self, "monteclora_config", FrozenDict(settled))
        row = lorainits.row_of(self.init_lora_weights)
        fits = row.rebuilt and row.entry != "components"
        rule = "one that keeps the rank and that a file and the base tell again"
        self.require(fits, "init_lora_weights", rule, self.init_lora_weights, "use True")

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return (cls(r=2, lora_alpha=3, monteclora_config={"num_samples": 3, "sample_scaler": 0.1}),)

    def option(self, name: str) -> Any:
        """Returns an entry of ``monteclora_config``."""
        assert self.monteclora_config is not None
        return self.monteclora_config[name]

    def init(self, sites: Mapping[str, Base], *, seed: int | rng.Stream, **needs: Any) -> Adapter:
        if not isinstance(seed, rng.Stream):
            return super().init(sites, seed=seed, **needs)
        params, consts = {}, {}
        for path, base in sites.items():  # after each site peft draws its noise ahead from the same stream
            made = super().init({path: base}, seed=seed, **needs)
            params |= made.params
            consts |= made.consts
            self._skip(base, seed.generator)
        return Adapter(params, consts, tuple(sorted(self.rank_axes.items())))

    def _skip(self, base: Base, gen: torch.Generator) -> None:
        r, count, ahead = self.rank(base.path), self.option("num_samples"), self.option("buffer_size")
        with rng.lent(gen):
            torch.randn(ahead, count, base.shape[-1], r)
            torch.randn(ahead, count)
            wishart = torch.distributions.Wishart(df=r, scale_tril=torch.eye(r))
            for _ in range(ahead):
                wishart._bartlett_sampling(torch.Size())

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        params, consts = super().init_site(base, gen)
        r, n = self.rank(base.path), self.option("num_samples")
        drawn = {"sigma": torch.rand(r, generator=gen), "omega": torch.rand(n, generator=gen)}
        return {**params, **drawn}, {**consts, "variance": torch.ones(r), "w": torch.ones(n) / n}

    def perturbed(self, leaves: Leaves, variance: Tensor, w: Tensor, z: Tensor) -> Tensor:
        """Returns A with its noise, of variances ``(r,)``, weights ``(n,)`` and standard normal numbers ``(r, n, in)``."""
        noise = torch.einsum("n,rni->ri", w, z) * variance.sqrt()[:, None]
        return leaves["A"] + self.option("sample_scaler") * torch.where(_kept(leaves)[:, None], noise, 0)

    def variance(self, leaves: Leaves, z: Tensor) -> Tensor:
        """Returns the variances ``(r,)`` of standard normal numbers ``(r, r)``; 1 where the rank is padded."""
        kept = _kept(leaves)
        chi = torch.where(kept, z.square(), 0).sum(-1)
        return torch.where(kept, ((2 * leaves["sigma"]).exp() * chi).clamp(min=1e-3), 1)

    def weights(self, leaves: Leaves, z: Tensor) -> Tensor:
        """Returns w ``(n,)`` of standard normal numbers ``(n,)``."""
        n, alpha = z.shape[0], leaves["omega"].exp().clamp(min=1e-6)
        spread = ((1 - 2 / n) / alpha + (1 / alpha).sum() / n**2).clamp(min=1e-6) + 1e-6
        return torch.softmax(spread.sqrt() * z + alpha.log() - alpha.log().mean(), -1)

    def drawn(self, leaves: Leaves, context: Context) -> tuple[Tensor, Tensor]:
        """Draws variances and w at a site; its context tells sites and meetings apart."""
        sigma, omega = leaves["sigma"], leaves["omega"]
        r = sigma.shape[0]
        chi = square(context.gaussian(sigma.new_empty(r * r), slot=1), r)
        return self.variance(leaves, chi), self.weights(leaves, context.gaussian(omega, slot=2))

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        if context.training:
            a = leaves["A"]
            variance, w = self.drawn(leaves, context)
            z = context.gaussian(a.new_empty(a.shape[0], w.shape[0], a.shape[1]), slot=3)
            leaves = {**leaves, "A": self.perturbed(leaves, variance, w, z)}
        return super().apply(leaves, base, x, context)

    def penalty(self, adapter: Adapter, context: Context = EVAL) -> Tensor:
        if not context.training:
            return torch.zeros(())
        found: list[Tensor] = []
        for path in adapter.params:
            leaves = adapter.leaves(path)
            variance, w = self.drawn(leaves, context.at(salt_of(path), 0))
            divergence = self.of_dirichlet(leaves) + self.of_wishart(leaves) + self.of_normal(variance)
            entropy = w.square().sum() if self.option("use_entropy") else 0
            found.append(self.option("kl_loss_weight") * divergence + entropy)
        return torch.stack(found).mean()

    def of_dirichlet(self, leaves: Leaves) -> Tensor:
        """Computes the divergence of the Dirichlet distribution from its prior."""
        alpha = leaves["omega"].exp()
        prior = torch.full_like(alpha, self.option("dirichlet_prior"))
        constants = alpha.sum().lgamma() - alpha.lgamma().sum() - prior.sum().lgamma() + prior.lgamma().sum()
        return constants + ((alpha - prior) * (alpha.digamma() - alpha.sum().digamma())).sum()

    def of_wishart(self, leaves: Leaves) -> Tensor:
        """Computes the divergence of the Wishart distribution of scale diag(exp(2 sigma)) from that of scale 1."""
        twice = 2 * leaves["sigma"]
        return 0.5 * leaves["rank"] * torch.where(_kept(leaves), twice.exp() - twice - 1, 0).sum()

    def of_normal(self, variance: Tensor) -> Tensor:
        """Computes the divergence of the normal distribution of some variances from the standard one, of all samples."""
        return 0.5 * self.option("num_samples") * (variance - variance.log() - 1).sum()

    def to_peft(self, base: Base | None, leaves: Leaves) -> dict[str, Tensor]:
        return super().to_peft(base, {**leaves, "variance": torch.diag(leaves["variance"])})

    def from_peft(self, base: Base | None, tensors: Mapping[str, Tensor]) -> Leaves:
        leaves = super().from_peft(base, tensors)
        return {**leaves, "variance": leaves["variance"].diagonal().clone()}


def _kept(leaves: Leaves) -> Tensor:
    """Returns which entries along the rank are no padding: ``(r,)``."""
    sigma = leaves["sigma"]
    return torch.arange(sigma.shape[0], device=sigma.device) < leaves["rank"]
