"""Parity rows of LoKr; models of other geometries are those of LoHa's rows."""

from rows.row import CONVS, LINEARS, Row


def lokr(model, targets=CONVS, **kwargs):
    return Row("LoKrConfig", model, {"target_modules": targets, "r": 2, "alpha": 5, **kwargs}, single=True)


ROWS = [
    lokr("mlp", LINEARS),
    lokr("mlp", LINEARS, r=1, decompose_both=True, decompose_factor=4),
    lokr("mlp3d", LINEARS, r=1, decompose_both=True, decompose_factor=3, init_weights=False),
    lokr("mlp", LINEARS, init_weights="lycoris"),
    lokr("mlp3d", LINEARS, r=1, rank_pattern={"lin1": 2}, alpha_pattern={"lin0": 2}, rank_dropout=0.2, rank_dropout_scale=True),
    lokr("conv1d", r=8),
    lokr("conv1d", r=1),
    lokr("conv1d", r=1, decompose_factor=2, decompose_both=True, init_weights="lycoris"),
    lokr("conv2d", use_effective_conv2d=True),
    lokr("conv2d", r=8),
    lokr("conv2d", r=1, decompose_both=True, init_weights=False),
    lokr("conv2d", r=1, use_effective_conv2d=True, decompose_both=True, decompose_factor=1, init_weights="lycoris"),
    lokr("conv1x1", r=1, use_effective_conv2d=True),
    lokr("grouped2d", r=1, decompose_factor=2),
    lokr("grouped2d", r=1, use_effective_conv2d=True, decompose_factor=1),
    lokr("grouped1d", r=2, use_effective_conv2d=True, decompose_factor=1),
    lokr("grouped1d", r=8),
    lokr("oblong2d", r=8),
    lokr("oblong2d", r=1, decompose_both=True),
    lokr("oblong2d", r=1, use_effective_conv2d=True, decompose_factor=1),
]
