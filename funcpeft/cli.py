"""The command line: ``funcpeft demo``, ``funcpeft methods``, ``funcpeft --version``.

A mistake of the user is one line on stderr and exit status 2; a failed check of the demo is exit status 1.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def version() -> str:
    """Returns the installed version, ``"unknown"`` where the package runs from a folder without being installed."""
    try:
        return importlib.metadata.version("funcpeft")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def positive(text: str) -> int:
    """Parses an integer above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number above 0 is required, got {text!r}")
    return int(text)


def rate(text: str) -> float:
    """Parses a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"a number above 0 is required, got {text!r}")
    return value


def assignment(text: str) -> tuple[str, Any]:
    """Parses ``FIELD=VALUE``; the value is JSON, or else the text itself."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"FIELD=VALUE is required, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def parser() -> Parser:
    """Makes the parser of the command line."""
    p = Parser(prog="funcpeft", description="Parameter-efficient fine-tuning as pure functions of trees.")
    p.add_argument("--version", action="version", version=f"funcpeft {version()}")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    commands.add_parser("methods", help="list the methods", description="Lists the methods of the registry.")
    _demo_parser(commands.add_parser("demo", help="train many adapters at once on real text", description=_DEMO))
    return p


_DEMO = (
    "Trains a population of adapters on a small byte-level Llama in one vmapped loop, on text of the Python standard library "
    "of this machine or on a directory of your own; merges the best, saves it as a peft checkpoint and reads it back. Offline."
)


def _demo_parser(p: argparse.ArgumentParser) -> None:
    defaults: dict[str, Any] = {"default": argparse.SUPPRESS}  # Settings holds them
    p.add_argument("--members", type=positive, metavar="N", help="adapters trained at once (8)", **defaults)
    p.add_argument("--steps", type=positive, metavar="N", help="optimizer steps (250)", **defaults)
    p.add_argument("--method", metavar="NAME", help="method by name, see `funcpeft methods` (LoRA)", **defaults)
    p.add_argument(
        "--set", type=assignment, action="append", metavar="FIELD=VALUE", help="field of the method, repeatable", **defaults
    )
    p.add_argument("--quantize", metavar="FORMAT", help="format of the frozen base, such as nf4 or int8 (none)", **defaults)
    where = p.add_mutually_exclusive_group()
    where.add_argument("--domain", choices=("prose", "source", "html"), help="text of the standard library (prose)", **defaults)
    where.add_argument("--text", type=Path, metavar="DIR", help="directory of UTF-8 text to train on instead", **defaults)
    p.add_argument("--lr", type=rate, nargs=2, metavar=("LOW", "HIGH"), help="range of learning rates (3e-4 3e-2)", **defaults)
    p.add_argument("--batch", type=positive, metavar="N", help="windows per step (2)", **defaults)
    p.add_argument("--tokens", type=positive, metavar="N", help="bytes per window, at most 256 (64)", **defaults)
    p.add_argument("--seed", type=int, metavar="N", help="of adapters and windows (0)", **defaults)
    p.add_argument("--out", type=Path, metavar="DIR", help="for checkpoint and picture (demo-out)", **defaults)
    p.add_argument("--no-progress", action="store_false", dest="progress", help="no progress bar", **defaults)


def demo(given: dict[str, Any]) -> int:
    """Runs the demo with the settings given; returns the exit status."""
    from rich.console import Console

    from funcpeft.demo import Settings, UserError, run

    fields = dict(given.pop("set", []))
    wide = None if sys.stdout.isatty() else 110
    try:
        result = run(Settings(fields=fields, **given), Console(width=wide, soft_wrap=True, markup=False, highlight=False))
    except UserError as e:
        print(f"funcpeft demo: error: {e}", file=sys.stderr)
        return 2
    return 0 if result.agree else 1


def list_methods() -> int:
    """Prints the table of the registered methods."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 140
    Console(width=width).print(methods_table())
    return 0


def methods_table() -> Any:
    """Makes the table of the registered methods, from their class variables and module docstrings."""
    from rich.table import Table

    from funcpeft import methods

    table = Table(
        "method",
        "what it is",
        "layer kinds",
        "merges",
        "unmerges",
        "adds",
        title=f"{len(methods.__all__)} methods",
        title_justify="left",
    )
    for name in methods.__all__:
        cls = getattr(methods, name)
        about = (sys.modules[cls.__module__].__doc__ or "").partition("\n")[0].partition(": ")[2].rstrip(".")
        facts = (_merges(cls, "merge"), _merges(cls, "unmerge"), cls.additive)
        kinds = "the call" if not cls.kinds else "any" if cls.takes_any else ", ".join(sorted(cls.kinds))
        table.add_row(name, about, kinds, *("yes" if f else "" for f in facts))
    return table


def _merges(cls: type, which: str) -> bool:
    from funcpeft.method import Method

    return getattr(cls, which) is not getattr(Method, which)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    given = vars(parser().parse_args(argv))
    command = given.pop("command")
    if command == "methods":
        return list_methods()
    return demo(given)
