"""Tiny models from configs, made once per process: ``zoo.model("llama")``, ``zoo.inputs("llama")``.

Every module is frozen (no parameter requires grad) and in eval mode; nothing may write it. Weights are drawn from a fixed
seed, wider than transformers' defaults, so that outputs of a wrong computation differ visibly from those of a right one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 96

_TEXT = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GROUPED = {"intermediate_size": 48, "num_key_value_heads": 2, **_TOKENS}
_IMAGE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 8, "patch_size": 4}


def _llama(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_TEXT, **_GROUPED, num_hidden_layers=layers))


def _llama_tied(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_TEXT, **_GROUPED, num_hidden_layers=layers, tie_word_embeddings=True))


def _llama_dynamic(layers: int) -> Any:
    """Llama whose RoPE table grows with the input: trained on 8 positions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    return LlamaForCausalLM(
        LlamaConfig(**_TEXT, **_GROUPED, num_hidden_layers=layers, rope_parameters=rope, max_position_embeddings=8)
    )


def _qwen3(layers: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_TEXT, **_GROUPED, num_hidden_layers=layers, head_dim=8))


def _gemma3(layers: int) -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **_TEXT,
        **_GROUPED,
        num_hidden_layers=layers,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"][:layers],
    )
    return Gemma3ForCausalLM(config)


def _gpt2(layers: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=layers, n_head=4, n_positions=64, **_TOKENS))


def _opt(layers: int) -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(**_TEXT, num_hidden_layers=layers, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32, **_TOKENS)
    )


def _t5(layers: int) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": layers, "num_heads": 4, "num_decoder_layers": layers}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, **shape, **tokens))


def _bert(layers: int) -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**_TEXT, num_hidden_layers=layers, intermediate_size=48, max_position_embeddings=64))


def _vit(layers: int) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**_IMAGE, num_hidden_layers=layers, num_labels=5))


def _clip(layers: int) -> Any:
    from transformers import CLIPConfig, CLIPModel

    text = {
        **_TEXT,
        "num_hidden_layers": layers,
        "intermediate_size": 48,
        "max_position_embeddings": 32,
        "projection_dim": 16,
        **_TOKENS,
    }
    vision = {**_IMAGE, "num_hidden_layers": layers, "projection_dim": 16}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def _whisper(layers: int) -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    depth = {"encoder_layers": layers, "decoder_layers": layers, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 10}
    tokens = {**_TOKENS, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None}
    return WhisperForConditionalGeneration(WhisperConfig(vocab_size=VOCAB, max_target_positions=32, **depth, **sizes, **tokens))


def _mixtral(layers: int) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(**_TEXT, **_GROUPED, num_hidden_layers=layers, num_local_experts=4, num_experts_per_tok=2)
    )


def _mamba(layers: int) -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(
        MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=layers, state_size=4, time_step_rank=4, **_TOKENS)
    )


MAKERS: dict[str, Callable[[int], Any]] = {
    "llama": _llama,
    "llama_tied": _llama_tied,
    "llama_dynamic": _llama_dynamic,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "opt": _opt,
    "t5": _t5,
    "bert": _bert,
    "vit": _vit,
    "clip": _clip,
    "whisper": _whisper,
    "mixtral": _mixtral,
    "mamba": _mamba,
}

#: The architectures, variants of one left out.
ARCHITECTURES = tuple(n for n in MAKERS if "_" not in n)

#: Linear layers of each that LoRA may target, one met early and one late.
TARGETS: dict[str, list[str]] = {
    "gpt2": ["c_attn", "c_proj"],
    "opt": ["q_proj", "fc2"],
    "t5": ["q", "wo"],
    "bert": ["query", "output.dense"],
    "vit": ["q_proj", "fc2"],
    "clip": ["q_proj", "fc2"],
    "whisper": ["q_proj", "fc2"],
    "mixtral": ["q_proj", "v_proj"],
    "mamba": ["in_proj", "dt_proj"],
}


def targets(name: str) -> list[str]:
    """Returns module names to adapt in a model of the zoo."""
    return TARGETS.get(name, ["q_proj", "down_proj"])


@functools.cache
def model(name: str, layers: int = 2) -> Any:
    """Returns a module of the zoo, the same object at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = MAKERS[name](layers)
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.05 * torch.randn_like(p))
    return module.eval().requires_grad_(False)


@functools.cache
def functional(name: str, layers: int = 2) -> tuple[Any, dict[str, Any]]:
    """Returns ``functionalize(model(name))``, the same objects at every call."""
    from funcpeft.functional import functionalize

    return functionalize(model(name, layers))


def ids(batch: int = 2, length: int = 6, seed: int = 0) -> Tensor:
    """Draws token ids ``(batch, length)``, none of them special."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Draws standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(name: str, batch: int = 2, length: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """Returns keyword inputs of a model of the zoo."""
    text = ids(batch, length, seed)
    match name:
        case "t5":
            return {"input_ids": text, "decoder_input_ids": text[:, :4]}
        case "vit":
            return {"pixel_values": noise(batch, 3, 8, 8, seed=seed)}
        case "clip":
            return {"input_ids": text, "pixel_values": noise(batch, 3, 8, 8, seed=seed)}
        case "whisper":
            return {"input_features": noise(batch, 8, 20, seed=seed), "decoder_input_ids": text[:, :4]}
        case _:
            return {"input_ids": text}


def leading(output: Any) -> Tensor:
    """Returns the output tensor to compare or to make a loss of: logits, or whatever comes first."""
    for field in ("logits", "logits_per_image", "last_hidden_state"):
        if getattr(output, field, None) is not None:
            return getattr(output, field)
    return output if isinstance(output, Tensor) else output[0]


def plain() -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    """Returns plain modules of torch with positional inputs, frozen and in eval mode, drawn from a fixed seed."""
    image, ids_ = noise(2, 4, 9, 9), torch.tensor([[1, 2, 0], [5, 1, 1]])
    made: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made["linear"] = nn.Linear(4, 6), (noise(3, 4),)
        made["linear_no_bias"] = nn.Linear(4, 6, bias=False), (noise(2, 3, 4),)
        made["conv1d_groups"] = nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (noise(2, 4, 9),)
        made["conv1d_same"] = nn.Conv1d(4, 6, 3, padding="same", dilation=2), (noise(2, 4, 9),)
        for mode in ("zeros", "reflect", "replicate", "circular"):
            made[f"conv2d_{mode}"] = nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1), padding_mode=mode), (image,)
        made["conv2d_dilated"] = nn.Conv2d(4, 8, 3, dilation=2, groups=4, bias=False), (image,)
        made["conv3d"] = nn.Conv3d(2, 4, 2, stride=(1, 2, 1), padding=1, groups=2), (noise(1, 2, 4, 5, 4),)
        made["embedding"] = nn.Embedding(7, 5), (ids_,)
        made["embedding_padding"] = nn.Embedding(7, 5, padding_idx=1), (ids_,)
        made["embedding_max_norm"] = nn.Embedding(7, 5, max_norm=1.0), (ids_,)
        made["layer_norm"] = nn.LayerNorm(4), (noise(3, 4),)
        made["rms_norm"] = nn.RMSNorm(4), (noise(3, 4),)
        made["group_norm"] = nn.GroupNorm(2, 4), (image,)
        made["batch_norm"] = nn.BatchNorm2d(4), (image,)
        made["attention"] = nn.MultiheadAttention(8, 2, batch_first=True), (noise(2, 5, 8),) * 3
        made["attention_kdim"] = (
            nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True),
            (noise(2, 5, 8), noise(2, 3, 6), noise(2, 3, 4)),
        )
        made["lstm"] = nn.LSTM(4, 6, num_layers=2, bidirectional=True, batch_first=True), (noise(2, 5, 4),)
        made["gru"] = nn.GRU(4, 6), (noise(5, 2, 4),)
        made["encoder_layer"] = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (noise(2, 5, 8),)
        for module, _ in made.values():
            for n, t in (*module.named_parameters(), *module.named_buffers()):
                if t.is_floating_point():
                    t.data = t.abs() + 0.1 if "var" in n else t + 0.1 * torch.randn_like(t)
    return {name: (m.eval().requires_grad_(False), args) for name, (m, args) in made.items()}


#: Names of the plain modules.
PLAIN = tuple(plain())
