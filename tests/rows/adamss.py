"""Parity rows of AdaMSS, whose decomposition peft takes in float32."""

from rows.row import LINEARS, Row


def adamss(model, **kwargs):
    return Row("AdamssConfig", model, {"target_modules": LINEARS, "r": 6, "num_subspaces": 3, **kwargs}, single=True)


ROWS = [
    adamss("mlp"),
    adamss("mlp3d", subspace_rank=2),
    adamss("mlp", init_weights=None, subspace_rank=3, use_dynamic_rank=True),
    adamss("mlp", r=100, num_subspaces=20, random_seed=3),
]
