"""Parity rows of Super-Tuning, which peft computes in float32."""

from rows.row import LINEARS, Row


def supertuning(model, **kwargs):
    return Row("SupertuningConfig", model, {"target_modules": LINEARS, "sparsity": 0.8, **kwargs}, single=True)


ROWS = [
    supertuning("mlp"),
    supertuning("mlp3d", select_top=False, init_weights=False),
    supertuning("mlp", r=3, lora_alpha=5),
    supertuning("mlp", r=2, init_weights=False, save_precomputed_indices=False),
]
