r"""LNTuning: the norms of a model trained in full.

.. math:: W' = V

V: the trained copy of a parameter of a targeted module, its scale or its shift. Any module may be a target; by default
those are the architecture's norms.

References:
    Zhao et al., Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning, 2023, arXiv 2312.11420.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from funcpeft.methods.full import Full


@dataclass(frozen=True, kw_only=True)
class LNTuning(Full):
    """Trains every parameter of the targeted modules, by default the norms."""

    peft_type: ClassVar[str] = "LN_TUNING"
    file_infix: ClassVar[str] = "ln_tuning_layers"
    peft_lacks: ClassVar[tuple[str, ...]] = (
        "target_parameters",
        "layers_to_transform",
        "layers_pattern",
        "ensure_weight_tying",
    )
