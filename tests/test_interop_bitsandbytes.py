"""bitsandbytes: checkpoints both ways and layers in memory, leaf for leaf, with the library as the oracle."""

import json

import bitsandbytes as bnb
import bitsandbytes.functional as kernels
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from funcpeft.errors import CheckpointError
from funcpeft.functional import Model
from funcpeft.interop.libraries.bitsandbytes import BitsAndBytes
from funcpeft.interop.modules import functionalize
from funcpeft.interop.transformers import load_pretrained
from funcpeft.interop.writing import write_quantized
from funcpeft.quant import NF4, AffineInt, Int8
from funcpeft.quant.fp4 import FP4
from funcpeft.quantization import dequantize, quantize
from funcpeft.weights import Quantized

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore:_check_is_size"),
]

FORMATS = [NF4(), NF4(double_quant=True), NF4(block_size=32), FP4(), FP4(double_quant=True), Int8()]
LAYER = "model.layers.0.self_attn.q_proj"
KEY = f"{LAYER}.weight"


def llama(folder, hidden=64, wide=128):
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": wide, "num_attention_heads": 4, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=zoo.VOCAB, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("dense"))


def loaded(folder, *, four=True, **options):
    """Returns a model that transformers quantizes with bitsandbytes as it loads it."""
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **options} if four else {"load_in_8bit": True, **options}
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**options))


def decoded(module):
    """Returns the weights that the library's own kernels decode, by the path of their layer."""
    found = {}
    for path, layer in module.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            found[path] = kernels.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        elif isinstance(layer, bnb.nn.Linear8bitLt):
            scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
            found[path] = kernels.int8_vectorwise_dequant(layer.weight.data, scale)
    return found


def assert_leaves(one, other):
    assert list(one) == list(other)
    for key, leaf in one.items():
        if isinstance(leaf, Tensor):
            assert torch.equal(leaf, other[key]), key
            assert leaf.dtype == other[key].dtype
        else:
            found = other[key]
            assert (leaf.format, leaf.shape, leaf.dtype) == (found.format, found.shape, found.dtype)
            assert leaf.data.keys() == found.data.keys()
            assert all(torch.equal(t, found.data[n]) and t.dtype == found.data[n].dtype for n, t in leaf.data.items()), key


# -- written, then read --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_what_is_written_decodes_the_same_in_the_library_and_reads_back(dense, tmp_path, fmt, dtype):
    model, params = load_pretrained(dense, dtype=dtype)
    stored = quantize(model, params, fmt, exclude_modules=["o_proj", "lm_head"])
    write_quantized(model, stored, tmp_path)
    module = AutoModelForCausalLM.from_pretrained(tmp_path)
    weights = decoded(module)
    assert len(weights) == 6
    for path, weight in weights.items():
        assert torch.equal(weight.to(dtype), fmt.dequant(stored[f"{path}.weight"]))
    assert type(module.model.layers[0].self_attn.o_proj) is torch.nn.Linear
    assert_leaves(functionalize(module)[1], stored)
    assert_leaves(load_pretrained(tmp_path)[1], stored)
    ids = zoo.ids(2, 7)
    with torch.no_grad():  # in training mode the library's layers decode; in eval mode they repack, or round activations
        error = (module.train()(input_ids=ids).logits - model(stored, input_ids=ids).logits).abs().max()
    assert error <= 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("fmt", [NF4(), Int8()], ids=repr)
def test_every_linear_layer_may_be_stored(dense, tmp_path, fmt):
    model, params = load_pretrained(dense)
    stored = quantize(
        model,
        params,
        fmt,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"],
    )
    write_quantized(model, stored, tmp_path)
    module = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "lm_head" in decoded(module)
    assert_leaves(functionalize(module)[1], stored)
    assert_leaves(load_pretrained(tmp_path)[1], stored)


def test_shapes_that_the_library_decodes_wrongly_keep_their_codes(tmp_path):
    dense, out = llama(tmp_path / "dense", 96, 80), tmp_path / "out"
    model, params = load_pretrained(dense)
    stored = quantize(model, params, NF4())
    write_quantized(model, stored, out)
    module = AutoModelForCausalLM.from_pretrained(out)
    assert_leaves(functionalize(module)[1], stored)
    assert_leaves(load_pretrained(out)[1], stored)
    down = "model.layers.0.mlp.down_proj.weight"  # rows of 80 are no multiple of 64, which AVX512 kernels take them to be
    assert (params[down] - stored[down].format.dequant(stored[down])).abs().max() < 0.02


def test_a_transposed_layer_is_read_as_a_linear_one_and_written_back(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": zoo.VOCAB, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 16}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "dense")
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    module = GPT2LMHeadModel.from_pretrained(tmp_path / "dense", quantization_config=BitsAndBytesConfig(**options))
    module.save_pretrained(tmp_path / "one")
    model, params = load_pretrained(tmp_path / "one")
    assert params["transformer.h.0.attn.c_attn.weight"].shape == (192, 64)
    assert_leaves(functionalize(module)[1], params)
    write_quantized(model, params, tmp_path / "two")
    again, leaves = load_pretrained(tmp_path / "two")
    assert_leaves(leaves, params)
    ids = zoo.ids(2, 5)
    with torch.no_grad():
        expected = model(params, input_ids=ids).logits
        assert torch.equal(again(leaves, input_ids=ids).logits, expected)
        train = GPT2LMHeadModel.from_pretrained(tmp_path / "two", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
        torch.testing.assert_close(train(input_ids=ids).logits, expected)
        # made dense, they are transformers' transposed layers again
        write_quantized(model, dequantize(params), tmp_path / "three")
        plain = GPT2LMHeadModel.from_pretrained(tmp_path / "three").eval()
        torch.testing.assert_close(plain(input_ids=ids).logits, expected)
    assert type(plain.transformer.h[0].attn.c_attn).__name__ == "Conv1D"


def test_shards_and_the_config(dense, tmp_path):
    model, params = load_pretrained(dense)
    stored = quantize(model, params, NF4(double_quant=True), target_modules=["q_proj"])
    write_quantized(model, stored, tmp_path, max_shard_size=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_leaves(load_pretrained(tmp_path)[1], stored)
    assert_leaves(functionalize(AutoModelForCausalLM.from_pretrained(tmp_path))[1], stored)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bnb_4bit_quant_type"], config["bnb_4bit_use_double_quant"]) == (
        "bitsandbytes",
        "nf4",
        True,
    )
    assert "lm_head" in config["llm_int8_skip_modules"]


def test_formats_that_the_library_does_not_store_are_refused(dense, tmp_path):
    model, params = load_pretrained(dense)
    stored = quantize(model, params, AffineInt(bits=4), target_modules=["q_proj"])
    with pytest.raises(
        ValueError, match=rf"'{LAYER}': bitsandbytes stores nf4, fp4 and int8, not AffineInt\(.*; call dequantize"
    ):
        write_quantized(model, stored, tmp_path, library="bitsandbytes")
    reason = BitsAndBytes().refuses(NF4().requant(torch.ones(2, 3, 4)))
    assert reason == "bitsandbytes stores matrices, not shape (2, 3, 4)"


# -- made by the library -------------------------------------------------------------------------------------------------------


OPTIONS = [
    {},
    {"bnb_4bit_use_double_quant": True},
    {"bnb_4bit_quant_type": "fp4"},
    {"bnb_4bit_quant_storage": torch.bfloat16},
    {"four": False},
    {"four": False, "llm_int8_skip_modules": ["lm_head", "o_proj"]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_model_that_transformers_quantized_is_taken_and_its_checkpoint_read(dense, tmp_path, options):
    module = loaded(dense, **options)
    model, params = functionalize(module)
    weights = decoded(module)
    assert {key.removesuffix(".weight") for key, leaf in params.items() if isinstance(leaf, Quantized)} == weights.keys()
    for path, weight in weights.items():
        leaf = params[f"{path}.weight"]
        assert torch.equal(leaf.format.dequant(leaf), weight.to(leaf.dtype))
    module.save_pretrained(tmp_path)
    again, leaves = load_pretrained(tmp_path)
    assert_leaves(leaves, params)
    assert isinstance(again, Model)
    assert again.ties == model.ties


@pytest.mark.parametrize("options", [{"bnb_4bit_use_double_quant": True}, {"four": False}], ids=str)
def test_a_forward_in_training_mode_changes_nothing(dense, tmp_path, options):
    module = loaded(dense, **options)
    before = functionalize(module)[1]
    with torch.no_grad():
        module.train()(input_ids=zoo.ids(2, 5))
    assert_leaves(functionalize(module)[1], before)
    module.save_pretrained(tmp_path)
    assert_leaves(load_pretrained(tmp_path)[1], before)


def test_a_forward_in_eval_mode_leaves_eight_bits_as_they_are(dense):
    module = loaded(dense, four=False).eval()
    layer = module.get_submodule(LAYER)
    before = functionalize(module)[1]
    assert layer.weight.SCB is not None
    with torch.no_grad():
        module(input_ids=zoo.ids(2, 5))
    assert layer.weight.SCB is None  # it is in the layer's state now
    assert_leaves(functionalize(module)[1], before)


def test_a_repacked_weight_is_refused(dense):
    module = loaded(dense)
    module.get_submodule(LAYER).weight.quant_state.packing_format_for_cpu = True
    text = rf"bitsandbytes at '{LAYER}': a layer with its weight as quantized is required, got an eval forward has repacked its"
    with pytest.raises(ValueError, match=text + r" weight; take it before the first forward, or from the file"):
        functionalize(module)


def test_weights_that_are_not_quantized_yet_are_refused():
    for layer in (bnb.nn.Linear4bit(64, 64), bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)):
        module = torch.nn.Sequential(layer)
        with pytest.raises(ValueError, match=r"bitsandbytes at '0': .* got its weight is not quantized yet; move the layer to"):
            functionalize(module)


# -- broken checkpoints --------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(dense, tmp_path):
    """Returns a function that changes the tensors of a written checkpoint and says how reading refuses them."""

    def refusal(fmt, change):
        model, params = load_pretrained(dense)
        write_quantized(model, quantize(model, params, fmt, target_modules=["q_proj"]), tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError) as e:
            load_pretrained(tmp_path)
        return str(e.value)

    return refusal


def described(tensors, **changes):
    """Changes the description of a four-bit weight; ``None`` removes a field."""
    key = next(k for k in tensors if "quant_state" in k)
    state = {**json.loads(bytes(tensors[key].tolist())), **changes}
    tensors[key] = torch.tensor(list(json.dumps({k: v for k, v in state.items() if v is not None}).encode()), dtype=torch.uint8)


def test_broken_four_bit_weights_are_refused(broken):
    four, where = NF4(double_quant=True), f"bitsandbytes at {LAYER!r}: "
    state = f"{KEY}.quant_state.bitsandbytes__nf4"
    rows = [
        (lambda ts: ts.pop(f"{KEY}.absmax"), "tensor 'weight.absmax' is required, got ["),
        (lambda ts: ts.pop(KEY), "tensor 'weight' is required, got ["),
        (lambda ts: ts.update({f"{KEY}.absmax": torch.ones(3)}), "'weight.absmax' must have shape (64,), got (3,)"),
        (
            lambda ts: ts.update({f"{KEY}.nested_absmax": torch.ones(3)}),
            "'weight.nested_absmax' must have shape (1,), got (3,)",
        ),
        (lambda ts: ts.update({KEY: ts[KEY][:-1].clone()}), "4096 codes are required, got 4094"),
        (
            lambda ts: ts.update({state: torch.tensor([123, 9], dtype=torch.uint8)}),
            "the quant_state must be JSON, got JSONDecode",
        ),
        (lambda ts: described(ts, shape=[64, 32]), "the shape must be (64, 64), got (64, 32)"),
        (
            lambda ts: ts.update({state: torch.tensor(list(b"[]"), dtype=torch.uint8)}),
            "the quant_state must be an object, got list",
        ),
        (lambda ts: described(ts, blocksize=None), "'blocksize' in the quant_state must be even and positive, got None"),
        (lambda ts: described(ts, blocksize=0), "'blocksize' in the quant_state must be even and positive, got 0"),
        (lambda ts: described(ts, quant_type="nf5"), "'quant_type' in the quant_state must be one of 'nf4', 'fp4', got 'nf5'"),
        (lambda ts: described(ts, quant_type=[]), "'quant_type' in the quant_state must be one of 'nf4', 'fp4', got []"),
        (lambda ts: described(ts, dtype="float33"), "'dtype' in the quant_state must be a floating dtype, got 'float33'"),
        (lambda ts: described(ts, shape=64), "'shape' in the quant_state must be a list of positive ints, got 64"),
        (lambda ts: described(ts, nested_blocksize=128), "'nested_blocksize' in the quant_state must be 256, got 128"),
        (lambda ts: described(ts, nested_offset=None), "'nested_offset' in the quant_state must be a finite number, got None"),
        (lambda ts: described(ts, nested_offset=float("nan")), "'nested_offset' in the quant_state must be a finite number"),
        (lambda ts: ts.update({f"{KEY}.absmax": torch.ones(64)}), "'weight.absmax' must be uint8, got float32"),
        (
            lambda ts: ts.update({f"{KEY}.nested_absmax": torch.ones(1, dtype=torch.int8)}),
            "'weight.nested_absmax' must be float32, got int8",
        ),
        (
            lambda ts: ts.update({f"{KEY}.nested_absmax": torch.ones(1) / 0}),
            "'weight.nested_absmax' must be finite, got NaN or infinity",
        ),
        (
            lambda ts: ts.update({f"{KEY}.quant_map": -ts[f"{KEY}.quant_map"]}),
            "'weight.quant_map' must hold the format's levels",
        ),
        (
            lambda ts: ts.update({f"{KEY}.nested_quant_map": ts[f"{KEY}.nested_quant_map"].flip(0)}),
            "'weight.nested_quant_map' must hold the format's levels",
        ),
    ]
    for change, text in rows:
        assert where + text in broken(four, change)


def test_broken_eight_bit_weights_are_refused(broken):
    where = f"bitsandbytes at {LAYER!r}: "
    rows = [
        (lambda ts: ts.update({f"{LAYER}.SCB": torch.ones(3)}), "'SCB' must have shape (64,), got (3,)"),
        (lambda ts: ts.update({KEY: ts[KEY][:3].clone()}), "'weight' must have shape (64, 64), got (3, 64)"),
        (lambda ts: ts.update({KEY: ts[KEY].float()}), "'weight' must be int8, got float32"),
        (
            lambda ts: ts.update({f"{LAYER}.SCB": torch.ones(64).long()}),
            "'SCB' must be float32 or bfloat16 or float16",
        ),
        (lambda ts: ts.update({f"{LAYER}.SCB": torch.ones(64) / 0}), "'SCB' must be finite, got NaN or infinity"),
    ]
    for change, text in rows:
        assert where + text in broken(Int8(), change)
    # without its scales a weight is dense, and int8 is no floating dtype
    lost = broken(Int8(), lambda ts: ts.pop(f"{LAYER}.SCB"))
    assert f"misshapen '{KEY} (64, 64) torch.int8" in lost
    assert f"unexpected '{LAYER}.weight_format'" in lost
