"""Facts: what a method of the call (prompts, prefixes) may know of a transformers model, and how it is called then.

Numbers of its config under the names peft resolves them by, its task, its input embedding as a function of ids, and its
key-value cache made of tensors. Imports functional, mirrors; transformers only inside the functions that make a cache or a
tokenizer.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from funcpeft import errors
from funcpeft.caches import register_caches
from funcpeft.context import EVAL, Context
from funcpeft.functional import Model
from funcpeft.mirrors import Mirror, Sizes, blocked, drawn, mirror_of
from funcpeft.weights import dense

#: peft's task types, with the ends of the names of transformers' classes for them.
TASKS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("ForSequenceClassification",),
    "TOKEN_CLS": ("ForTokenClassification",),
    "QUESTION_ANS": ("ForQuestionAnswering",),
    "SEQ_2_SEQ_LM": ("ForConditionalGeneration",),
    "CAUSAL_LM": ("ForCausalLM", "LMHeadModel"),
    "FEATURE_EXTRACTION": (),
}

#: Layer types whose cache is one key and one value per token.
_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")

Step = Callable[[dict[str, Any]], dict[str, Any]]
Around = Callable[..., Any]


class ModelFacts:
    """Reads a model's config on demand; a fact that the config does not have raises an error that names it."""

    def __init__(
        self, model: Model, params: Mapping[str, Any], values: dict[str, Tensor] | None = None, context: Context = EVAL
    ) -> None:
        self._model, self._params, self.context = model, params, context
        self._values = {} if values is None else values  # those that the contexts of this call hold
        config = model.config
        self.config: Any = getattr(config, "text_config", config)

    @property
    def values(self) -> Mapping[str, Tensor]:
        """Values of the call, as its contexts hold them."""
        return self._values

    def _first(self, fact: str, *names: str) -> int:
        for name in names:
            value = getattr(self.config, name, None)
            if isinstance(value, int):
                return value
        found = type(self.config).__name__
        raise ValueError(
            errors.say(self.name, f"the config must say {fact} (one of {', '.join(names)})", found, "use a transformers model")
        )

    @property
    def name(self) -> str:
        """Class name of the model."""
        return self._model.name

    @property
    def token_dim(self) -> int:
        """Width of a token embedding, which some models then project to another width."""
        table = getattr(self._input_embedding(), "weight", None)
        if isinstance(table, Tensor) and table.ndim == 2:
            return table.shape[1]
        return self._first("the token width", "hidden_size", "n_embd", "d_model")

    def _input_embedding(self) -> nn.Module | None:
        try:
            return self._model.root.get_input_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            return None

    @property
    def num_layers(self) -> int:
        """Number of layers (of the encoder, where there is one)."""
        return self._first("the number of layers", "num_hidden_layers", "num_layers", "n_layer")

    @property
    def decoder_layers(self) -> int:
        """Number of layers of the decoder, or of the model if that is one stack."""
        names = ("num_decoder_layers", "decoder_layers") if self.encoder_decoder else ()
        return self._first("the number of decoder layers", *names, "num_hidden_layers", "num_layers", "n_layer")

    @property
    def num_attention_heads(self) -> int:
        """Number of query heads."""
        return self._first("the number of heads", "num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads, fewer than query heads under grouped-query attention; of the widest layer."""
        return self._widest()[0]

    @property
    def head_dim(self) -> int:
        """Width of a head, of the widest layer."""
        return self._widest()[1]

    def _widest(self) -> tuple[int, int]:
        if shapes := self._per_layer():
            return max(shapes, key=lambda shape: shape[1])
        heads = getattr(self.config, "num_key_value_heads", None) or self.num_attention_heads
        if getattr(self.config, "multi_query", False) and not getattr(self.config, "new_decoder_architecture", False):
            heads = 1  # a flag of Falcon and GPTBigCode, whatever the number says
        width = getattr(self.config, "head_dim", None) or getattr(self.config, "d_kv", None)
        if not width:
            width = self._first("the width", "hidden_size", "n_embd", "d_model") // self.num_attention_heads
        return heads, width

    def _per_layer(self) -> list[tuple[int, int]]:
        """Lists (key heads, head width) by layer, for a model whose layers differ."""
        varied = getattr(self.config, "per_layer_attributes", None) or ()
        if not {"head_dim", "num_key_value_heads"} & set(varied):
            return []
        each = [self.config.per_layer_config[i] for i in range(self.num_layers)]
        return [(one.num_key_value_heads, one.head_dim) for one in each]

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._first("the vocabulary size", "vocab_size")

    @property
    def encoder_decoder(self) -> bool:
        """Whether the model has an encoder and a decoder."""
        return bool(getattr(self.config, "is_encoder_decoder", False))

    @property
    def task(self) -> str:
        """Task of the model, a key of ``TASKS``, told by its class's name; an unknown class extracts features."""
        return next((task for task, ends in TASKS.items() if ends and self.name.endswith(ends)), "FEATURE_EXTRACTION")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model's floating leaves (the first one's)."""
        return next(d for d in self._model.dtypes.values() if d.is_floating_point)

    @property
    def device(self) -> torch.device:
        """Device of the model's leaves (the first one's); the meta device where only shapes are asked for."""
        return next((t.device for t in self._params.values()), torch.device("meta"))

    @property
    def takes_embeds(self) -> bool:
        """Whether the model's forward takes ``inputs_embeds``."""
        return _takes(self._model.root, "inputs_embeds")

    @property
    def takes_cache(self) -> bool:
        """Whether the model's forward, or that of the backbone under its head, takes ``past_key_values``."""
        return _takes(self._model.root, "past_key_values") or _takes(_backbone(self._model.root), "past_key_values")

    def embed(self, ids: Tensor) -> Tensor:
        """Looks ids up in the model's input embedding, adapted if the net adapts it."""
        return self._model.embed(dict(self._params), ids)

    def head(self, hidden: Tensor) -> Tensor:
        """Computes the logits of the last hidden states, by the model's own head, adapted if the net adapts it.

        Raises:
            ValueError: If the model has none.
        """
        root: Any = self._model.root
        if not hasattr(root, "get_output_embeddings") or root.get_output_embeddings() is None:
            raise ValueError(errors.say(self.name, "the model must have a language model's head", None))
        dtype = next(t.dtype for t in root.get_output_embeddings().parameters())
        return self._model.run(lambda m: m.get_output_embeddings(), dict(self._params), (hidden.to(dtype),), {})[0]

    def classifier(self) -> dict[str, Tensor]:
        """Returns copies of weight and bias of the model's classification head, a linear layer.

        Raises:
            ValueError: If it has none.
        """
        root: Any = self._model.root
        name = next((n for n in ("score", "classifier") if isinstance(getattr(root, n, None), nn.Linear)), None)
        if name is None:
            rule, remedy = "the model must have a linear head 'score' or 'classifier'", "use another task_type"
            raise ValueError(errors.say(self.name, rule, None, remedy))
        found = {n: self._params.get(f"{name}.{n}") for n in ("weight", "bias")}
        return {n: dense(t).clone() for n, t in found.items() if t is not None}

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return self._first("the width", "hidden_size", "n_embd", "d_model")

    def mirror(self, sizes: Sizes, share: bool) -> Mirror:
        """Returns the static part of a smaller decoder of the model's class."""
        return mirror_of(self._model, sizes, share)

    def drawn_mirror(self, sizes: Sizes, share: bool, gen: torch.Generator) -> tuple[Mirror, dict[str, Tensor]]:
        """Makes the tensors of a smaller decoder of the model's class, as transformers initialises it."""
        return drawn(self._model, sizes, share, gen)

    def tokenizer(self, name: str, **options: Any) -> Any:
        """Loads a tokenizer of transformers; code of the repository is never run."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name, **{k: v for k, v in options.items() if k != "trust_remote_code"})

    # -- the call --------------------------------------------------------------------------------------------------------

    def call(
        self,
        name: str,
        /,
        *,
        steps: Sequence[Step] = (),
        forwards: Sequence[Around] = (),
        values: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Calls a method of the model, as methods that wrap the call need it.

        Args:
            name: ``"forward"`` or ``"generate"``.
            steps: Functions that rewrite, in order, what every step of ``generate`` is prepared from: its keyword
                arguments of ``prepare_inputs_for_generation``. Nothing else of ``generate`` sees the rewriting.
            forwards: Functions that run around the model's forward, the last outermost, also around each one inside of
                ``generate``: they get a forward and its keyword arguments. It takes ``values`` too, and ``blocks``, functions
                by dotted name that run around the forwards of those modules.
            values: Values of the context during this call, beside those it has.
            kwargs: The model's own inputs. A cache goes to the backbone if only that takes one.
        """
        if values is not None:
            return self._with(values, functools.partial(self.call, name, steps=steps, forwards=forwards), **kwargs)
        if name == "generate":
            run = functools.partial(_generate, steps=tuple(steps), around=functools.partial(self._around, tuple(forwards)))
            return self._model.run(lambda m: functools.partial(run, m), dict(self._params), (), kwargs)[0]
        return self._around(tuple(forwards), self._forward)(**kwargs)

    def _with(self, values: Mapping[str, Tensor], function: Callable[..., Any], /, **kwargs: Any) -> Any:
        """Calls a function while the call's contexts hold further values."""
        before = dict(self._values)
        self._values.update(values)
        try:
            return function(**kwargs)
        finally:
            self._values.clear()
            self._values.update(before)

    def _around(self, forwards: Sequence[Around], forward: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a forward with functions around it."""

        def valued(*, values: Mapping[str, Tensor] | None = None, **kwargs: Any) -> Any:
            return forward(**kwargs) if values is None else self._with(values, forward, **kwargs)

        made: Callable[..., Any] = valued
        for f in forwards:
            made = functools.partial(f, made)
        return made

    def _forward(self, *, blocks: Mapping[str, Around] | None = None, **kwargs: Any) -> Any:
        params, cache = dict(self._params), kwargs.get("past_key_values")
        if blocks:
            if self._model.remat and torch.is_grad_enabled():
                kwargs.setdefault("use_cache", False)  # as in a plain call
            return self._model.run(lambda m: functools.partial(blocked, m, m, _instead, blocks=blocks), params, (), kwargs)[0]
        if cache is None or _takes(self._model.root, "past_key_values"):
            return self._model(params, **kwargs)
        rest = {k: v for k, v in kwargs.items() if k != "past_key_values"}
        return self._model.run(lambda m: functools.partial(_forward, m, cache), params, (), rest)[0]

    def check_cache(self) -> None:
        """Raises ``ValueError`` if the model has no cache of one key and value per head and token."""
        kinds = {k for k in getattr(self.config, "layer_types", None) or () if k not in _ATTENTION}
        wanted = "key-value prefixes need"
        if not self.takes_cache:
            raise ValueError(errors.say(self.name, f"{wanted} a forward that takes past_key_values", None, "use PromptTuning"))
        if kinds or getattr(self.config, "kv_lora_rank", None):
            found = errors.listed(sorted(kinds)) if kinds else "latent attention"
            raise ValueError(errors.say(self.name, f"{wanted} plain attention in every layer", found, "use PromptTuning"))

    def cache(self, layers: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """Makes a cache from a ``(key, value)`` pair per layer, each ``(batch, kv heads, length, head dim)``.

        Layers that read another layer's keys get none. Where layers differ in shape, each takes the leading heads and
        channels of its pair, and one that needs more than the pair has gets none.
        """
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        if not torch.compiler.is_compiling():
            register_caches()
        windowed = getattr(self.config, "sliding_window", None) or self._per_layer()
        cache = DynamicCache(config=self.config if windowed else None)
        own = len(layers) - (getattr(self.config, "num_kv_shared_layers", 0) or 0)
        shapes = self._per_layer()
        for index, (k, v) in enumerate(layers[: min(own, self.decoder_layers)]):
            heads, width = shapes[index] if shapes else (k.shape[1], k.shape[3])
            if heads <= k.shape[1] and width <= k.shape[3]:
                cache.update(k[:, :heads, :, :width], v[:, :heads, :, :width], index)
        made: Any = EncoderDecoderCache(cache, DynamicCache()) if self.encoder_decoder else cache
        made.virtual_tokens = layers[0][0].shape[-2] if layers else 0
        return made

    def virtual(self, cache: Any) -> int:
        """Counts the tokens that a cache of ``self.cache`` started with; zero for any other."""
        return getattr(cache, "virtual_tokens", 0)

    def held(self, cache: Any) -> int:
        """Counts the tokens in a cache beyond those it started with; zero if there is none."""
        return 0 if cache is None else int(cache.get_seq_length()) - self.virtual(cache)

    def roomy(self, cache: Any) -> Any:
        """Returns an empty cache that grows in place of one of fixed size, which has no room for virtual tokens."""
        return self.cache([]) if cache is not None and getattr(cache, "is_compileable", False) else cache


#: Parameter names of forwards, by class; a dict, because the compiler does not look through a cached function.
_PARAMETERS: dict[type, frozenset[str]] = {}


def _parameters(cls: type) -> frozenset[str]:
    found = _PARAMETERS.get(cls)
    if found is None:
        found = _PARAMETERS[cls] = frozenset(inspect.signature(cls.forward).parameters)
    return found


def _takes(module: nn.Module | None, name: str) -> bool:
    return module is not None and name in _parameters(type(module))


def _backbone(module: nn.Module) -> nn.Module | None:
    """Returns the model without its head, as transformers names it."""
    prefix = getattr(module, "base_model_prefix", "")
    found = getattr(module, prefix, None) if isinstance(prefix, str) and prefix else None
    return found if isinstance(found, nn.Module) else None


@contextmanager
def _instead(module: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Sets a function on a module of the skeleton in place of its class's method, and takes it off again."""
    module.__dict__[name] = function
    try:
        yield
    finally:
        del module.__dict__[name]


def _generate(module: Any, *, steps: Sequence[Step], around: Callable[..., Any], **kwargs: Any) -> Any:
    prepare, forward = module.prepare_inputs_for_generation, module.forward
    wrapped = around(functools.partial(blocked, module, forward, _instead))

    @functools.wraps(forward)  # generate reads the signature here too
    def run(**given: Any) -> Any:
        return wrapped(**given)

    @functools.wraps(prepare)  # generate reads the signature to validate its keywords
    def prepared(input_ids: Tensor, **given: Any) -> Any:
        for step in steps:
            given = step({"input_ids": input_ids, **given})
            input_ids = given.pop("input_ids")
        return prepare(input_ids, **given)

    with _instead(module, "prepare_inputs_for_generation", prepared), _instead(module, "forward", run):
        return module.generate(**kwargs)


def _forward(module: nn.Module, cache: Any, **kwargs: Any) -> Any:
    backbone = _backbone(module)
    assert backbone is not None
    forward = backbone.forward
    with _instead(backbone, "forward", functools.partial(forward, past_key_values=cache)):
        return module(**kwargs)
