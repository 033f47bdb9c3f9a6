"""Parity rows of AdaLoRA."""

from rows.row import GPT, LINEARS, Row


def adalora(model, targets=LINEARS, **kwargs):
    # peft has the number of ranks in float32
    given = {"target_modules": targets, "init_r": 4, "target_r": 2, "total_step": 10, "lora_alpha": 6, **kwargs}
    return Row("AdaLoraConfig", model, given)


ROWS = [
    adalora("mlp"),
    adalora("mlp3d", lora_alpha=0, bias="lora_only"),
    adalora("mlp", init_lora_weights=False),
    adalora("gpt", GPT),
    adalora("conv2d", ["conv0", "conv1"]),
]
