"""Tied weights adapted as one, and layers replicated with shared weights; peft is the oracle where it is right."""

import copy
import warnings

import peft
import pytest
import torch
import zoo
from differences import differs
from safetensors.torch import load_file, save_file
from torch import nn

import funcpeft as fp
from funcpeft.errors import CheckpointError

IDS = torch.randint(3, 30, (2, 5), generator=torch.Generator().manual_seed(0))


def tied():
    return copy.deepcopy(zoo.model("llama_tied")).double()


def moved(adapter, scale=0.3):
    gen = torch.Generator().manual_seed(3)
    made = []
    for a in adapter if isinstance(adapter, tuple) else (adapter,):
        params = {
            p: {n: t + scale * torch.randn(t.shape, generator=gen, dtype=t.dtype) for n, t in v.items()}
            for p, v in a.params.items()
        }
        made.append(a.replace(params=params))
    return tuple(made) if isinstance(adapter, tuple) else made[0]


def theirs(module, **fields):
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(module, peft.LoraConfig(r=2, lora_alpha=3, **fields)).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return wrapped


def test_a_magnitude_of_an_embedding_is_not_tied_to_a_head():
    model, _ = fp.functionalize(tied())
    with pytest.raises(ValueError, match="the magnitude of an embedding has no counterpart at its tied head"):
        fp.adapt(model, fp.DoRA(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True))


TIES = [
    {"target_modules": ["embed_tokens"]},
    {"target_modules": ["embed_tokens", "lm_head"]},
    {"target_modules": ["lm_head", "q_proj"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
]


@pytest.mark.parametrize("fields", TIES, ids=str)
def test_a_tied_weight_is_adapted_as_one(fields, tmp_path):
    wrapped = theirs(tied(), ensure_weight_tying=True, **fields)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():  # peft's two parameters share storage until one of them is moved
            if "lm_head.lora_" in name:
                other = "lora_embedding_B" if "lora_A" in name else "lora_embedding_A"
                source = next(q for n, q in wrapped.named_parameters() if other in n)
                p.copy_(source.T)
        want = wrapped(IDS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(tmp_path / "theirs")
    model, params = fp.functionalize(tied())
    net, adapter = fp.load_peft(model, params, tmp_path / "theirs")
    assert torch.allclose(net(params, adapter, input_ids=IDS).logits, want, atol=1e-12)
    assert not torch.allclose(want, model(params, input_ids=IDS).logits, atol=1e-3)
    fp.save_peft(net, adapter, tmp_path / "ours")
    wrote, read = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "theirs"))
    assert {k for k in read if "base_layer" not in k} == wrote.keys()
    assert all(torch.equal(read[k], wrote[k]) for k in wrote)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftModel.from_pretrained(tied(), tmp_path / "ours").eval()
    assert torch.allclose(back(IDS).logits, want, atol=1e-12)


@pytest.mark.parametrize("fields", TIES, ids=str)
def test_merging_keeps_the_tie_and_adds_the_update_once(fields):
    model, params = fp.functionalize(tied())
    net = fp.adapt(model, fp.LoRA(r=2, ensure_weight_tying=True, **fields))
    adapter = moved(net.init(params, 0))
    merged, _ = net.merge(params, adapter)
    got = net(params, adapter, input_ids=IDS).logits
    assert torch.allclose(model(merged, input_ids=IDS).logits, got, atol=1e-10)
    assert "lm_head.weight" not in merged
    if "modules_to_save" not in fields:
        back = net.unmerge(merged, adapter)
        assert back.keys() == params.keys()
        assert all(torch.allclose(back[k], v, atol=1e-12) for k, v in params.items())


@differs(
    "LoRA",
    "`ensure_weight_tying`: merging adds the update twice to the shared weight",
    "once; embedding and head are one tensor with one set of leaves",
)
def test_peft_merges_a_tied_update_twice():
    wrapped = theirs(tied(), target_modules=["embed_tokens"], ensure_weight_tying=True)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lm_head.lora_" in name:
                other = "lora_embedding_B" if "lora_A" in name else "lora_embedding_A"
                p.copy_(next(q for n, q in wrapped.named_parameters() if other in n).T)
        a, b = (next(p for n, p in wrapped.named_parameters() if f"embedding_{x}" in n) for x in "AB")
        update = 1.5 * (b @ a).T
        before = tied().model.embed_tokens.weight
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            after = wrapped.merge_and_unload().model.embed_tokens.weight
    assert torch.allclose(after, before + 2 * update)


def test_gradients_of_a_tied_update_are_those_of_both_modules():
    model, params = fp.functionalize(tied())
    net = fp.adapt(model, fp.LoRA(r=2, ensure_weight_tying=True, target_modules=["embed_tokens"]))
    adapter = moved(net.init(params, 0))

    def loss(p):
        return net(params, adapter.replace(params=p), input_ids=IDS).logits.square().sum()

    def dense(p):
        leaves = p["model.embed_tokens"]
        weight = params["model.embed_tokens.weight"] + 4.0 * (leaves["B"] @ leaves["A"]).T
        return model({**params, "model.embed_tokens.weight": weight}, input_ids=IDS).logits.square().sum()

    got, want = torch.func.grad(loss)(adapter.params), torch.func.grad(dense)(adapter.params)
    for name, t in want["model.embed_tokens"].items():
        assert torch.allclose(got["model.embed_tokens"][name], t, rtol=1e-9)


@differs(
    "LoRA",
    "`ensure_weight_tying` ties modules named `embed_tokens` and `lm_head` alone; of others, as `wte`, one is adapted without "
    "a word, and files of them are read differently than they were written",
    "any tied tensor; such a file is refused, and one that is written names every module, so that peft computes the same",
)
@pytest.mark.parametrize("fields", [{"target_modules": ["wte"]}, {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}])
def test_a_tie_of_modules_with_other_names(fields, tmp_path):
    module = zoo.model("gpt2").double()
    wrapped = theirs(copy.deepcopy(module), ensure_weight_tying=True, **fields)
    wrapped.save_pretrained(tmp_path / "theirs")
    model, params = fp.functionalize(module)
    with pytest.raises(CheckpointError, match=r"a file must hold what acts on every module.*lm_head.*; peft ties embed_tokens"):
        fp.load_peft(model, params, tmp_path / "theirs")
    net = fp.adapt(model, fp.LoRA(r=2, lora_alpha=3, ensure_weight_tying=True, **fields))
    adapter = moved(net.init(params, 0))
    fp.save_peft(net, adapter, tmp_path / "ours")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        read = peft.PeftModel.from_pretrained(copy.deepcopy(module), tmp_path / "ours").eval()(input_ids=IDS).logits
    want = net(params, adapter, input_ids=IDS).logits
    torch.testing.assert_close(read, want)
    back, again = fp.load_peft(model, params, tmp_path / "ours")
    torch.testing.assert_close(back(params, again, input_ids=IDS).logits, want)


class Twice(nn.Module):
    """A model that calls one layer under two names."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.c = self.a

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


@differs(
    "LoRA",
    "a layer that stands under two names is adapted, or trained whole, where it is called by one of them; LoRA merges for both",
    "a layer is one: adapted and merged wherever it is called; files of it are refused",
)
def test_a_layer_under_two_names(tmp_path):
    torch.manual_seed(0)
    module, x = Twice().double(), torch.randn(3, 4, dtype=torch.float64)
    wrapped = theirs(copy.deepcopy(module), target_modules=["a"])
    with torch.no_grad():
        called = wrapped(x)
        merged = wrapped.merge_and_unload()(x)
    assert not torch.allclose(called, merged)
    model, params = fp.functionalize(module)
    net = fp.adapt(model, fp.LoRA(r=2, target_modules=["a"]))
    adapter = moved(net.init(params, 0))
    torch.testing.assert_close(model(net.merge(params, adapter)[0], x), net(params, adapter, x))
    with pytest.raises(CheckpointError, match=r"save_peft: a layer under two names is two to peft.*got 'a', 'c'; leave it out"):
        fp.save_peft(net, adapter, tmp_path / "ours")
    theirs(copy.deepcopy(module), target_modules=["b"], modules_to_save=["a"]).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"safetensors: a layer under two names is two to peft"):
        fp.load_peft(model, params, tmp_path)


def test_both_ends_of_a_tie_may_be_named(tmp_path):
    rows = {"embed_tokens": [3, 4], "lm_head": [3, 4]}
    wrapped = theirs(tied(), target_modules=["q_proj"], trainable_token_indices=rows)
    wrapped.save_pretrained(tmp_path)
    model, params = fp.functionalize(tied())
    net, adapter = fp.load_peft(model, params, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(net(params, adapter, input_ids=IDS).logits, wrapped(input_ids=IDS).logits)
    odd = {"embed_tokens": [3, 4], "lm_head": [3]}
    with pytest.raises(ValueError, match=r"modules that share a tensor must train the same rows of it.*; name one of them"):
        fp.adapt(model, fp.LoRA(target_modules=["q_proj"], trainable_token_indices=odd))


def test_a_file_of_tokens_has_the_keys_of_peft(tmp_path):
    for config in (
        peft.TrainableTokensConfig(token_indices=[3]),
        peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3]),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.get_peft_model(tied(), config).save_pretrained(tmp_path / "theirs")
        model, params = fp.functionalize(tied())
        net, adapter = fp.load_peft(model, params, tmp_path / "theirs")
        fp.save_peft(net, adapter, tmp_path / "ours")
        read, wrote = (load_file(tmp_path / d / "adapter_model.safetensors").keys() for d in ("theirs", "ours"))
        assert {key for key in read if "base_layer" not in key} == set(wrote)


class BiasToo(nn.Module):
    """A head that shares weight and bias with a layer before it, as BERT's shares its bias."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head.weight, self.head.bias = self.first.weight, self.first.bias

    def forward(self, x):
        return self.head(torch.tanh(self.first(x)))


@pytest.mark.parametrize("cls", [fp.LoRA, fp.IA3])
def test_merging_a_tied_head_unties_what_it_changes(cls):
    torch.manual_seed(0)
    model, params = fp.functionalize(BiasToo().double())
    fields = {"r": 2} if cls is fp.LoRA else {"feedforward_modules": []}
    net = fp.adapt(model, cls(target_modules=["head"], **fields))
    adapter, x = moved(net.init(params, 0)), torch.randn(3, 4, dtype=torch.float64)
    merged, _ = net.merge(params, adapter)
    torch.testing.assert_close(model(merged, x), net(params, adapter, x))
    assert merged.keys() - params.keys() == {"head.weight"} | ({"head.bias"} if cls is fp.IA3 else set())
    torch.testing.assert_close(model(net.unmerge(merged, adapter), x), model(params, x))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_tied_bias_is_trained_for_every_module_that_reads_it(bias, tmp_path):
    torch.manual_seed(0)
    module, x = BiasToo().double(), torch.randn(3, 4, dtype=torch.float64)
    wrapped = theirs(copy.deepcopy(module), target_modules=["head"], bias=bias)
    wrapped.save_pretrained(tmp_path / "theirs")
    model, params = fp.functionalize(module)
    net, adapter = fp.load_peft(model, params, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(net(params, adapter, x), wrapped(x))
    fp.save_peft(net, adapter, tmp_path / "ours")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        read = peft.PeftModel.from_pretrained(copy.deepcopy(module), tmp_path / "ours").eval()(x)
    torch.testing.assert_close(read, net(params, adapter, x))


TIED_WHOLE = [
    {"target_modules": ["lin"], "bias": "all"},
    {"target_modules": ["head"], "bias": "lora_only"},
    {"target_modules": ["lin"], "modules_to_save": ["first"], "ensure_weight_tying": True},
]


class Tied(BiasToo):
    """The same, with a layer that shares nothing."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x):
        return super().forward(self.lin(x))


@pytest.mark.parametrize("fields", TIED_WHOLE, ids=str)
def test_members_that_replace_a_tied_tensor_whole(fields):
    torch.manual_seed(0)
    model, params = fp.functionalize(Tied().double())
    net, x = fp.adapt(model, fp.LoRA(r=2, **fields)), torch.randn(2, 4, dtype=torch.float64)
    members = [moved(net.init(params, seed), scale=0.1 * (seed + 1)) for seed in range(3)]
    want = torch.stack([net(params, one, x) for one in members])
    assert float((want[0] - want[1]).abs().max()) > 1e-2
    torch.testing.assert_close(fp.apply_many(net, params, fp.stack(members), x, in_dims=None), want)
    routed = fp.apply_routed(net, params, fp.stack(members), torch.tensor([2, 0]), x)
    torch.testing.assert_close(routed, torch.stack([want[2, 0], want[0, 1]]))
    torch.testing.assert_close(model(net.merge(params, members[0])[0], x), want[0])


def test_copies_that_were_trained_apart_are_refused(tmp_path):
    model, params = fp.functionalize(tied())
    net = fp.adapt(model, fp.LoRA(r=2, ensure_weight_tying=True, target_modules=["embed_tokens"]))
    fp.save_peft(net, net.init(params, 0), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: t + 1 if "lm_head" in k else t for k, t in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head.*same at all its modules, got two that were trained apart; set"):
        fp.load_peft(model, params, tmp_path)


# -- replicated layers -------------------------------------------------------------------------------------------------------

RANGES = [[0, 2], [1, 2], [0, 1]]


def deep(name="llama"):
    return copy.deepcopy(zoo.model(name)).double()


def test_a_replicated_model_is_the_layers_in_order():
    module = deep()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    made = fp.replicate_layers(module, RANGES)
    assert made.config.num_hidden_layers == 4
    assert module.config.num_hidden_layers == 2
    assert [layer.self_attn.layer_idx for layer in made.model.layers] == [0, 1, 2, 3]
    assert [layer.self_attn.layer_idx for layer in module.model.layers] == [0, 1]
    assert made.model.layers[2].mlp.up_proj.weight is module.model.layers[1].mlp.up_proj.weight
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    model, params = fp.functionalize(made)
    assert sum(t.numel() for t in params.values()) == sum(t.numel() for t in module.parameters()) + sum(
        t.numel() for n, t in params.items() if n in model.buffers
    )
    spelled = copy.deepcopy(module)
    spelled.model.layers = nn.ModuleList(copy.deepcopy(module.model.layers[i]) for i in (0, 1, 1, 0))
    for i, layer in enumerate(spelled.model.layers):
        layer.self_attn.layer_idx = i
    spelled.config.num_hidden_layers = 4
    assert torch.equal(model(params, input_ids=IDS).logits, spelled(IDS).logits)
    text = model.call("generate", params, input_ids=IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(text, spelled.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_file_of_peft_for_replicated_layers(name, tmp_path):
    targets = ["q_proj"] if name == "llama" else ["query"]
    wrapped = theirs(deep(name), target_modules=targets, layer_replication=RANGES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(tmp_path / "theirs")
    model, params = fp.functionalize(fp.replicate_layers(deep(name), RANGES))
    net, adapter = fp.load_peft(model, params, tmp_path / "theirs")
    got, want = (zoo.leading(f) for f in (net(params, adapter, input_ids=IDS), wrapped(IDS)))
    assert torch.allclose(got, want, atol=1e-12)
    fp.save_peft(net, adapter, tmp_path / "ours")
    wrote, read = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "theirs"))
    assert wrote.keys() == read.keys()
    assert all(torch.equal(wrote[k], read[k]) for k in wrote)


@differs(
    "LoRA",
    "`layer_replication`: merging adds the updates of all copies of a layer to the one weight that they share",
    "merging gives every copy a weight of its own",
)
def test_merging_replicated_layers_unties_them():
    model, params = fp.functionalize(fp.replicate_layers(deep(), RANGES))
    net = fp.adapt(model, fp.LoRA(r=2, lora_alpha=3, target_modules=["q_proj"], layer_replication=RANGES))
    adapter = moved(net.init(params, 0))
    merged, report = net.merge(params, adapter)
    got = net(params, adapter, input_ids=IDS).logits
    assert torch.allclose(model(merged, input_ids=IDS).logits, got, atol=1e-10)
    assert any("tied" in note for note in report.notes)
    wrapped = theirs(deep(), target_modules=["q_proj"], layer_replication=RANGES)
    want = wrapped(IDS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not torch.allclose(wrapped.merge_and_unload()(IDS).logits, want, atol=1e-3)


def test_a_net_needs_the_layers_that_its_method_names():
    model, _ = fp.functionalize(deep())
    with pytest.raises(ValueError, match=r"layer_replication=\[\[0, 2\], \[1, 2\], \[0, 1\]\] needs a model with these layers"):
        fp.adapt(model, fp.LoRA(target_modules=["q_proj"], layer_replication=RANGES))


@pytest.mark.parametrize("ranges", [[[0, 3]], [[1, 1]], [[-1, 1]], [[0]], [0, 2], [[False, True]]])
def test_a_range_beyond_the_layers_is_refused(ranges):
    with pytest.raises(ValueError, match=r"a range must be \[start, end\) in 0 to 2"):
        fp.replicate_layers(deep(), ranges)


@pytest.mark.parametrize("ranges", [[], None, 3])
def test_there_must_be_a_range(ranges):
    with pytest.raises(ValueError, match=r"ranges must be \[start, end\) pairs, at least one"):
        fp.replicate_layers(deep(), ranges)


def test_a_list_of_layers_must_be_found():
    with pytest.raises(ValueError, match="one list of the config's None layers must be found, got none; name it"):
        fp.replicate_layers(nn.Linear(2, 2), [[0, 1]])
    with pytest.raises(ValueError, match="layers must be the path of a ModuleList, got 'model'"):
        fp.replicate_layers(deep(), [[0, 1]], layers="model")
