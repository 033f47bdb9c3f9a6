"""Parity rows of WaveFT. peft's filters of "coif4" and "coif5" are wrong: see test_differences_c3a_to_waveft.py."""

from rows.row import GPT, LINEARS, Row


def waveft(model, targets=LINEARS, **kwargs):
    # the digits of peft's tables of filters
    return Row("WaveFTConfig", model, {"target_modules": targets, "n_frequency": 9, **kwargs}, single=True)


ROWS = [
    waveft("mlp"),
    waveft("mlp3d", wavelet_family="db4", bias="waveft_only"),
    waveft("mlp", wavelet_family="sym3", n_frequency_pattern={"lin1": 4}, init_weights=False, random_loc_seed=3),
    waveft("mlp", wavelet_family="coif2", proportional_parameters=True),
    waveft("mlp", use_idwt=False, scaling=2.0),
    waveft("gpt", GPT),
]
