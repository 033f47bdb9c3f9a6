r"""MonteCLoRA: LoRA whose first factor is drawn around its mean in training.

.. math:: A_{\mathrm{eff}} = A + c \sum_e w_e \, (z_e L)^\top, \quad
   L L^\top = \mathrm{diag}(e^{2 \sigma} \odot \chi^2_r), \quad w = \mathrm{softmax}(\sqrt{T} z + \mu)

A (r, in), B (out, r), sigma (r,), omega (n,): trained; z: standard normal; chi^2_r: the diagonal of a Wishart matrix of r
degrees of freedom, at least 1e-3 after scaling; mu and T: the logistic-normal approximation of a Dirichlet of
concentrations exp(omega); c: ``sample_scaler``; n: number of samples. Every draw is of the call's seed; in evaluation, and
merged, it is plain LoRA.

``penalty`` is the variational loss of a training call: the Kullback-Leibler divergences of the Dirichlet, the Wishart and
the normal distribution from their priors, weighted, with the sum of squares of w if ``use_entropy``; the mean over sites, 0
in evaluation.

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

from funcpeft import errors, rng
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


@dataclass(frozen=True, kw_only=True)
class MonteCLoRA(LoRA):
    """Low-rank adaptation with a Bayesian first factor.

    Args:
        monteclora_config: ``num_samples`` (8): n; ``use_entropy`` (False); ``dirichlet_prior`` (0.1): concentrations of the
            prior; ``sample_scaler`` (1e-4): c; ``kl_loss_weight`` (1e-5); ``buffer_size`` (150): how many draws peft makes
            ahead, without a meaning here.

    Other fields are those of ``LoRA``.
    """

    monteclora_config: Mapping[str, Any] | None = None

    peft_switch: ClassVar[str] = "monteclora_config"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "transposed"})
    keys: ClassVar[dict[str, Any]] = {
        **LoRA.keys,
        "sigma": "lora_monteclora_sampler.std_prior",
        "omega": "lora_monteclora_sampler.expert_weights_prior",
        "covariance": "lora_monteclora_sampler.gaussian_var_prior",
        "weights": "lora_monteclora_sampler.expert_weights",
    }
    leaf_names: ClassVar[tuple[str, ...]] = (
        *("A", "B", "A0", "B0", "bias", "sigma", "omega", "covariance", "weights", "scaling", "rank"),
    )
    rank_axes: ClassVar[dict[str, int]] = {}  # what a draw is depends on the rank
    size: ClassVar[str] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = dict(self.monteclora_config or {})
        for name in given.keys() - _DEFAULTS.keys():
            raise ValueError(errors.one_of(self.label, "an entry of monteclora_config", name, _DEFAULTS))
        settled = {**_DEFAULTS, **given}
        for name in ("num_samples", "buffer_size"):
            v = settled[name]
            self.require(isinstance(v, int) and v > 0, f"{name} of monteclora_config", "a positive integer", v)
        prior = settled["dirichlet_prior"]
        self.require(prior > 0, "dirichlet_prior of monteclora_config", "positive", prior)
        object.__setattr__(self, "monteclora_config", FrozenDict(settled))

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
        return Adapter(params, consts)

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
        return {**params, **drawn}, {**consts, "covariance": torch.eye(r), "weights": torch.ones(n) / n}

    def _drawn(self, leaves: Leaves, context: Context) -> tuple[Tensor, Tensor]:
        """Draws the variances ``(r,)`` of the normal distribution and the weights w ``(n,)``."""
        sigma, omega, n = leaves["sigma"], leaves["omega"], self.option("num_samples")
        r = sigma.shape[0]
        chi = context.gaussian(sigma.new_empty(r, r), slot=1).square().sum(0)
        variance = ((2 * sigma).exp() * chi).clamp(min=1e-3)
        alpha = omega.exp().clamp(min=1e-6)
        mu = alpha.log() - alpha.log().mean()
        spread = ((1 - 2 / n) / alpha + (1 / alpha).sum() / n**2).clamp(min=1e-6) + 1e-6
        return variance, torch.softmax(spread.sqrt() * context.gaussian(omega, slot=2) + mu, -1)

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        if not context.training:
            return super().apply(leaves, base, x, context)
        a = leaves["A"]
        variance, w = self._drawn(leaves, context)
        z = context.gaussian(a.new_empty(w.shape[0], *a.shape), slot=3)
        noise = torch.einsum("e,eri->ri", w, z) * variance.sqrt()[:, None]
        return super().apply({**leaves, "A": a + self.option("sample_scaler") * noise}, base, x, context)

    def penalty(self, adapter: Adapter, context: Context = EVAL) -> Tensor:
        if not context.training:
            return torch.zeros(())
        found = []
        for path, leaves in adapter.params.items():
            variance, w = self._drawn(leaves, context.at(salt_of(path), 0))
            divergence = self._dirichlet(leaves["omega"]) + self._wishart(leaves["sigma"]) + self._normal(variance)
            entropy = w.square().sum() if self.option("use_entropy") else 0
            found.append(self.option("kl_loss_weight") * divergence + entropy)
        return torch.stack(found).mean()

    def _dirichlet(self, omega: Tensor) -> Tensor:
        alpha, prior = omega.exp(), torch.full_like(omega, self.option("dirichlet_prior"))
        constants = alpha.sum().lgamma() - alpha.lgamma().sum() - prior.sum().lgamma() + prior.lgamma().sum()
        return constants + ((alpha - prior) * (alpha.digamma() - alpha.sum().digamma())).sum()

    def _wishart(self, sigma: Tensor) -> Tensor:
        r = sigma.shape[0]
        return 0.5 * r * ((2 * sigma).exp().sum() - (2 * sigma).sum() - r)

    def _normal(self, variance: Tensor) -> Tensor:
        return 0.5 * self.option("num_samples") * (variance.sum() - variance.log().sum() - variance.shape[0])
