r"""X-LoRA: a classifier on the model's own hidden states mixes LoRA experts, per token and layer.

.. math:: y_l = W_l x + b_l + \gamma \sum_k w_{lk} \, s_{lk} B_{lk} A_{lk} \, \mathrm{drop}(x), \quad
    w = \mathrm{softmax}\big(f(h) / \tau\big)

A (K, r, in), B (K, out, r), scaling s (K,) at every site l: the factors of K LoRA experts; w (rows, T, L or 1, K): the
weights of a call, for T tokens, L sites and K experts; gamma: ``global_scaling_weight``. A call runs the model twice. In the
first pass, without gradients, every expert has the constant weight ``scaling_pass_value`` (0: the base); h is its last hidden
state. The classifier f is ``xlora_depth`` linear layers with ReLU and dropout between, W0, b0, W1, b1, ... and at last
W (L or 1, K, width) and b (L or 1, K): K numbers per token, or L K with ``layerwise_scalings``. With ``top_k_lora`` a site
keeps its largest weights, and with ``enable_softmax_topk`` takes the softmax of those that are not zero; in the first pass
too, as in peft. Ranks are padded with zeros, and an expert that leaves a site alone counts as zero there. Tokens differ in
their weights, so there is no merged form.

The weights are the value ``xlora_scalings`` of a call; ``Context(values={"xlora_scalings": w})`` gives them, and then the
model runs once. Both passes need all tokens, so a call takes no cache, and ``generate`` runs without one.

Experts are adapters of ``LoRA`` at sites of this net, ``net.init(params, seed, experts=[...])``. A file holds the classifier,
and the config says where the experts are (``adapters``), so it is read with them, ``load_peft(..., experts=[...])``, whose
targets are then theirs. Experts trained along are in the file as well, under keys that peft passes over; for peft, take them
out by ``expert`` and save each by itself. peft 0.21's own files lack every layer of the classifier whose number is the name
of an expert, at depth 1 all of it; those written here are whole, and peft reads them.

References:
    Buehler and Buehler, X-LoRA, 2024, arXiv 2402.07148, section 2.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.context import Context
from funcpeft.fields import thaw
from funcpeft.method import Method
from funcpeft.methods.arrow import bank, checked_experts, listed_experts
from funcpeft.methods.lora import LoRA
from funcpeft.tree import Adapter, Leaves, Tree
from funcpeft.weights import Base

Call = Callable[..., Any]

_LAYERS = "base_model.internal_xlora_classifier.layers."
#: Fields of every method that peft's config of this one lacks.
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")


def kept(weights: Tensor, k: int | None, *, softmax: bool) -> Tensor:
    """Returns weights ``(..., K)`` of which those beyond the ``k`` largest are zero, the rest normalised if so asked."""
    if k is not None:
        top, which = torch.topk(weights, k, dim=-1)
        weights = torch.zeros_like(weights).scatter(-1, which, top)
    if not softmax:
        return weights
    none = weights == 0
    full = weights.masked_fill(none, -torch.inf)
    return torch.softmax(full.masked_fill(none.all(-1, keepdim=True), 0), -1).masked_fill(none, 0)


def _width(facts: Any) -> int:
    """Returns the width of the model's hidden states."""
    found = getattr(facts.config, "hidden_size", None)
    if not isinstance(found, int):
        rule, remedy = "the config must say the width of its hidden states (hidden_size)", "use a transformers model"
        raise ValueError(errors.say(facts.name, rule, type(facts.config).__name__, remedy))
    return found


@dataclass(frozen=True, kw_only=True)
class XLoRA(Method):
    """LoRA experts mixed by a classifier.

    Args:
        hidden_size: Width of the model's hidden states, which peft writes into its files; must be the model's where given.
        adapters: Where the experts are, by name, for files; their order is that of ``experts``.
        enable_softmax: Whether the classifier's output goes through a softmax over experts.
        enable_softmax_topk: Whether the weights that a site keeps go through a softmax.
        layerwise_scalings: Whether every site has weights of its own.
        xlora_depth: Number of linear layers of the classifier.
        xlora_size: Width between them.
        xlora_dropout_p: Dropout between them in training.
        use_trainable_adapters: Whether the experts are trained too.
        softmax_temperature: tau.
        top_k_lora: Number of experts that a site keeps per token; all by default.
        scaling_pass_value: Weight of every expert in the first pass.
        global_scaling_weight: gamma.
        lora_dropout: Probability with which elements of an expert's input are dropped in training; peft keeps it in the configs
            of the experts.
    """

    hidden_size: int | None = None
    adapters: Mapping[str, str] | None = None
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0
    lora_dropout: float = 0.0

    peft_type: ClassVar[str] = "XLORA"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "transposed", "embedding"})
    peft_lacks: ClassVar[tuple[str, ...]] = (*_TARGETS, "lora_dropout")
    leaf_names: ClassVar[tuple[str, ...]] = ("A", "B", "scaling", "rank", "ranks")
    rank_axes: ClassVar[dict[str, int]] = {"A": -2, "B": -1}
    weight_free: ClassVar[bool] = True
    identity_at_init: ClassVar[bool] = False
    depends_on_sites: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("experts",)
    file_needs: ClassVar[tuple[str, ...]] = ("experts",)
    context_names: ClassVar[tuple[str, ...]] = ("xlora_scalings",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("xlora_size")
        self.require(0 < self.xlora_depth <= 1000, "xlora_depth", "from 1 to 1000", self.xlora_depth)
        self.require_probability("xlora_dropout_p", "lora_dropout")
        for name in ("hidden_size", "top_k_lora"):
            if getattr(self, name) is not None:
                self.require_positive(name)
        tau = self.softmax_temperature
        self.require(tau > 0, "softmax_temperature", "positive", tau)
        self.require(not self.modules_to_save, "modules_to_save", "None", self.modules_to_save, "add a Full method to the net")

    @classmethod
    def examples(cls) -> tuple[XLoRA, ...]:
        """Returns a linear classifier, and a deeper one of weights by layer with every other option."""
        names = {"0": "first", "1": "second", "2": "third"}
        deep = {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 5, "softmax_temperature": 0.5, "top_k_lora": 2}
        more = {"enable_softmax_topk": True, "scaling_pass_value": 0.4, "global_scaling_weight": 1.5, "lora_dropout": 0.25}
        return cls(adapters=names), cls(adapters=names, **deep, **more)

    def sample_needs(self, sites: Mapping[str, Base], seed: int) -> dict[str, Any]:
        plain = [LoRA(r=r, lora_alpha=3, init_lora_weights=False) for r in (1, 2, 2)]
        return {"experts": [m.init(sites, seed=rng.fold_in(seed, "expert", i)) for i, m in enumerate(plain)]}

    def check_model(self, facts: Any) -> None:
        """Raises ``ValueError`` if the model does not fit; reads its config only."""
        if facts.encoder_decoder:
            rule, remedy = "the classifier reads the hidden states of one stack", "use LoRA"
            raise ValueError(errors.say(self.label, rule, f"{facts.name} has an encoder and a decoder", remedy))
        width = _width(facts)
        self.require(self.hidden_size in (None, width), "hidden_size", f"None or the model's, {width}", self.hidden_size)

    def completed(self, needs: Mapping[str, Any]) -> Self:
        experts = needs.get("experts")
        if experts is None:
            rule, remedy = "the file does not hold the experts", "pass load_peft(..., experts=[...])"
            raise ValueError(errors.say(self.label, rule, sorted(self.adapters or ()), remedy))
        paths = {p for one in listed_experts(self.label, experts) for p in (*one.params, *one.consts)}
        return replace(self, target_modules=tuple(sorted(paths)))

    # -- init ----------------------------------------------------------------------------------------------------------

    def init(self, sites: Mapping[str, Base], *, seed: int | rng.Stream, **needs: Any) -> Adapter:
        """Takes the experts in and draws the classifier.

        Args:
            sites: The sites.
            seed: Determines the classifier.
            needs: ``experts``, a list of LoRA adapters; ``facts`` of the model. Where only shapes are asked for
                (``inference_mode``) there may be no experts, and then there are no leaves of theirs.
        """
        axes, facts = tuple(sorted(self.rank_axes.items())), needs["facts"]
        if needs.get("experts") is None and needs.get("inference_mode"):
            count = len(self.adapters or ())
            return Adapter({"": self._classifier(count, len(sites), facts, seed)} if count else {}, {}, axes)
        experts = checked_experts(self.label, needs.get("experts"), sites)
        count, names = len(experts), self.adapters
        rule = f"the {len(names or ())} that adapters names"
        self.require(names is None or len(names) == count, "experts", rule, count)
        rule = f"at most the number of experts, {count}"
        self.require(self.top_k_lora is None or self.top_k_lora <= count, "top_k_lora", rule, self.top_k_lora)
        params: Tree = {"": self._classifier(count, len(sites), facts, seed)}
        consts: Tree = {}
        for path, base in sites.items():
            leaves = bank(self, experts, base)
            trained = ("A", "B") if self.use_trainable_adapters else ()
            if trained:
                params[path] = {name: leaves[name] for name in trained}
            consts[path] = {name: t for name, t in leaves.items() if name not in trained}
            consts[path]["rank"] = torch.tensor(leaves["A"].shape[-2])
        return Adapter(params, consts, axes)

    def _classifier(self, experts: int, sites: int, facts: Any, seed: int | rng.Stream) -> Leaves:
        gen, groups = rng.generator(seed, ""), sites if self.layerwise_scalings else 1
        widths = [_width(facts), *(self.xlora_size for _ in range(self.xlora_depth - 1)), groups * experts]
        drawn = [
            (rng.kaiming((out, in_), gen), rng.uniform((out,), gen, 1 / math.sqrt(in_)))
            for in_, out in itertools.pairwise(widths)
        ]
        leaves = {f"{name}{i}": t for i, pair in enumerate(drawn[:-1]) for name, t in zip("Wb", pair, strict=True)}
        w, b = drawn[-1]
        return {**leaves, "W": w.unflatten(0, (groups, experts)), "b": b.unflatten(0, (groups, experts))}

    def expert(self, adapter: Adapter, index: int) -> Adapter:
        """Returns an expert as an adapter of its own, with the sites at which it acts, for a net of ``LoRA``."""
        params: Tree = {}
        consts: Tree = {}
        for path in adapter.consts:
            t = adapter.leaves(path)
            r = int(t["ranks"][index])
            if r:
                params[path] = {"A": t["A"][index, :r].clone(), "B": t["B"][index, :, :r].clone()}
                consts[path] = {"scaling": t["scaling"][index].clone(), "rank": torch.tensor(r)}
        return Adapter(params, consts, tuple(sorted(self.rank_axes.items())))

    # -- the call ------------------------------------------------------------------------------------------------------

    def wrap(self, leaves: Leaves, call: Call, kind: str, facts: Any) -> Call:
        """Returns the call in two passes; every forward of ``generate`` is made of two."""
        given = "xlora_scalings" in facts.values
        if kind == "forward":
            return call if given else functools.partial(self._twice, leaves, facts, call)
        if given:
            rule, remedy = "generate computes xlora_scalings for all tokens at every step", "leave the value out"
            raise ValueError(errors.say(self.label, rule, "given ones", remedy))
        around = functools.partial(self._twice, leaves, facts)

        def generate(**inputs: Any) -> Any:
            return call(**{**inputs, "use_cache": False, "forwards": (*inputs.get("forwards", ()), around)})

        return generate

    def _twice(self, leaves: Leaves, facts: Any, forward: Call, **inputs: Any) -> Any:
        if facts.takes_cache:
            if inputs.get("use_cache") or inputs.get("past_key_values") is not None:
                rule, found = "both passes need all tokens, so a call takes no cache", "use_cache or past_key_values"
                raise ValueError(errors.say(self.label, rule, found, "pass use_cache=False"))
            inputs = {**inputs, "use_cache": False}
        given = next((inputs[n] for n in ("input_ids", "inputs_embeds") if inputs.get(n) is not None), None)
        if given is None:
            raise ValueError(errors.say(self.label, "input_ids or inputs_embeds must be given", "neither"))
        w = leaves["W"]
        constant = torch.full((*given.shape[:2], 1, w.shape[-2]), self.scaling_pass_value, dtype=w.dtype, device=given.device)
        asked = {**inputs, "output_hidden_states": True, "return_dict": True}
        with torch.no_grad():
            hidden = forward(values={"xlora_scalings": constant}, **asked).hidden_states[-1].detach()
        return forward(values={"xlora_scalings": self.scalings(leaves, hidden, facts.context)}, **inputs)

    def scalings(self, leaves: Leaves, hidden: Tensor, context: Context) -> Tensor:
        """Computes the weights of a call from hidden states ``(rows, T, hidden)``: ``(rows, T, L or 1, K)``.

        Args:
            leaves: The classifier's, or one per row.
            hidden: Hidden states of the first pass.
            context: The context of the call.
        """
        mapped = leaves["W"].ndim > 3
        if mapped and hidden.shape[0] != leaves["W"].shape[0]:  # generate has repeated the rows, for beams
            leaves = {n: t.repeat_interleave(hidden.shape[0] // t.shape[0], 0) for n, t in leaves.items()}
        w, b = leaves["W"], leaves["b"]
        h = hidden.to(w.dtype)
        for i in range(self.xlora_depth - 1):
            h = torch.relu(h @ leaves[f"W{i}"].mT + leaves[f"b{i}"].unsqueeze(-2))
            h = self._dropped(h, i, context, mapped=mapped)
        h = (h @ w.flatten(-3, -2).mT + b.flatten(-2).unsqueeze(-2)).unflatten(-1, b.shape[-2:])
        return torch.softmax(h / self.softmax_temperature, -1) if self.enable_softmax else h

    def _dropped(self, h: Tensor, layer: int, context: Context, *, mapped: bool) -> Tensor:
        p = self.xlora_dropout_p
        if mapped and context.training and p:  # rows of several members: the draws would not be those of each
            rule, remedy = "in training the classifier's dropout draws for one member", "use strategy='vmap' or 'loop'"
            raise ValueError(errors.say(self.label, rule, f"xlora_dropout_p={p}", remedy))
        return context.dropout(h, p, layer)

    def weights(self, base: Base, x: Tensor, context: Context, experts: int) -> Tensor:
        """Returns the weights of so many experts at a site for every entry of its input: ``(..., K)``."""
        w = context.value("xlora_scalings")
        shape = tuple(x.shape if base.takes_ids else x.shape[:-1])
        rows, count = w.shape[:2] if w.ndim == 4 else (0, 0)
        fits = shape == (rows * count,) or (len(shape) > 1 and (shape[0], shape[-1]) == (rows, count))
        held = w.ndim == 4 and w.shape[3] == experts and (w.shape[2] == 1 or base.index < w.shape[2])
        rule = f"xlora_scalings must be (rows, T, L or 1, K = {experts}) for the rows and tokens of the input"
        self.require_at(held and fits, base, rule, f"{tuple(w.shape)} with input {tuple(x.shape)}")
        own = w[:, :, base.index if w.shape[2] > 1 else 0]
        own = own.reshape(*(shape if len(shape) == 1 else (rows, *(1 for _ in shape[1:-1]), count)), own.shape[-1])
        return kept(own, self.top_k_lora, softmax=self.enable_softmax_topk)

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        a, b = leaves["A"], leaves["B"]
        gain = self.global_scaling_weight * leaves["scaling"] * self.weights(base, x, context, len(a)).to(a.dtype)
        if base.takes_ids or not (context.training and self.lora_dropout):
            hidden = base.map(x, a.flatten(0, 1)).unflatten(-1, a.shape[:2])
        else:  # every expert drops elements of its own
            parts = [base.map(context.dropout(x, self.lora_dropout, i), own) for i, own in enumerate(a.unbind(0))]
            hidden = torch.stack(parts, -2)
        return base(x) + F.linear((gain[..., None] * hidden).flatten(-2), b.transpose(0, 1).flatten(1))

    # -- files ---------------------------------------------------------------------------------------------------------

    def _classifier_keys(self) -> dict[str, str]:
        step, last = 3 if self.xlora_dropout_p else 2, self.xlora_depth - 1
        numbers = {**{str(i): step * i for i in range(last)}, "": step * last}
        layers = ((leaf, kind) for leaf, kind in (("W", "weight"), ("b", "bias")))
        return {f"{leaf}{i}": f"{_LAYERS}{n}.{kind}" for leaf, kind in layers for i, n in numbers.items()}

    def to_peft(self, base: Base | None, leaves: Leaves) -> dict[str, Tensor]:
        if base is None:
            flat = {**leaves, "W": leaves["W"].flatten(0, 1), "b": leaves["b"].flatten()}
            return {key: flat[name] for name, key in self._classifier_keys().items()}
        if not self.use_trainable_adapters:
            return {}
        ranks = [(i, r) for i, r in enumerate(leaves["ranks"].tolist()) if r]
        made = {f"lora_A.{i}.weight": leaves["A"][i, :r] for i, r in ranks}
        return made | {f"lora_B.{i}.weight": leaves["B"][i, :, :r] for i, r in ranks}

    def from_peft(self, base: Base | None, tensors: Mapping[str, Tensor]) -> Leaves:
        count = len(self.adapters or ())
        if base is None:
            leaves = {name: tensors[key] for name, key in self._classifier_keys().items()}
            return {**leaves, **{name: leaves[name].unflatten(0, (-1, count)) for name in "Wb"}}
        if not tensors:
            return {}
        r = max(t.shape[0] for key, t in tensors.items() if key.startswith("lora_A"))
        out, in_ = base.shape[-2:]
        like = next(iter(tensors.values()))
        a = [tensors.get(f"lora_A.{i}.weight", like.new_zeros(0, in_)) for i in range(count)]
        b = [tensors.get(f"lora_B.{i}.weight", like.new_zeros(out, 0)) for i in range(count)]
        return {
            "A": torch.stack([F.pad(t, (0, 0, 0, r - t.shape[0])) for t in a]),
            "B": torch.stack([F.pad(t, (0, r - t.shape[1])) for t in b]),
        }

    def to_peft_config(self, leaves: Mapping[str, Leaves]) -> dict[str, Any]:
        """Leaves out what the experts' own configs say, and names experts by number, as peft needs them."""
        self.require(bool(self.adapters), "adapters", "given for a file: where peft finds the experts", self.adapters)
        fields = {f.name: thaw(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name not in self.peft_lacks}
        assert self.adapters is not None
        return {**fields, "adapters": {str(i): path for i, path in enumerate(self.adapters.values())}}

    def peft_resolved(self, facts: Any) -> dict[str, Any]:
        """Returns the fields of peft's config that it fills in from the model."""
        return {"hidden_size": _width(facts)}
