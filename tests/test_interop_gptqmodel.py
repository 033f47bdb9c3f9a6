"""GPTQ and AWQ against gptqmodel: folders written here load there, its layers are taken as leaves, bit for bit."""

import json
import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("gptqmodel")

import funcpeft as fp
from funcpeft.errors import CheckpointError
from funcpeft.interop.libraries import AWQ, GPTQ
from funcpeft.quant.affineint import AffineInt

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::SyntaxWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

IDS = torch.tensor([[1, 5, 9, 2], [7, 7, 3, 1]])
V1, V2 = GPTQ(checkpoint_format="gptq"), GPTQ()


def llama(dtype=torch.float16):
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, attn_implementation="eager",
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def stored(fmt, ordered=True, keep=lambda key: False, dtype=torch.float16):
    """Returns a model and its leaves, with scales in half precision and no zero of 0."""
    model, params = fp.functionalize(llama(dtype))
    order = torch.arange(128).flip(0).to(torch.int32)
    for key, weight in params.items():
        if not key.endswith("proj.weight") or keep(key):
            continue
        leaf = fmt.requant(weight)
        data = {**leaf.data, "scale": leaf.data["scale"].half()}
        if "zero_point" in data:
            data["zero_point"] = data["zero_point"].clamp(min=1)
        if not ordered:
            data["g_idx"] = (order[-weight.shape[1] :] // fmt.block_size).contiguous()
        params[key] = replace(leaf, data=data)
    return model, params


def written(model, params, library, folder):
    """Writes a folder by hand."""
    from safetensors.torch import save_file

    leaves = {k.removesuffix(".weight"): v for k, v in params.items() if isinstance(v, fp.Quantized)}
    tensors = {k: v.clone() for k, v in params.items() if isinstance(v, torch.Tensor) and k not in model.buffers}
    for path, leaf in leaves.items():
        assert library.refuses(leaf) is None
        tensors |= {f"{path}.{n}": t for n, t in library.write(leaf, path)[0].items()}
    linear = [n for n, m in model.modules() if isinstance(m, torch.nn.Linear)]
    folder.mkdir()
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {
        "quantization_config": library.config(leaves, tuple(n for n in linear if n not in leaves)),
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def from_pretrained(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, attn_implementation="eager").eval()


def assert_same(a, b):
    assert (a.format, a.shape, a.dtype, list(a.data)) == (b.format, b.shape, b.dtype, list(b.data))
    for name in a.data:
        assert a.data[name].dtype == b.data[name].dtype, name
        assert torch.equal(a.data[name], b.data[name]), name


def decoded_by(layer):
    """Returns the weight as a layer of the library decodes it, without the compiler that it asks for."""
    if hasattr(layer, "dequantize_weight"):
        return layer.dequantize_weight().T
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    return dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, layer.bits, layer.group_size).T


def gptq(bits, size, symmetric=False):
    return AffineInt(bits=bits, block_size=size, symmetric=symmetric, packing="gptq")


def awq(size, symmetric=False):
    return AffineInt(block_size=size, symmetric=symmetric, packing="awq")


CASES = [
    (gptq(4, 16), V2, True), (gptq(4, 32, True), V1, True), (gptq(4, 16), V1, True), (gptq(4, 16), V2, False),
    (gptq(2, 16), V1, True),
    (gptq(3, 32), V1, True), (gptq(3, 32), V2, True), (gptq(8, 32), V1, False), (gptq(8, 16, True), V2, True),
    (gptq(4, "row"), V2, True), (awq(16), AWQ(), True), (awq(32, True), AWQ(), True), (awq("row"), AWQ(), True),
]  # fmt: skip


@pytest.mark.parametrize(("fmt", "library", "ordered"), CASES, ids=str)
def test_a_written_folder_is_taken_bit_for_bit(fmt, library, ordered, tmp_path):
    model, params = stored(fmt, ordered)
    folder = written(model, params, library, tmp_path / "m")
    ours, read_again = fp.load_pretrained(folder, attn_implementation="eager")
    with torch.compiler.set_stance("force_eager"):
        loaded = from_pretrained(folder)
        taken_model, taken = fp.functionalize(loaded)
        for key, leaf in params.items():
            if isinstance(leaf, fp.Quantized):
                layer = loaded.get_submodule(key.removesuffix(".weight"))
                assert_same(read_again[key], leaf)
                assert_same(taken[key], leaf)
                assert torch.equal(decoded_by(layer), fmt.dequant(leaf))
        logits = ours(read_again, IDS).logits
        assert torch.equal(taken_model(taken, IDS).logits, logits)
        loaded.train()  # a product with the decoded weight; in eval mode most of its layers compute in bfloat16
        assert (loaded(IDS).logits - logits).abs().max() < 2**-8 * logits.abs().max()


@pytest.mark.parametrize(("fmt", "library"), [(gptq(4, 32), V2), (awq(32), AWQ())], ids=str)
def test_a_layer_that_an_eval_forward_has_repacked_is_refused(fmt, library, tmp_path):
    loaded = from_pretrained(written(*stored(fmt), library, tmp_path / "m"))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        loaded(IDS)
    with pytest.raises(ValueError, match="got a forward has repacked its weight; take it before the first forward"):
        fp.functionalize(loaded)


def test_layers_of_a_block_may_stay_dense(tmp_path):
    model, params = stored(gptq(4, 16), keep=lambda key: "mlp" in key)
    folder = written(model, params, V2, tmp_path / "m")
    loaded = from_pretrained(folder)
    assert type(loaded.model.layers[1].mlp.up_proj) is torch.nn.Linear
    _, taken = fp.functionalize(loaded)
    for key, leaf in params.items():
        if isinstance(leaf, fp.Quantized):
            assert_same(taken[key], leaf)
        elif key not in model.buffers:
            assert torch.equal(taken[key], leaf)


def test_a_checkpoint_that_transformers_saved_again_is_recognised(tmp_path):
    loaded = from_pretrained(written(*stored(gptq(4, 16, True)), V1, tmp_path / "m"))
    loaded.save_pretrained(tmp_path / "again")
    with pytest.raises(CheckpointError, match=re.escape("change its checkpoint_format to 'gptq_v2'.")):
        fp.load_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again/config.json").read_text())
    config["quantization_config"] |= {"checkpoint_format": "gptq_v2", "format": "gptq_v2"}
    (tmp_path / "again/config.json").write_text(json.dumps(config))
    _, params = fp.load_pretrained(tmp_path / "again")
    for key, leaf in fp.load_pretrained(tmp_path / "m")[1].items():
        if isinstance(leaf, fp.Quantized):
            assert_same(params[key], leaf)
