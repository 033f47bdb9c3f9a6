"""Parity rows of poly; peft takes three-dimensional inputs only."""

import torch

from rows.row import LINEARS, Row


def poly(targets=LINEARS, tasks=(2, 0), **kwargs):
    values = {"task_ids": torch.tensor(tasks)}
    return Row("PolyConfig", "mlp3d", {"target_modules": targets, "r": 3, "n_tasks": 3, **kwargs}, merges=False, values=values)


ROWS = [
    poly(),
    poly(n_splits=2, n_skills=3),
    poly(n_splits=4, n_skills=1, init_weights=False),
    poly("lin[02]", tasks=(1, 1)),
    poly(["lin0"], modules_to_save=["head"]),
    poly(exclude_modules=["lin1"]),
]  # fmt: skip
