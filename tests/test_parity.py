"""Differential tests against peft in float64: forward, merged weights, init under one seed, files both ways.

Every row builds peft's model, moves its parameters away from init, saves it, and reads the file here. Where peft computes in
float32 inside (``single=True``), the tolerance is float32's. What peft gets wrong is not here: see test_peft_differences.py.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from funcpeft import methods
from funcpeft.adapt import adapt, peft_init
from funcpeft.functional import functionalize
from funcpeft.interop.peft import load_peft, method_of, read_config, registered, save_peft
from funcpeft.tree import as_tuple


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(12, 16)
        self.norm = nn.LayerNorm(16)
        self.lin1 = nn.Linear(16, 8, bias=False)
        self.lin2 = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm(torch.tanh(self.lin0(x)))
        return self.head(torch.tanh(self.lin2(self.lin1(x))))


class Convs(nn.Module):
    def __init__(self, dims=2, kernel=3):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.conv0 = conv(4, 8, kernel, stride=2, padding=1)
        self.conv1 = conv(8, 4, 1)

    def forward(self, x):
        return self.conv1(torch.tanh(self.conv0(x))).flatten(1)


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.lin0 = nn.Linear(8, 6)

    def forward(self, ids):
        return self.lin0(self.emb(ids))


class Gpt(nn.Module):
    def __init__(self):
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.c_attn = Conv1D(24, 8)
        self.c_proj = Conv1D(8, 24)

    def forward(self, x):
        return self.c_proj(torch.tanh(self.c_attn(x)))


MODELS = {
    "mlp": (Mlp, lambda: torch.randn(5, 12, dtype=torch.float64)),
    "mlp3d": (Mlp, lambda: torch.randn(2, 5, 12, dtype=torch.float64)),
    "conv1d": (lambda: Convs(1), lambda: torch.randn(2, 4, 9, dtype=torch.float64)),
    "conv2d": (Convs, lambda: torch.randn(2, 4, 9, 9, dtype=torch.float64)),
    "conv3d": (lambda: Convs(3), lambda: torch.randn(2, 4, 5, 5, 5, dtype=torch.float64)),
    "conv1x1": (lambda: Convs(2, 1), lambda: torch.randn(2, 4, 5, 5, dtype=torch.float64)),
    "embedding": (Embedded, lambda: torch.arange(20).reshape(4, 5)),
    "gpt": (Gpt, lambda: torch.randn(2, 3, 8, dtype=torch.float64)),
}


@dataclasses.dataclass(frozen=True)
class Row:
    config: str
    model: str
    kwargs: dict
    single: bool = False
    merges: bool = True
    init: bool = True

    def __str__(self):
        return f"{self.config}-{self.model}-{'-'.join(f'{k}={v}' for k, v in self.kwargs.items() if k != 'target_modules')}"


def lora(model, targets, **kwargs):
    return Row("LoraConfig", model, {"target_modules": targets, "r": 4, "lora_alpha": 6, **kwargs})


LINEARS = ["lin0", "lin1", "lin2"]
CONVS = ["conv0", "conv1"]
GPT = ["c_attn", "c_proj"]

ROWS = [
    lora("mlp", LINEARS),
    lora("mlp3d", LINEARS, use_rslora=True),
    lora("mlp", LINEARS, init_lora_weights=False),
    lora("mlp", LINEARS, init_lora_weights="gaussian"),
    lora("mlp", LINEARS, init_lora_weights="orthogonal"),
    lora("mlp", ["lin0", "lin2"], lora_bias=True),
    lora("mlp", "lin[02]"),
    lora("mlp", LINEARS, exclude_modules=["lin1"]),
    lora("mlp", LINEARS, rank_pattern={"lin1": 2}, alpha_pattern={"lin2": 3}),
    lora("mlp", ["lin0"], modules_to_save=["head"]),
    lora("mlp", ["lin0"], bias="all"),
    lora("mlp", ["lin0"], bias="lora_only"),
    lora("gpt", GPT),
    lora("conv1d", CONVS),
    lora("conv2d", CONVS),
    lora("conv3d", ["conv0"]),
    lora("embedding", ["emb", "lin0"]),
    lora("embedding", ["lin0"], trainable_token_indices={"emb": [1, 5]}),
    lora("mlp", LINEARS, use_dora=True),
    lora("gpt", GPT, use_dora=True),
    lora("conv2d", CONVS, use_dora=True),
    lora("conv1d", CONVS, use_dora=True),
    lora("embedding", ["emb", "lin0"], use_dora=True),
    Row("IA3Config", "mlp", {"target_modules": LINEARS, "feedforward_modules": ["lin1"]}),
    Row("IA3Config", "mlp", {"target_modules": LINEARS, "feedforward_modules": [], "init_ia3_weights": False}),
    Row("IA3Config", "gpt", {"target_modules": GPT, "feedforward_modules": ["c_proj"]}),
    Row("IA3Config", "conv2d", {"target_modules": CONVS, "feedforward_modules": ["conv1"]}),
    Row("IA3Config", "conv3d", {"target_modules": CONVS, "feedforward_modules": ["conv0"]}),
    Row("VeraConfig", "mlp", {"target_modules": LINEARS, "r": 4, "d_initial": 0.2}),
    Row("VeraConfig", "mlp3d", {"target_modules": LINEARS, "r": 4, "save_projection": False, "projection_prng_key": 3}),
    Row("VeraConfig", "gpt", {"target_modules": GPT, "r": 4, "bias": "vera_only"}),
    Row("FourierFTConfig", "mlp", {"target_modules": LINEARS, "n_frequency": 9, "scaling": 30.0}, single=True),
    Row("FourierFTConfig", "mlp",
        {"target_modules": LINEARS, "n_frequency": 9, "n_frequency_pattern": {"lin1": 5}, "random_loc_seed": 5}, single=True),
    Row("FourierFTConfig", "gpt", {"target_modules": GPT, "n_frequency": 9}, single=True),
    Row("OFTConfig", "mlp", {"target_modules": LINEARS, "oft_block_size": 4}, single=True),
    Row("OFTConfig", "mlp", {"target_modules": LINEARS, "oft_block_size": 4, "use_cayley_neumann": False}, single=True),
    Row("OFTConfig", "mlp", {"target_modules": LINEARS, "oft_block_size": 4, "num_cayley_neumann_terms": 3}, single=True),
    Row("OFTConfig", "mlp",
        {"target_modules": LINEARS, "oft_block_size": 0, "r": 2, "block_share": True, "bias": "oft_only"}, single=True),
    Row("OFTConfig", "mlp", {"target_modules": LINEARS, "oft_block_size": 4, "coft": True, "eps": 0.05}, single=True),
    Row("OFTConfig", "conv1x1", {"target_modules": CONVS, "oft_block_size": 4}, single=True),
    Row("LoHaConfig", "mlp", {"target_modules": LINEARS, "r": 3, "alpha": 5}, single=True),
    Row("LoHaConfig", "conv2d", {"target_modules": CONVS, "r": 3, "alpha": 5}, single=True),
    Row("LoHaConfig", "conv2d", {"target_modules": CONVS, "r": 3, "alpha": 4, "use_effective_conv2d": True}, single=True),
    Row("LoHaConfig", "mlp",
        {"target_modules": LINEARS, "r": 3, "rank_pattern": {"lin1": 2}, "alpha_pattern": {"lin0": 2},
         "init_weights": False}, single=True),
    Row("LoKrConfig", "mlp", {"target_modules": LINEARS, "r": 2, "alpha": 5}, single=True),
    Row("LoKrConfig", "mlp", {"target_modules": LINEARS, "r": 1, "decompose_both": True, "decompose_factor": 4}, single=True),
    Row("LoKrConfig", "mlp", {"target_modules": LINEARS, "r": 2, "init_weights": "lycoris"}, single=True),
    Row("LoKrConfig", "conv2d", {"target_modules": CONVS, "r": 2, "use_effective_conv2d": True}, single=True),
    Row("LoKrConfig", "conv2d", {"target_modules": CONVS, "r": 8}, single=True),
    Row("ShiraConfig", "mlp", {"target_modules": LINEARS, "r": 2}),
    Row("ShiraConfig", "mlp3d", {"target_modules": LINEARS, "r": 2, "random_seed": 11, "init_weights": False}),
    Row("MissConfig", "mlp", {"target_modules": LINEARS, "r": 4}),
    Row("MissConfig", "mlp", {"target_modules": LINEARS, "r": 5, "init_weights": False}),
    Row("MissConfig", "mlp", {"target_modules": LINEARS, "r": 4, "init_weights": "bat"}, single=True),
    Row("MissConfig", "mlp", {"target_modules": LINEARS, "r": 4, "mini_r": 2, "init_weights": "mini"}),
    Row("RoadConfig", "mlp", {"target_modules": LINEARS, "group_size": 4}),
    Row("RoadConfig", "mlp3d", {"target_modules": LINEARS, "group_size": 8, "variant": "road_2"}),
    Row("RoadConfig", "mlp", {"target_modules": LINEARS, "group_size": 2, "variant": "road_4", "init_weights": False}),
    Row("LNTuningConfig", "mlp", {"target_modules": ["norm"]}),
    Row("TrainableTokensConfig", "embedding", {"target_modules": ["emb"], "token_indices": [3, 0, 7]}),
]  # fmt: skip


def base_of(row):
    torch.manual_seed(1)
    make, draw = MODELS[row.model]
    return make().double().eval(), draw()


def oracle(row, seed=5):
    """Returns peft's model of a row, freshly initialised under a seed."""
    module, x = base_of(row)
    config = getattr(peft, row.config)(**copy.deepcopy(row.kwargs))
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(module, config).eval(), x


def perturb(model):
    torch.manual_seed(9)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))


def saved(row, folder):
    model, x = oracle(row)
    perturb(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return model, x


def tolerance(row, reference):
    eps = torch.finfo(torch.float32 if row.single else torch.float64).eps
    return 500 * eps * (1 + float(reference.abs().max()))


@pytest.mark.filterwarnings("ignore:Specified to not save vera_A", "ignore:Sparse invariant checks")
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_peft_file_computes_the_same_here(row, tmp_path):
    theirs, x = saved(row, tmp_path)
    model, params = functionalize(base_of(row)[0])
    net, adapter = load_peft(model, params, tmp_path)
    with torch.no_grad():
        want, got = theirs(x), net(params, adapter, x)
        plain = model(params, x)
    assert (got - want).abs().max() <= tolerance(row, want)
    assert (want - plain).abs().max() > 100 * tolerance(row, want)
    if row.merges:
        merged, report = net.merge(params, adapter)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = theirs.merge_and_unload().state_dict()
        for key, w in state.items():
            assert (merged[key] - w).abs().max() <= tolerance(row, w), key
        assert all(float(v["realised"]) > 0.999 for v in report.sites.values())


@pytest.mark.filterwarnings("ignore:Specified to not save vera_A", "ignore:Sparse invariant checks")
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_file_written_here_computes_the_same_in_peft(row, tmp_path):
    theirs, x = saved(row, tmp_path / "theirs")
    model, params = functionalize(base_of(row)[0])
    net, adapter = load_peft(model, params, tmp_path / "theirs")
    save_peft(net, adapter, tmp_path / "ours")
    wrote, read = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "theirs"))
    surplus = {k for k in read.keys() - wrote.keys() if not k.endswith("base_layer.weight")}
    assert not surplus
    assert wrote.keys() <= read.keys()
    assert all(torch.equal(wrote[k], read[k]) and wrote[k].dtype == read[k].dtype for k in wrote)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(
            "ignore", message=".*(fan_in_fan_out|save vera_A|load vera_A|Sparse invariant|Unsupported layer type).*"
        )
        back = peft.PeftModel.from_pretrained(base_of(row)[0], tmp_path / "ours").eval()
    with torch.no_grad():
        assert (back(x) - theirs(x)).abs().max() <= tolerance(row, theirs(x))


@pytest.mark.filterwarnings("ignore:Specified to not save vera_A")
@pytest.mark.parametrize("row", [r for r in ROWS if r.init], ids=str)
def test_init_under_one_seed_is_bit_for_bit_peft(row, tmp_path):
    theirs, _ = oracle(row)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path)
    model, params = functionalize(base_of(row)[0])
    net = adapt(model, method_of(read_config(tmp_path / "adapter_config.json")))
    ours = peft_init(net, params, seed=5)
    save_peft(net, ours, tmp_path / "ours")
    want, got = load_file(tmp_path / "adapter_model.safetensors"), load_file(tmp_path / "ours" / "adapter_model.safetensors")
    for key, t in got.items():
        assert torch.equal(t, want[key]), f"{key}: differs by {(t.double() - want[key].double()).abs().max()}"


def test_every_config_key_written_is_one_of_pefts(tmp_path):
    mapping = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    for kind, classes in registered().items():
        for cls in classes:
            names = {f.name for f in dataclasses.fields(mapping[kind])}
            shared = (
                {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
                if hasattr(cls, "wrap")
                else set()
            )
            own = {f.name for f in dataclasses.fields(cls)} - set(cls.peft_lacks) - set(cls.peft_implied) - shared
            assert own <= names, f"{cls.__name__}: {sorted(own - names)} are not fields of {kind}"
            assert set(cls.peft_fixed) <= names, f"{cls.__name__}: {sorted(set(cls.peft_fixed) - names)}"


def test_defaults_are_pefts():
    mapping = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    for kind, classes in registered().items():
        for cls in classes:
            for f in dataclasses.fields(cls):
                theirs = next((g for g in dataclasses.fields(mapping[kind]) if g.name == f.name), None)
                if theirs is None or theirs.default is dataclasses.MISSING or f.name == "token_indices":
                    continue
                assert (f.default or None) == (theirs.default or None), (
                    f"{cls.__name__}.{f.name}: {f.default} against {theirs.default}"
                )


def test_rows_cover_every_method_with_weights():
    covered = {r.config for r in ROWS}
    mapping = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    for name in methods.__all__:
        cls = getattr(methods, name)
        if cls.peft_type and not hasattr(cls, "wrap"):
            assert mapping[cls.peft_type].__name__ in covered, name


def test_half_precision_init_is_rounded_as_peft_rounds(tmp_path):
    row = lora("mlp", LINEARS)
    module, _ = base_of(row)
    config = peft.LoraConfig(**copy.deepcopy(row.kwargs))
    torch.manual_seed(5)
    theirs = peft.get_peft_model(module.bfloat16(), config)
    theirs.save_pretrained(tmp_path)
    model, params = functionalize(base_of(row)[0].bfloat16())
    net = adapt(model, method_of(read_config(tmp_path / "adapter_config.json")))
    ours = as_tuple(peft_init(net, params, seed=5))[0]
    for key, t in load_file(tmp_path / "adapter_model.safetensors").items():
        path, leaf = key.removeprefix("base_model.model.").split(".lora_")
        assert t.dtype == torch.float32
        assert torch.equal(ours.params[path][leaf[0]], t)
