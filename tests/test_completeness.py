"""The catalogue is whole: every method, every field and every initialisation of the installed peft is here, or has a reason."""

from __future__ import annotations

import dataclasses

import peft
import pytest

from funcpeft import methods
from funcpeft.interop.peftconfig import registered

#: Methods of peft that are not here yet: of the prompt-learning family alone.
TO_COME = {
    "MULTITASK_PROMPT_TUNING": "prompt learning: a shared prompt and low-rank ones per task",
    "P_TUNING": "prompt learning: prompts from a network",
    "CPT": "prompt learning: tuned context examples",
    "ADAPTION_PROMPT": "prompt learning: gated prompts in the upper layers",
    "CARTRIDGE": "prompt learning: a trained key-value cache",
}

#: Fields of peft's LoraConfig that no class has.
NOT_FIELDS = {
    "megatron_config": "Megatron's parallel layers are modules with communication inside, not linear maps of a weight",
    "runtime_config": "says how peft computes, and is never saved",
}


def test_every_method_of_peft_is_here_or_to_come():
    missing = {t.value for t in peft.PeftType} - registered().keys()
    assert missing == TO_COME.keys()


def test_what_is_to_come_are_prompts():
    from peft.utils import PeftType

    prompts = {t.value for t in PeftType if "PROMPT" in t.value} | {"P_TUNING", "CPT", "CARTRIDGE"}
    assert TO_COME.keys() <= prompts


def test_every_field_of_loras_config_is_known():
    known = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
    for cls in registered()["LORA"]:
        known |= {f.name for f in dataclasses.fields(cls)} | cls.peft_fixed.keys()
    fields = {f.name for f in dataclasses.fields(peft.LoraConfig)}
    assert fields - known == NOT_FIELDS.keys() - known


@pytest.mark.parametrize(
    "init",
    [True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "mica", "eva", "corda", "loftq", "lora_ga"],
)
def test_every_initialisation_of_lora_is_known(init):
    assert methods.LoRA(init_lora_weights=init).init_lora_weights == init
