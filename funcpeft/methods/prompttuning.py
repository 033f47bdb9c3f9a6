r"""Prompt tuning: trained embeddings stand in front of the input's.

.. math:: Y = f([P; E(x)])

P: the prompt (S * nv, D), nv virtual tokens; E(x): embeddings (B, L, D) of the input; f: the model after its embedding.
S is 2 for an encoder-decoder model, as in peft, whose first nv rows stand before the encoder's input and whose last nv
rows are kept but unused. The attention mask gets nv ones in front, token types nv zeros and, where there is a label per
position, labels nv times -100; logits have nv positions more. ``generate`` takes and returns ids without virtual tokens.

Differences from peft 0.21: its labels of TOKEN_CLS stay as they are and fail, its answer positions of QUESTION_ANS are
not shifted, ``position_ids`` and some ``token_type_ids`` are dropped and masks become float32; here labels get -100,
positions are shifted by nv, types get zeros and the mask keeps its dtype. A call with a cache that holds tokens
continues it, where peft puts the prompt in once more.

References:
    Lester, Al-Rfou, Constant, The power of scale for parameter-efficient prompt tuning, 2021, arXiv 2104.08691, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.method import FrozenDict, Method
from funcpeft.tree import Adapter, Leaves

Call = Callable[..., Any]

#: peft's task types.
TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

_INITS = ("RANDOM", "SAMPLE_VOCAB", "TEXT")
_LABEL_PER_POSITION = ("CAUSAL_LM", "TOKEN_CLS", "FEATURE_EXTRACTION")


def before(t: Tensor, n: int, value: float) -> Tensor:
    """Returns ``t`` with ``n`` positions of ``value`` in front along its second axis, dtype kept."""
    return torch.cat([t.new_full((t.shape[0], n), value), t], 1)


def cycled(ids: Sequence[int], count: int) -> list[int]:
    """Returns ``count`` ids: the first ones, repeated from the start if there are fewer."""
    return [ids[i % len(ids)] for i in range(count)]


def task_of(task_type: str | None, facts: Any) -> str:
    """Returns the task type: the field's, or the one that the model's class is made for."""
    return task_type or facts.task


def submodules(number: int | None, task: str) -> int:
    """Returns S, the number of stacks that rows are kept for: the field's, or 2 for sequence to sequence."""
    return number or (2 if task == "SEQ_2_SEQ_LM" else 1)


def check_task(method: Method, task: str, facts: Any) -> None:
    """Raises ``ValueError`` if a task and a model do not go together."""
    several = facts.encoder_decoder
    fits = task in ("SEQ_2_SEQ_LM", "FEATURE_EXTRACTION") if several else task != "SEQ_2_SEQ_LM"
    rule = "SEQ_2_SEQ_LM or FEATURE_EXTRACTION" if several else "another than SEQ_2_SEQ_LM"
    method.require(fits, "task_type", f"{rule} for {facts.name}", task)


def check_sizes(method: Method, sizes: Mapping[str, int]) -> None:
    """Raises ``ValueError`` if a size that a field names is not the model's."""
    for field, size in sizes.items():
        value = getattr(method, field)
        method.require(value in (None, size), field, f"None or the model's, {size}", value)


def check_shared_fields(method: Method, tokens: object, task: object, number: object) -> None:
    """Raises ``ValueError`` if a field that all methods of the call have is not valid."""
    method.require(isinstance(tokens, int) and tokens > 0, "num_virtual_tokens", "a positive integer", tokens)
    method.require(number in (None, 1, 2), "num_transformer_submodules", "None, 1 or 2", number)
    if task is not None and task not in TASK_TYPES:
        raise ValueError(errors.one_of(method.label, "task_type", task, TASK_TYPES))
    for field in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
        value = getattr(method, field)
        method.require(value is None, field, "None: the method acts on the call, not on modules", value)


def extended(
    inputs: Mapping[str, Any], n: int, where: str, *, task: str, as_input: bool, decoder: bool = False
) -> dict[str, Any]:
    """Returns a call's inputs with room for ``n`` virtual tokens in everything that counts positions.

    Args:
        inputs: Keyword inputs of the model.
        n: Number of virtual tokens.
        where: Name of the method in messages.
        task: Task type; says what labels mean.
        as_input: Whether the virtual tokens are in this call's input, else they are in its cache.
        decoder: Whether they stand in the decoder of an encoder-decoder model.

    Raises:
        ValueError: If the attention mask is not ``(batch, length)``.
    """
    out = dict(inputs)
    mask_key = "decoder_attention_mask" if decoder else "attention_mask"
    mask, positions = out.get(mask_key), out.get("position_ids")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(errors.say(where, f"{mask_key} must be a tensor (batch, length)", found))
        out[mask_key] = before(mask, n, 1)
    if positions is not None:
        new = torch.arange(n, device=positions.device, dtype=positions.dtype).expand(*positions.shape[:-1], n)
        out["position_ids"] = torch.cat([new, positions + n], -1) if as_input else positions + n
    if as_input:
        out |= {k: before(out[k], n, 0) for k in ("token_type_ids",) if out.get(k) is not None}
        if task in _LABEL_PER_POSITION and out.get("labels") is not None:
            out["labels"] = before(out["labels"], n, -100)
        if task == "QUESTION_ANS":
            out |= {k: out[k] + n for k in ("start_positions", "end_positions") if out.get(k) is not None}
    return out


def prepended(prompt: Tensor, call: Call, kind: str, facts: Any, task: str, where: str) -> Call:
    """Wraps a call so that a prompt stands before the embeddings of its (encoder's) input.

    Args:
        prompt: ``(T, D)``, or ``(B, T, D)`` with one per row of the batch.
        call: The call to wrap.
        kind: ``"forward"`` or ``"generate"``.
        facts: Facts of the model.
        task: Task type.
        where: Name of the method in messages.
    """
    n = prompt.shape[-2]

    def embedded(inputs: Mapping[str, Any]) -> dict[str, Any]:
        out = extended(inputs, n, where, task=task, as_input=True)
        ids, embeds = out.pop("input_ids", out.pop("inputs", None)), out.get("inputs_embeds")
        if embeds is None:
            if ids is None:
                raise ValueError(errors.say(where, "input_ids or inputs_embeds must be given", "neither"))
            embeds = facts.embed(ids)
        rows = prompt.expand(embeds.shape[0], -1, -1) if prompt.ndim == 2 else prompt
        if rows.shape[0] != embeds.shape[0]:  # generate has repeated the rows, for beams or several returned sequences
            rows = rows.repeat_interleave(embeds.shape[0] // rows.shape[0], 0)
        out["inputs_embeds"] = torch.cat([rows.to(embeds.dtype), embeds], 1)
        return out

    def forward(**inputs: Any) -> Any:
        if inputs.get("encoder_outputs") is not None:
            raise ValueError(errors.say(where, "encoder_outputs must not be given, the prompt is part of the encoder's input"))
        if not facts.encoder_decoder and facts.held(inputs.get("past_key_values")):
            return call(**extended(inputs, n, where, task="", as_input=False))
        return call(**embedded(inputs))

    def generate(**inputs: Any) -> Any:
        numbered = inputs.get("position_ids") is not None

        def step(given: dict[str, Any]) -> dict[str, Any]:
            ids, cache = given["input_ids"], given.get("past_key_values") if given.get("use_cache", True) else None
            given = given if numbered else {**given, "position_ids": None}
            if facts.held(cache):
                return continued(extended(given, n, where, task="", as_input=False), n)
            out = {**embedded(given), "input_ids": ids, "past_key_values": facts.roomy(cache)}
            return {**out, "is_first_iteration": True, "next_sequence_length": None}

        if not facts.takes_cache:  # a recurrent state does not tell a first step from a later one
            inputs = {**inputs, "use_cache": False}
        return call(**{**inputs, "steps": (*inputs.get("steps", ()), step)})

    return generate if kind == "generate" and not facts.encoder_decoder else forward


def continued(given: dict[str, Any], n: int) -> dict[str, Any]:
    """Returns a step's arguments on a cache that holds tokens.

    A first step on a cache of an earlier call counts the new ids as what the ids exceed the cache by, virtual ones included.
    """
    new = given.get("next_sequence_length")
    return {**given, "next_sequence_length": new + n} if given.get("is_first_iteration") and new is not None else given


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """Prompt tuning.

    Args:
        num_virtual_tokens: Number nv of virtual tokens; must be given.
        task_type: One of peft's task types; by default the one that the model's class is made for.
        num_transformer_submodules: S; by default 2 for sequence to sequence, else 1.
        token_dim: Width of the embedding, which peft writes into its files; must be the model's where given.
        num_layers: Number of layers, likewise.
        num_attention_heads: Number of heads, likewise.
        prompt_tuning_init: Rows start as N(0, 1) draws (``"RANDOM"``), as the embeddings of random ids
            (``"SAMPLE_VOCAB"``), or as those of a text's ids, repeated or cut to fit (``"TEXT"``).
        prompt_tuning_init_text: The text; its tokenizer is given as ``net.init(..., tokenizer=...)``, or by name.
        tokenizer_name_or_path: Name of a tokenizer that transformers loads, if none is given to ``net.init``.
        tokenizer_kwargs: Options of that loading; ``trust_remote_code`` among them is ignored.
    """

    num_virtual_tokens: int | None = None
    task_type: str | None = None
    num_transformer_submodules: int | None = None
    token_dim: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: Mapping[str, Any] | None = None

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    kinds: ClassVar[frozenset[str]] = frozenset()
    keys: ClassVar[dict[str, str]] = {"P": "prompt_embeddings"}
    leaf_names: ClassVar[tuple[str, ...]] = ("P",)
    weight_free: ClassVar[bool] = True
    identity_at_init: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("tokenizer",)
    waived: ClassVar[dict[str, str]] = {"kind": "the output has one position more per virtual token"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shared_fields(self, self.num_virtual_tokens, self.task_type, self.num_transformer_submodules)
        if self.prompt_tuning_init not in _INITS:
            raise ValueError(errors.one_of(self.label, "prompt_tuning_init", self.prompt_tuning_init, _INITS))
        text = self.prompt_tuning_init == "TEXT"
        self.require(not text or bool(self.prompt_tuning_init_text), "prompt_tuning_init_text", "given with init 'TEXT'", None)
        self.require(
            text or self.tokenizer_kwargs is None, "tokenizer_kwargs", "None without init 'TEXT'", self.tokenizer_kwargs
        )

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return cls(num_virtual_tokens=3), cls(num_virtual_tokens=2, prompt_tuning_init="SAMPLE_VOCAB")

    def check_model(self, facts: Any) -> None:
        """Raises ``ValueError`` if the model does not fit; reads its config only."""
        check_task(self, task_of(self.task_type, facts), facts)
        if not facts.takes_embeds:
            raise ValueError(errors.say(self.label, f"the forward of {facts.name} must take inputs_embeds"))
        check_sizes(self, {"token_dim": facts.token_dim})

    def rows(self, facts: Any) -> int:
        """Returns the number S * nv of rows."""
        assert self.num_virtual_tokens is not None
        return self.num_virtual_tokens * submodules(self.num_transformer_submodules, task_of(self.task_type, facts))

    def init(self, sites: Any, *, seed: int | rng.Stream, **needs: Any) -> Adapter:
        """Makes the prompt.

        Args:
            sites: None; the method acts on the call.
            seed: Determines the draw.
            needs: ``facts`` of the model; ``tokenizer``, called on the text of init ``"TEXT"``, gives ``input_ids``;
                with ``inference_mode`` nothing is read from text or vocabulary, as a file's rows replace them.
        """
        facts, gen = needs["facts"], rng.generator(seed, "")
        count = self.rows(facts)
        p = rng.normal((count, facts.token_dim), gen)  # peft draws it whatever the init
        replaced = needs.get("inference_mode", False) or facts.device.type == "meta"
        if self.prompt_tuning_init != "RANDOM" and not replaced:
            ids = self._ids(count, facts, gen, needs.get("tokenizer")).to(facts.device)
            p = facts.embed(ids).to(torch.float32).clone()
        return Adapter({"": {"P": p}})

    def _ids(self, count: int, facts: Any, gen: Any, tokenizer: Any) -> Tensor:
        if self.prompt_tuning_init == "SAMPLE_VOCAB":
            return torch.randint(0, facts.vocab_size, (count,), generator=gen)
        if tokenizer is None:
            name = self.tokenizer_name_or_path
            self.require(
                name is not None, "tokenizer_name_or_path", "given with init 'TEXT'", None, "or pass tokenizer= to net.init"
            )
            tokenizer = facts.tokenizer(name, **(self.tokenizer_kwargs or FrozenDict()))
        ids = tokenizer(self.prompt_tuning_init_text)["input_ids"]
        self.require(len(ids) > 0, "prompt_tuning_init_text", "a text of at least one token", self.prompt_tuning_init_text)
        return torch.tensor(cycled(ids, count))

    def wrap(self, leaves: Leaves, call: Call, kind: str, facts: Any) -> Call:
        """Returns the call with the prompt in front of its input."""
        prompt = leaves["P"][..., : self.num_virtual_tokens, :]
        return prepended(prompt, call, kind, facts, task_of(self.task_type, facts), self.label)

    def peft_resolved(self, facts: Any) -> dict[str, Any]:
        """Returns the fields of peft's config that it fills in from the model."""
        task = task_of(self.task_type, facts)
        return {
            "task_type": task,
            "num_transformer_submodules": submodules(self.num_transformer_submodules, task),
            "token_dim": facts.token_dim,
            "num_layers": facts.num_layers,
            "num_attention_heads": facts.num_attention_heads,
        }
