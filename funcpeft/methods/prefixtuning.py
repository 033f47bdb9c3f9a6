r"""Prefix tuning: trained keys and values stand in front of every layer's.

.. math:: \mathrm{attn}_l(q, [K^P_l; K_l], [V^P_l; V_l]), \quad (K^P_l, V^P_l) = (T_{2l}, T_{2l+1})

T: the table (nv, 2 * layers * H * hd), read as (2 * layers, H, nv, hd); nv virtual tokens, H key heads of width hd.
With ``prefix_projection`` it is T = W_2 tanh(W_1 e + b_1) + b_2, with e (nv, H * hd), W_1 (h, H * hd) and
W_2 (2 * layers * H * hd, h); peft's files hold the table alone, and so does an adapter read from one.

The model's own key-value cache carries the prefix, so positions of the input start at nv and its logits have no more
positions than the input. The attention mask gets nv ones in front, and given ``position_ids`` are shifted by nv. In an
encoder-decoder model it is the decoder's self-attention that gets the prefix; layer l takes rows 4l and 4l + 1 of T
modulo 2 * layers, as in peft, so that with an even number of layers half of T has no effect; set
``num_transformer_submodules=1`` to give every layer rows of its own. A zero prefix is not the identity: zero keys take
their share of the softmax.

Differences from peft 0.21: masks keep their dtype, a decoder deeper than its encoder is refused when the net is made,
``generate`` with ``use_cache=False`` works, and a call with a cache that holds tokens continues it.

References:
    Li, Liang, Prefix-tuning: optimizing continuous prompts for generation, 2021, arXiv 2101.00190, eq. (3), section 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.method import Method
from funcpeft.methods.prompttuning import check_shared_fields, check_sizes, check_task, continued, extended, submodules, task_of
from funcpeft.tree import Adapter, Leaves
from funcpeft.weights import Base

Call = Callable[..., Any]


def project(leaves: Leaves) -> Tensor:
    """Computes the table ``(nv, width)`` from the small embedding and the two layers of its network."""
    hidden = torch.tanh(F.linear(leaves["e"], leaves["W1"], leaves["b1"]))
    return F.linear(hidden, leaves["W2"], leaves["b2"])


def pairs(table: Tensor, layers: int, heads: int, stacks: int) -> list[tuple[Tensor, Tensor]]:
    """Cuts a table ``(*rows, nv, 2 * layers * heads * hd)`` into (key, value) pairs by layer, each ``(*rows, heads, nv, hd)``.

    Args:
        table: The table, or one per row of the batch.
        layers: Number of layers.
        heads: Number of key heads.
        stacks: With 2, layer l takes the pair of layer 2l modulo ``layers``: peft's order in encoder-decoder models.
    """
    x = table.reshape(*table.shape[:-1], 2 * layers, heads, -1).movedim((-3, -2), (0, -3))
    return [(x[2 * i], x[2 * i + 1]) for i in (stacks * layer % layers for layer in range(layers))]


def prefixed(layers: list[tuple[Tensor, Tensor]], call: Call, kind: str, facts: Any, where: str) -> Call:
    """Wraps a call so that its (decoder's) self-attention finds keys and values before those of the input.

    Args:
        layers: A (key, value) pair per layer, each ``(heads, nv, hd)``, or ``(B, heads, nv, hd)`` with one per row.
        call: The call to wrap.
        kind: ``"forward"`` or ``"generate"``.
        facts: Facts of the model.
        where: Name of the method in messages.
    """
    n, decoder = layers[0][0].shape[-2], facts.encoder_decoder

    def cache(rows: int, given: Any) -> Any:
        if facts.virtual(given) and not facts.held(given):
            raise ValueError(errors.say(where, "a call takes one prefix", "a second", "leave one of the methods out"))
        return facts.cache([(_rows(k, rows, facts.dtype), _rows(v, rows, facts.dtype)) for k, v in layers])

    def longer(inputs: dict[str, Any]) -> dict[str, Any]:
        return extended(inputs, n, where, task="", as_input=False, decoder=decoder)

    def forward(**inputs: Any) -> Any:
        out, given = longer(inputs), inputs.get("past_key_values")
        if not facts.held(given):
            out["past_key_values"] = cache(_batch(inputs, where, decoder=decoder), given)
        return call(**out)

    def generate(**inputs: Any) -> Any:
        def step(given: dict[str, Any]) -> dict[str, Any]:
            out, before = longer(given), given.get("past_key_values")
            if facts.held(before) and given.get("use_cache", True):  # without, every step starts from the prefix again
                return continued(out, n)
            return {**out, "past_key_values": cache(given["input_ids"].shape[0], before)}

        return call(**{**inputs, "steps": (*inputs.get("steps", ()), step)})

    return generate if kind == "generate" else forward


def _rows(t: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    if t.ndim == 4:  # generate has repeated the rows, for beams or several returned sequences
        return t.to(dtype).repeat_interleave(rows // t.shape[0], 0)
    return t.to(dtype).expand(rows, *t.shape)


def _batch(inputs: dict[str, Any], where: str, *, decoder: bool) -> int:
    """Returns the number of rows of a call's inputs."""
    names = ("input_ids", "inputs_embeds")
    if decoder:
        names = ("decoder_input_ids", "decoder_inputs_embeds", "labels", *names)
    for name in names:
        if inputs.get(name) is not None:
            return inputs[name].shape[0]
    raise ValueError(errors.say(where, f"one of {', '.join(names)} must be given", "none"))


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """Prefix tuning.

    Args:
        num_virtual_tokens: Number nv of virtual tokens; must be given.
        task_type: One of peft's task types; by default the one that the model's class is made for.
        num_transformer_submodules: By default 2 for sequence to sequence, else 1; see the module's text.
        token_dim: Heads times head width, which peft writes into its files; must be the model's where given.
        num_layers: Number of layers, likewise.
        num_attention_heads: Number of key heads, likewise.
        encoder_hidden_size: Width h of the projection's hidden layer; by default heads times head width.
        prefix_projection: Whether the table comes from a small embedding through a network.
        init_weights: ``"zero"`` starts with a table of zeros; by default N(0, 1), and torch's defaults for the network.
    """

    num_virtual_tokens: int | None = None
    task_type: str | None = None
    num_transformer_submodules: int | None = None
    token_dim: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False
    init_weights: str | None = None

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    kinds: ClassVar[frozenset[str]] = frozenset()
    keys: ClassVar[dict[str, str]] = {"T": "prompt_embeddings"}
    leaf_names: ClassVar[tuple[str, ...]] = ("T", "e", "W1", "b1", "W2", "b2")
    weight_free: ClassVar[bool] = True
    identity_at_init: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shared_fields(self, self.num_virtual_tokens, self.task_type, self.num_transformer_submodules)
        h = self.encoder_hidden_size
        self.require(h is None or h > 0, "encoder_hidden_size", "a positive integer", h)
        self.require(self.init_weights in (None, "zero"), "init_weights", "None or 'zero'", self.init_weights)

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return cls(num_virtual_tokens=3), cls(num_virtual_tokens=2, prefix_projection=True)

    def check_model(self, facts: Any) -> None:
        """Raises ``ValueError`` if the model does not fit; reads its config only."""
        check_task(self, task_of(self.task_type, facts), facts)
        facts.check_cache()
        if facts.decoder_layers > facts.num_layers:
            rule = f"the decoder may have at most the encoder's {facts.num_layers} layers"
            raise ValueError(errors.say(self.label, rule, facts.decoder_layers, "use PromptTuning"))

        heads, width = facts.kv_heads, facts.head_dim
        check_sizes(self, {"token_dim": heads * width, "num_layers": facts.num_layers, "num_attention_heads": heads})

    def init(self, sites: Any, *, seed: int | rng.Stream, **needs: Any) -> Adapter:
        """Makes the table, or the leaves of its projection.

        Args:
            sites: None; the method acts on the call.
            seed: Determines the draw.
            needs: ``facts`` of the model; with ``inference_mode`` there is no projection, as a file holds the table.
        """
        facts, gen, nv = needs["facts"], rng.generator(seed, ""), self.num_virtual_tokens
        assert nv is not None
        dim, zero = facts.kv_heads * facts.head_dim, self.init_weights == "zero"
        width = 2 * facts.num_layers * dim
        if not self.prefix_projection or needs.get("inference_mode", False):
            t = rng.normal((nv, width), gen)
            return Adapter({"": {"T": torch.zeros_like(t) if zero else t}})
        h = self.encoder_hidden_size or dim
        leaves = {"e": rng.normal((nv, dim), gen)}
        for i, shape in ((1, (h, dim)), (2, (width, h))):
            leaves[f"W{i}"] = rng.kaiming(shape, gen)
            leaves[f"b{i}"] = rng.uniform(shape[:1], gen, 1 / math.sqrt(shape[1]))
        if zero:
            leaves |= {k: torch.zeros_like(leaves[k]) for k in ("W2", "b2")}
        return Adapter({"": leaves})

    def table(self, leaves: Leaves) -> Tensor:
        """Returns the table, evaluated if the leaves are those of the projection."""
        return leaves["T"] if "T" in leaves else project(leaves)

    def call_leaves(self, leaves: Leaves) -> Leaves:
        """Returns the table, evaluated."""
        return {"T": self.table(leaves)}

    def wrap(self, leaves: Leaves, call: Call, kind: str, facts: Any) -> Call:
        """Returns the call with the prefix in its cache."""
        stacks = submodules(self.num_transformer_submodules, task_of(self.task_type, facts))
        return prefixed(pairs(self.table(leaves), facts.num_layers, facts.kv_heads, stacks), call, kind, facts, self.label)

    def to_peft(self, base: Base | None, leaves: Leaves) -> dict[str, Tensor]:
        return {"prompt_embeddings": self.table(leaves)}

    def peft_resolved(self, facts: Any) -> dict[str, Any]:
        """Returns the fields of peft's config that it fills in from the model."""
        task, dim = task_of(self.task_type, facts), facts.kv_heads * facts.head_dim
        return {
            "task_type": task,
            "num_transformer_submodules": submodules(self.num_transformer_submodules, task),
            "token_dim": dim,
            "num_layers": facts.num_layers,
            "num_attention_heads": facts.kv_heads,
            "encoder_hidden_size": self.encoder_hidden_size or dim,
        }
