"""Parity rows of lora."""

from rows.row import CONVS, GPT, LINEARS, Row


def lora(model, targets, dtype="float64", init=True, **kwargs):
    return Row("LoraConfig", model, {"target_modules": targets, "r": 4, "lora_alpha": 6, **kwargs}, dtype=dtype, init=init)


ROWS = [
    lora("mlp", LINEARS),
    lora("mlp3d", LINEARS, use_rslora=True),
    lora("mlp", LINEARS, init_lora_weights=False),
    lora("mlp", LINEARS, init_lora_weights="gaussian"),
    lora("mlp", LINEARS, init_lora_weights="orthogonal"),
    lora("mlp", LINEARS, init_lora_weights="pissa", dtype="float32"),  # peft takes no float64 here
    lora("gpt", GPT, init_lora_weights="pissa", dtype="float32"),
    lora("mlp", LINEARS, init_lora_weights="olora", dtype="float32"),
    lora("mlp", LINEARS, init_lora_weights="mica", dtype="float32"),
    lora("gpt", GPT, init_lora_weights="mica", dtype="float32"),
    lora("embedding", ["emb", "lin0"], init_lora_weights="mica", dtype="float32"),
    lora("mlp", LINEARS, init_lora_weights="eva", eva_config={"rho": 1.5}, init=False),  # from data
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
]  # fmt: skip
