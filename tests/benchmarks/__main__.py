"""All that is measured against peft, one script after the other: ``python tests/benchmarks``; tables here, figures in --out."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path


def runs(given: argparse.Namespace) -> list[list[str]]:
    """Returns the scripts with their options, in the order in which they run."""
    quick, out = ["--quick"] if given.quick else [], str(given.out)
    return [
        ["population.py", *quick, "--out", out, *(["--no-compile"] if given.no_compile else [])],
        ["population.py", "--members", "--rounds", "3", *quick, "--out", out],
        ["memory.py", *quick, "--out", out],
        ["adapters.py", *quick, "--out", out],
        ["per_example.py", *quick, "--json", str(given.out / "per_example.json")],
    ]


def main() -> int:
    """Runs every script in a process of its own; returns 1 if one failed."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--quick", action="store_true", help="tiny settings, to see that they run")
    made.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    made.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder of the figures")
    made.add_argument("--threads", type=int, help="threads of torch; by default its own choice")
    given = made.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    threads = {} if given.threads is None else {"OMP_NUM_THREADS": str(given.threads)}
    failed = []
    for script, *options in runs(given):
        line = " ".join((script, *options))
        print(f"== {line}", flush=True)
        command = [sys.executable, str(Path(__file__).parent / script), *options]
        if subprocess.run(command, env={**os.environ, **threads}, check=False).returncode:
            failed.append(line)
    print(f"failed: {'; '.join(failed)}" if failed else "all done")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
