"""No parity rows of QA-LoRA: peft applies it to the layers of GPTQ models alone."""

#: Methods whose parity with peft is tested on models that rows do not have, and where.
ELSEWHERE = {"QALoRA": "test_methods_lora_variants.py"}
