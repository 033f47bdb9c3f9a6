"""The registry of quantization libraries: one import per line, sorted, no logic."""

from funcpeft.interop.libraries.bitsandbytes import BitsAndBytes

__all__ = ["BitsAndBytes"]
