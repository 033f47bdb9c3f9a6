"""Parity rows of dora."""

from rows.row import CONVS, GPT, LINEARS, Row


def lora(model, targets, **kwargs):
    return Row("LoraConfig", model, {"target_modules": targets, "r": 4, "lora_alpha": 6, **kwargs})


ROWS = [
    lora("mlp", LINEARS, use_dora=True),
    lora("gpt", GPT, use_dora=True),
    lora("conv2d", CONVS, use_dora=True),
    lora("conv1d", CONVS, use_dora=True),
    lora("embedding", ["emb", "lin0"], use_dora=True),
]  # fmt: skip
