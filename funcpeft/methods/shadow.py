r"""Shadow: a small decoder beside the model, whose states correct the input of every block.

.. math:: s^0 = P \, \mathrm{decoder}(E), \qquad
   h^l_{in} = h^{l-1} + \alpha \, U_l D_l (h^{l-1} - s^{l-1}), \quad h^l = \mathrm{block}_l(h^l_{in}), \\
   s^l = (1 - g) \odot s^{l-1} + g \odot T_l(h^l), \quad g = \sigma(G_l(h^l))

E: the embeddings of the call's tokens; decoder: a mirror of the model's own on a shrunk config, trained, in evaluation mode;
P (d, width): there if the widths differ; D_l (r, d), U_l (d, r): the injection; T_l, G_l: networks d to u to d with a GELU. The
state s is of one call and nothing of it outlives the call. What is adapted is a trajectory, so there is no merged weight.

The shadow alone, its states s^0 under a head, is ``net.call("shadow", params, adapter, input_ids=...)``: logits, of which
``auxiliary_loss`` is the term that training adds with weight ``auxiliary_loss_weight``. Nothing adds it in secret. The head is
the model's own or, of a classifier, a trained copy. Decoding with a cache keeps the shadow's layers at the end of the model's.

References:
    ShadowPEFT, 2026, arXiv 2604.19254, eq. (1) to (9).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.context import Context
from funcpeft.method import Method
from funcpeft.tree import Adapter, Leaves
from funcpeft.weights import Base

#: Leaves of a block, and their keys in peft's files after the block's path.
_BLOCK = {
    "D": "shadow_down.default.weight",
    "U": "shadow_up.default.weight",
    **{
        f"{net}{i + 1}{part}": f"shadow_update_{name}.default.{2 * i}.{'bias' if part else 'weight'}"
        for net, name in (("T", "transform"), ("G", "gate"))
        for i in (0, 1)
        for part in ("", "b")
    },
}
_PROJECTION = "base_model.shadow_projection.default.weight"
_INPUTS = ("attention_mask", "position_ids")

Call = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Shadow(Method):
    """A shadow network that rides the decoder of a model of transformers.

    ``target_modules`` and the other rules choose blocks of the decoder, which must be next to each other; all by default.
    ``layers_to_transform`` are positions in the decoder.

    Args:
        r: Rank of the injection.
        shadow_alpha: What the injection is multiplied by.
        shadow_dropout: Probability with which elements of h - s are dropped in training.
        init_weights: Whether U starts at 0, so that nothing changes.
        shadow_model: ``"mirror"``, the model's own class on a shrunk config. Pretrained shadows are not loaded.
        shadow_num_hidden_layers: Layers of the mirror, by default 1.
        shadow_hidden_size: Its width, by default the model's.
        shadow_num_attention_heads: Its heads, by default the model's.
        shadow_intermediate_size: Width of its feed-forward layers, by default the model's.
        share_embeddings: Whether it reads the model's embeddings, where its width is the model's.
        update_hidden_size: Width u of the networks T and G, by default r.
        auxiliary_loss_weight: Weight of the shadow's own loss in training; see above.
        task_type: peft's task type; with ``"SEQ_CLS"`` the shadow has a copy of the classification head, which is trained.
    """

    r: int = 8
    shadow_alpha: float = 0.1
    shadow_dropout: float = 0.2
    init_weights: bool = True
    shadow_model: str = "mirror"
    shadow_num_hidden_layers: int | None = None
    shadow_hidden_size: int | None = None
    shadow_num_attention_heads: int | None = None
    shadow_intermediate_size: int | None = None
    share_embeddings: bool = True
    update_hidden_size: int | None = None
    auxiliary_loss_weight: float = 0.05
    task_type: str | None = None

    peft_type: ClassVar[str] = "SHADOW"
    kinds: ClassVar[frozenset[str]] = frozenset()
    calls: ClassVar[tuple[str, ...]] = ("shadow",)
    injected: ClassVar[bool] = True
    weight_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("r")
        self.require_probability("shadow_dropout")
        sizes = [f.name for f in dataclasses.fields(self) if re.fullmatch(r"shadow_\w+_(size|layers|heads)|update_\w+", f.name)]
        self.require_positive(*(name for name in sizes if getattr(self, name) is not None))
        remedy = "train a mirror, or keep the pretrained one in a checkpoint of peft's"
        self.require(self.shadow_model == "mirror", "shadow_model", "'mirror'", self.shadow_model, remedy)

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        """Returns one that shares the embeddings, and a narrower one with its own."""
        return (
            cls(r=2, shadow_dropout=0.25),
            cls(r=2, update_hidden_size=3, shadow_hidden_size=4, shadow_alpha=0.5, share_embeddings=False),
        )

    @property
    def sizes(self) -> tuple[tuple[str, int], ...]:
        """What the config of the mirror is changed to."""
        return (
            ("num_hidden_layers", self.shadow_num_hidden_layers or 1),
            *(
                (name, getattr(self, f"shadow_{name}"))
                for name in ("hidden_size", "intermediate_size", "num_attention_heads")
                if getattr(self, f"shadow_{name}") is not None
            ),
        )

    # -- blocks ------------------------------------------------------------------------------------------------------------

    def resolve(self, default: Callable[[str, str], Any]) -> Self:
        """Returns the method with the paths of its blocks as targets."""
        blocks = default(self.peft_type, "target_modules")
        if blocks is None:
            raise ValueError(errors.say(self.label, "the model must be one of transformers", None))
        kept = self.layers_to_transform
        kept = range(len(blocks)) if kept is None else (kept,) if isinstance(kept, int) else kept
        at = [i for i, path in enumerate(blocks) if i in kept and self._chosen(path)]
        if not at:
            rule = f"target_modules must leave a block to adapt, of {errors.listed(blocks, 3)}"
            raise errors.NoMatchError(errors.say(self.label, rule, repr(self.target_modules)))
        apart = at != list(range(at[0], at[-1] + 1))
        self.require(not apart, "target_modules", "blocks next to each other", [blocks[i] for i in at])
        return dataclasses.replace(self, target_modules=tuple(blocks[i] for i in at))

    def _chosen(self, path: str) -> bool:
        rule, out = self.target_modules, self.exclude_modules
        return (rule is None or _names(rule, path)) and not (out and _names(out, path))

    @property
    def blocks(self) -> tuple[str, ...]:
        """Paths of the blocks, once resolved."""
        assert isinstance(self.target_modules, tuple)
        return self.target_modules

    # -- leaves ------------------------------------------------------------------------------------------------------------

    def init(self, sites: Any, *, seed: int | rng.Stream, **needs: Any) -> Adapter:
        """Makes the mirror, the projection and the leaves of every block, at ``""``.

        Args:
            sites: None; the method acts on the call.
            seed: Determines the draw.
            needs: ``facts`` of the model.
        """
        facts, gen = needs["facts"], rng.generator(seed, "")
        mirror, tensors = facts.drawn_mirror(self.sizes, self.share_embeddings, gen)
        frozen = mirror.model.buffers | mirror.unused
        params = {f"backbone.{k}": t for k, t in tensors.items() if k not in frozen}
        consts = {
            f"{'buffer' if k in mirror.model.buffers - mirror.kept else 'backbone'}.{k}": t
            for k, t in tensors.items()
            if k in frozen
        }
        if mirror.width != facts.width:
            params["P"] = rng.kaiming((facts.width, mirror.width), gen)
        for path in self.blocks:
            params |= {f"{path}:{name}": t for name, t in self._drawn(facts.width, gen).items()}
        if self.task_type == "SEQ_CLS":
            params |= {f"head.{n}": t for n, t in facts.classifier().items()}
        consts["alpha"] = torch.tensor(self.shadow_alpha, dtype=torch.float64)
        return Adapter({"": params}, {"": consts})

    def _drawn(self, d: int, gen: Any) -> Leaves:
        u, r = self.update_hidden_size or self.r, self.r
        leaves = {"D": rng.kaiming((r, d), gen), "U": rng.kaiming((d, r), gen)}
        if self.init_weights:
            leaves["U"] = torch.zeros(d, r)
        for net in "TG":
            for i, shape in (("1", (u, d)), ("2", (d, u))):
                leaves[f"{net}{i}"] = rng.kaiming(shape, gen)
                leaves[f"{net}{i}b"] = rng.uniform(shape[:1], gen, shape[1] ** -0.5)
        return leaves

    def to_peft(self, base: Base | None, leaves: Leaves) -> dict[str, Tensor]:
        return {key: leaves[name] for name, key in _keys(leaves)}

    def from_peft(self, base: Base | None, tensors: Mapping[str, Tensor]) -> Leaves:
        return {_name(key): t for key, t in tensors.items()}

    # -- the call ----------------------------------------------------------------------------------------------------------

    def wrap(self, leaves: Leaves, call: Call, kind: str, facts: Any) -> Call:
        """Returns the call with the shadow beside it; leaves may have a leading axis of rows."""
        if kind == "shadow":
            return lambda **inputs: self._alone(leaves, facts, inputs)

        def around(forward: Call, **inputs: Any) -> Any:
            pair, own = self._pair(leaves, facts, inputs), self._by_row(leaves, inputs)
            state = [self._first(own, facts, inputs, None if pair is None else pair.cache)]
            blocks = {
                path: _Block(self, {n: own[f"{path}:{n}"] for n in _BLOCK}, own["alpha"], state, facts.context.at(i))
                for i, path in enumerate(self.blocks)
            }
            out = forward(blocks=blocks, **inputs)
            if pair is not None:
                pair.join(out)
            return out

        return lambda **inputs: call(**{**inputs, "forwards": (*inputs.get("forwards", ()), around)})

    def _alone(self, leaves: Leaves, facts: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Computes the logits of the shadow alone: of every position, or of a classifier for the last token of a row."""
        s = self._first(leaves, facts, inputs, None)
        if "head.weight" not in leaves:
            return facts.head(s)
        mask = inputs.get("attention_mask")
        if mask is None:
            last = s[:, -1]
        else:
            at = (mask.ne(0) * torch.arange(1, mask.shape[-1] + 1, device=mask.device)).argmax(-1)
            last = s.take_along_dim(at[:, None, None], 1)[:, 0]
        return F.linear(last, leaves["head.weight"], leaves.get("head.bias"))

    def _pair(self, leaves: Leaves, facts: Any, inputs: Mapping[str, Any]) -> Any:
        """Returns the caches of a call that uses them, ``None`` for one that does not."""
        past, use = inputs.get("past_key_values"), inputs.get("use_cache")
        held = past is not None and facts.held(past) > 0
        if leaves["alpha"].ndim:
            if held:
                rule, remedy = "the shadow of many members folded decodes without a cache", "pass use_cache=False"
                raise ValueError(errors.say(self.label, rule, "one", remedy))
            return None
        if not held and not (getattr(facts.config, "use_cache", False) if use is None else use):
            return None
        return facts.mirror(self.sizes, self.share_embeddings).pair(past, facts.num_layers, self.label)

    def _by_row(self, leaves: Leaves, inputs: Mapping[str, Any]) -> Leaves:
        """Repeats leaves of rows that ``generate`` has repeated."""
        alpha = leaves["alpha"]
        rows = next(inputs[n].shape[0] for n in ("input_ids", "inputs_embeds") if inputs.get(n) is not None)
        if not alpha.ndim or alpha.shape[0] == rows:
            return leaves
        return {n: t.repeat_interleave(rows // alpha.shape[0], 0) for n, t in leaves.items()}

    def _first(self, leaves: Leaves, facts: Any, inputs: Mapping[str, Any], cache: Any) -> Tensor:
        """Computes s^0 ``(batch, length, d)``."""
        mirror = facts.mirror(self.sizes, self.share_embeddings)
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        if embeds is None and mirror.shares:
            embeds = facts.embed(ids)
        tensors = {n.partition(".")[2]: t for n, t in leaves.items() if n.startswith(("backbone.", "buffer."))}
        dtype = next(t.dtype for t in tensors.values() if t.is_floating_point())
        given = {"input_ids": ids} if embeds is None else {"inputs_embeds": embeds.to(dtype)}
        given |= {n: inputs[n] for n in _INPUTS if inputs.get(n) is not None}
        s = mirror.run(tensors, given, cache, rows=bool(leaves["alpha"].ndim))
        return s @ leaves["P"].mT if "P" in leaves else s

    @staticmethod
    def auxiliary_loss(logits: Tensor, labels: Tensor) -> Tensor:
        """Computes the shadow's own loss of the logits of ``net.call("shadow", ...)``.

        That is the cross-entropy with the next label, -100 left out; of a classifier transformers' loss for its labels.
        """
        if logits.ndim == 2:
            if logits.shape[-1] == 1:
                return F.mse_loss(logits[:, 0], labels.to(logits.dtype).flatten())
            whole = not labels.is_floating_point()
            return F.cross_entropy(logits, labels.flatten()) if whole else F.binary_cross_entropy_with_logits(logits, labels)
        return F.cross_entropy(logits[..., :-1, :].flatten(0, -2), labels[..., 1:].flatten(), ignore_index=-100)


class _Block:
    """What runs around one block of one call: injects, calls, and advances the call's state."""

    def __init__(self, method: Shadow, leaves: Leaves, alpha: Tensor, state: list[Tensor], context: Context) -> None:
        self.method, self.leaves, self.state, self.context = method, leaves, state, context
        self.alpha = alpha[:, None, None] if alpha.ndim else alpha

    def __call__(self, forward: Call, *args: Any, **kwargs: Any) -> Any:
        hidden, own, s = args[0] if args else kwargs["hidden_states"], self.leaves, self.state[0]
        delta = self._dropped((hidden - s).to(own["D"].dtype)) @ own["D"].mT @ own["U"].mT
        injected = hidden + (self.alpha * delta).to(hidden.dtype)
        out = forward(injected, *args[1:], **kwargs) if args else forward(**{**kwargs, "hidden_states": injected})
        h = (out[0] if isinstance(out, tuple) else out).to(own["D"].dtype)
        g = torch.sigmoid(self._network(h, "G"))
        self.state[0] = (1 - g) * s + g * self._network(h, "T")
        return out

    def _dropped(self, delta: Tensor) -> Tensor:
        p = self.method.shadow_dropout
        if self.context.training and p and self.alpha.ndim:
            rule, remedy = "members folded cannot draw dropout each by itself", "use strategy='vmap' or 'loop'"
            raise ValueError(errors.say(self.method.label, rule, f"shadow_dropout={p}", remedy))
        return self.context.dropout(delta, p)

    def _network(self, h: Tensor, net: str) -> Tensor:
        own = self.leaves
        h = F.gelu(h @ own[f"{net}1"].mT + own[f"{net}1b"][..., None, :])
        return h @ own[f"{net}2"].mT + own[f"{net}2b"][..., None, :]


def _names(rule: Any, path: str) -> bool:
    """Whether a rule names a path: a string by full regular-expression match, a list by equality or dotted suffix."""
    return bool(re.fullmatch(rule, path)) if isinstance(rule, str) else any(f".{path}".endswith(f".{e}") for e in rule)


def _keys(leaves: Leaves) -> Iterator[tuple[str, str]]:
    """Yields the names of the leaves that files hold, with peft's keys."""
    for name in leaves:
        if name == "P":
            yield name, _PROJECTION
        elif name.startswith(("backbone.", "head.")):
            part, _, rest = name.partition(".")
            yield name, f"base_model.shadow_{part}.default.{rest}"
        elif ":" in name:
            path, _, leaf = name.rpartition(":")
            yield name, f"base_model.model.{path}.{_BLOCK[leaf]}"


def _name(key: str) -> str:
    """Inverts ``_keys``."""
    if key == _PROJECTION:
        return "P"
    if found := re.fullmatch(r"base_model\.shadow_(backbone|head)\.default\.(.+)", key):
        return f"{found[1]}.{found[2]}"
    path, _, rest = key.removeprefix("base_model.model.").partition(".shadow_")
    return f"{path}:{next(leaf for leaf, end in _BLOCK.items() if end == f'shadow_{rest}')}"
