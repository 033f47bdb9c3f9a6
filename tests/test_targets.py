"""Choosing sites: peft's rules, compared with what peft resolves, and the stricter checks that are ours."""

import warnings

import peft
import pytest
import torch
import zoo
from torch import nn

from funcpeft import targets
from funcpeft.adapt import adapt
from funcpeft.errors import NoMatchError
from funcpeft.functional import functionalize
from funcpeft.methods import IA3, LNTuning, LoHa, LoKr, LoRA, TrainableTokens, VeRA
from funcpeft.targets import sites_of, target_paths


def bare(config_class, model_class, **config):
    """Makes a model of transformers on the meta device: targets need its structure only."""
    import transformers

    with torch.device("meta"):
        return getattr(transformers, model_class)(getattr(transformers, config_class)(**config))


_SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
MODELS = {
    "llama": lambda: bare("LlamaConfig", "LlamaForCausalLM", **_SMALL),
    "mistral": lambda: bare("MistralConfig", "MistralForCausalLM", num_key_value_heads=1, **_SMALL),
    "qwen2": lambda: bare("Qwen2Config", "Qwen2ForCausalLM", num_key_value_heads=1, **_SMALL),
    "phi": lambda: bare("PhiConfig", "PhiForCausalLM", **_SMALL),
    "opt": lambda: bare(
        "OPTConfig", "OPTForCausalLM", **{**_SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 8}
    ),
    "gpt2": lambda: bare("GPT2Config", "GPT2LMHeadModel", vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=8),
    "bloom": lambda: bare("BloomConfig", "BloomForCausalLM", vocab_size=32, hidden_size=16, n_layer=2, n_head=2),
    "t5": lambda: bare(
        "T5Config", "T5ForConditionalGeneration", vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2
    ),
    "bert": lambda: bare("BertConfig", "BertForSequenceClassification", **_SMALL),
    "roberta": lambda: bare("RobertaConfig", "RobertaForSequenceClassification", **_SMALL),
    "llama-cls": lambda: bare("LlamaConfig", "LlamaForSequenceClassification", pad_token_id=0, **_SMALL),
}


def structure(name):
    """Returns our view of a model of ``MODELS``, its values zero."""
    return functionalize(MODELS[name]().to_empty(device="cpu"))[0]


def pefts(module, **config):
    """Lists the module paths that peft wraps for LoRA."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(module, peft.LoraConfig(**config)).base_model
    return [n.removeprefix("model.") for n, m in wrapped.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


# -- equal to peft -----------------------------------------------------------------------------------------------------------

RULES = {
    "suffix": {"target_modules": ["q_proj", "down_proj"]},
    "dotted suffix": {"target_modules": ["self_attn.q_proj"]},
    "full path": {"target_modules": ["model.layers.1.mlp.up_proj"]},
    "path and suffix": {"target_modules": ["model.layers.1.mlp.up_proj", "v_proj"]},
    "regex": {"target_modules": r".*layers\.\d\.self_attn\.(q|v)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "ALL-LINEAR": {"target_modules": "ALL-Linear"},
    "excluded list": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "excluded regex": {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
    "layer": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 1]},
    "layers, pattern": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "layers, patterns": {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
    "layer and path": {"target_modules": ["v_proj", "model.layers.0.self_attn.q_proj"], "layers_to_transform": [1]},
    "saved": {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["mlp"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_rule_names_what_it_names_in_peft(rule):
    assert list(target_paths(structure("llama"), LoRA(**rule))) == pefts(MODELS["llama"](), **rule)


@pytest.mark.parametrize("name", MODELS)
def test_the_default_of_an_architecture_is_pefts(name):
    assert list(target_paths(structure(name), LoRA())) == pefts(MODELS[name]())


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_leaves_out_the_head_that_peft_leaves_out(name):
    task = {"task_type": "SEQ_CLS"} if name in ("bert", "roberta", "llama-cls") else {}
    assert list(target_paths(structure(name), LoRA(target_modules="all-linear"))) == pefts(
        MODELS[name](), target_modules="all-linear", **task
    )


def test_the_table_has_every_default_of_peft():
    from peft.utils import constants

    tables = {
        "LORA": constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
        "IA3": constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
        "VERA": constants.TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING,
        "LN_TUNING": constants.TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING,
        "FOURIERFT": constants.TRANSFORMERS_MODELS_TO_FOURIERFT_TARGET_MODULES_MAPPING,
    }
    ours = targets.default_table()
    for family, table in tables.items():
        for architecture, want in table.items():
            rows = [r["targets"] for r in ours[architecture] if family in r["methods"]]
            assert rows == [want], (family, architecture)


def test_methods_of_one_table_share_defaults():
    model = structure("llama")
    lora = target_paths(model, LoRA())
    assert lora == target_paths(model, LoHa()) == target_paths(model, LoKr()) == target_paths(model, VeRA())
    assert {p.rsplit(".", 1)[-1] for p in target_paths(model, IA3())} == {"k_proj", "v_proj", "down_proj"}
    assert {p.rsplit(".", 1)[-1] for p in target_paths(model, LNTuning())} == {
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }


def test_a_default_need_not_name_only_layers_that_this_model_has(monkeypatch):
    model = structure("llama")
    table = {"llama": [{"targets": ["q_proj", "not_here"], "methods": ["LORA"]}]}
    monkeypatch.setattr(targets, "default_table", lambda: table)
    assert {p.rsplit(".", 1)[-1] for p in target_paths(model, LoRA())} == {"q_proj"}
    table["llama"][0]["targets"] = ["not_here"]
    with pytest.raises(NoMatchError, match="every entry of target_modules must match a module, got 'not_here'"):
        target_paths(model, LoRA())


# -- stricter than peft -------------------------------------------------------------------------------------------------------

LLAMA = {
    "no such name": ({"target_modules": ["q_prj"]}, "'q_prj'; did you mean 'q_proj'"),
    "one of several": ({"target_modules": ["q_proj", "v_pro"]}, "'v_pro'; did you mean 'v_proj'"),
    "a part of a name": ({"target_modules": ["proj"]}, "every entry of target_modules must match a module, got 'proj'"),
    "a string is a whole path": ({"target_modules": "q_proj"}, "must match a module, got 'q_proj'"),
    "a path": ({"target_modules": ["layers.7.self_attn.q_proj"]}, "did you mean 'model.layers.[01].self_attn.q_proj'"),
    "excluded": ({"target_modules": ["q_proj"], "exclude_modules": ["k_prj"]}, "every entry of exclude_modules .* 'k_prj'"),
    "all excluded": ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "must leave a module to adapt"),
    "all saved": ({"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]}, "must leave a module to adapt"),
    "saved": ({"target_modules": ["q_proj"], "modules_to_save": ["head"]}, "got 'head'; did you mean 'lm_head'"),
    "no layer": ({"target_modules": ["q_proj"], "layers_to_transform": [0, 5]}, r"must be a layer, got 5; layers are \[0, 1\]"),
    "no pattern": (
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "blocks"},
        "every entry of layers_to_transform must be a layer",
    ),
    "rank": (
        {"target_modules": ["q_proj"], "rank_pattern": {"q_prj": 2}},
        "every key of rank_pattern must name a site, got 'q_prj'; did you mean 'q_proj'",
    ),
    "alpha": (
        {"target_modules": ["q_proj"], "alpha_pattern": {"v_proj": 2}},
        "every key of alpha_pattern must name a site, got 'v_proj'",
    ),
    "rank of one layer": (
        {"target_modules": ["q_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 2, "layers.9.self_attn.q_proj": 3}},
        "got 'layers.9.self_attn.q_proj'; did you mean",
    ),
    "parameter": ({"target_parameters": ["q_proj.wieght"]}, "every entry of target_parameters must match a parameter"),
    "nothing at all": ({"target_modules": []}, "a method must adapt something"),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "text"), LLAMA.values(), ids=LLAMA)
def test_what_matches_nothing_is_an_error_that_names_the_nearest(fields, text):
    with pytest.raises(NoMatchError, match=text):
        adapt(structure("llama"), LoRA(**fields))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"target_modules": "q_proj", "layers_to_transform": [0]}, "layers_to_transform needs a list of target_modules"),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, "layers_to_transform needs a list of target_modules"),
        ({"target_modules": ["q_proj"], "layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
        ({"target_modules": "(q_proj"}, "target_modules must be a valid regular expression"),
        ({"target_modules": ["q_proj"], "exclude_modules": "("}, "exclude_modules must be a valid regular expression"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"(": 2}}, "a key of rank_pattern must be a valid regular expression"),
    ],
)
def test_fields_that_do_not_fit_each_other_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        adapt(structure("llama"), LoRA(**fields))


def test_a_model_without_linear_layers_or_type_is_refused():
    model, _ = functionalize(nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4)))
    with pytest.raises(NoMatchError, match="'all-linear' must match a linear layer"):
        adapt(model, LoRA(target_modules="all-linear"))
    with pytest.raises(ValueError, match="target_modules has no default for this model"):
        adapt(model, LoRA())
    with pytest.raises(ValueError, match="no input embedding"):
        adapt(model, TrainableTokens())


def test_a_target_of_another_kind_is_named():
    with pytest.raises(TypeError, match=r"lora at 'model.norm': a target must be one of the kinds .*LlamaRMSNorm"):
        adapt(structure("llama"), LoRA(target_modules=["norm"]))
    with pytest.raises(TypeError, match=r"ia3 at 'model.embed_tokens': .*got embedding"):
        adapt(structure("llama"), IA3(target_modules=["embed_tokens"]))
    with pytest.raises(TypeError, match="narrow target_parameters"):
        adapt(structure("llama"), LoRA(target_parameters=["norm.weight"]))


def test_the_first_pattern_that_matches_wins_and_anchors_work():
    method = LoRA(
        target_modules=["q_proj", "v_proj"],
        r=8,
        rank_pattern={r"^model.layers.0.*": 2, "v_proj": 3},
        alpha_pattern={"q_proj": 1},
    )
    ranks = {p: method.rank(p) for p in sites_of(structure("llama"), method)}
    assert ranks == {
        f"model.layers.{i}.self_attn.{n}_proj": r for i, n, r in ((0, "q", 2), (0, "v", 2), (1, "q", 8), (1, "v", 3))
    }


# -- beside the targets -------------------------------------------------------------------------------------------------------


def keys(net, role):
    return [s.weight for e in net.entries if e.role == role for s in e.sites.values()]


def test_modules_to_save_take_every_parameter_below():
    net = adapt(structure("bert"), LoRA(target_modules=["query"], modules_to_save=["classifier", "pooler"]))
    assert keys(net, "modules_to_save") == [
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    ]


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_those_that_peft_trains(bias):
    net = adapt(structure("bert"), LoRA(target_modules=["query"], bias=bias))
    theirs = peft.get_peft_model(MODELS["bert"](), peft.LoraConfig(target_modules=["query"], bias=bias))
    want = [
        n.removeprefix("base_model.model.").replace(".base_layer", "")
        for n, p in theirs.named_parameters()
        if n.endswith(".bias") and p.requires_grad
    ]
    assert keys(net, "bias") == want


def test_a_bias_that_is_nowhere_is_an_error():
    with pytest.raises(NoMatchError, match="bias must find a bias to train"):
        adapt(structure("llama"), LoRA(target_modules=["q_proj"], bias="lora_only"))


def test_token_rows_are_of_the_input_embedding_or_of_the_modules_named():
    model = structure("gpt2")
    listed = adapt(model, LoRA(trainable_token_indices=[1, 2]))
    named = adapt(model, LoRA(trainable_token_indices={"wte": [1, 2], "wpe": [0]}))
    assert keys(listed, "trainable_token_indices") == ["transformer.wte.weight"]
    assert keys(named, "trainable_token_indices") == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert [e.method.token_indices for e in named.entries[1:]] == [(1, 2), (0,)]
    assert keys(adapt(model, TrainableTokens(token_indices=[3])), "method") == ["transformer.wte.weight"]
    with pytest.raises(IndexError, match=r"'transformer\.wpe': token_indices must be below 8, got 9"):
        adapt(model, LoRA(trainable_token_indices={"wpe": [9]}))


def test_parameters_are_sites_by_their_own_names():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.gate = nn.Parameter(torch.zeros(3, 6, 4)), nn.Parameter(torch.zeros(3, 6, 4))
            self.out = nn.Linear(6, 2)

    model, _ = functionalize(nn.ModuleDict({"experts": Experts()}))
    sites = sites_of(model, LoRA(target_parameters=["up", "experts.out.weight"], rank_pattern={"up": 2}))
    assert {p: (s.kind.name, s.met) for p, s in sites.items()} == {
        "experts.up": ("raw", False),
        "experts.out": ("linear", True),
    }
    both = sites_of(model, LoRA(target_modules=["out"], target_parameters=["gate", "out.weight"]))
    assert list(both) == ["experts.out", "experts.gate"]
    assert [s.index for s in both.values()] == [0, 1]


def test_attention_that_reads_its_matrices_is_two_sites():
    model, _ = functionalize(nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)}))
    sites = sites_of(model, LoRA(target_modules=["attn"]))
    assert {p: (s.bias, s.met) for p, s in sites.items()} == {
        "attn.in_proj_weight": ("attn.in_proj_bias", False),
        "attn.out_proj": ("attn.out_proj.bias", False),
    }
    apart, _ = functionalize(nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, kdim=4, vdim=6)}))
    assert list(sites_of(apart, LoRA(target_modules=["attn"]))) == [
        f"attn.{n}" for n in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj")
    ]


def test_a_name_given_as_a_string_is_told_from_a_list():
    model, _ = zoo.functional("llama")
    with pytest.raises(NoMatchError, match=r"a string is a regular expression for the whole path, so write \['q_proj'\]"):
        adapt(model, LoRA(target_modules="q_proj"))
