"""Parity rows of VB-LoRA; files of the top vectors alone are in test_methods_vblora.py, since they hold rounded weights."""

from rows.row import GPT, LINEARS, Row


def vblora(model, targets=LINEARS, **kwargs):
    return Row("VBLoRAConfig", model, {"target_modules": targets, "r": 2, "num_vectors": 9, "vector_length": 4, **kwargs})


ROWS = [
    vblora("mlp"),
    vblora("mlp3d", topk=3, bias="vblora_only"),
    vblora("mlp", topk=1),
    vblora("gpt", GPT),
]
