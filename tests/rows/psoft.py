"""Parity rows of PSOFT, which peft makes of float32 bases only; see test_differences_rotations.py for those of float64."""

from rows.row import LINEARS, Row


def psoft(model, **kwargs):
    return Row("PsoftConfig", model, {"target_modules": LINEARS, "r": 4, "psoft_alpha": 6, **kwargs}, dtype="float32")


ROWS = [
    psoft("mlp"),
    psoft("mlp3d", ab_svd_init="pissa_init", use_cayley_neumann=True),
    psoft("mlp", psoft_orth=False, psoft_mag_b=False, init_weights=False),
    psoft("mlp", use_cayley_neumann=True, num_cayley_neumann_terms=3, cayley_neumann_eps=0.3),
    psoft("mlp", psoft_orth=False, ab_svd_init="pissa_init"),
    psoft("mlp", use_cayley_neumann=True, num_cayley_neumann_terms=2, init_weights=False),
    psoft("mlp", psoft_svd="lowrank", psoft_mag_a=False, init_weights=False, random_seed=3),
]
