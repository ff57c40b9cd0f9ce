"""The command ``fusedres``: ``fusedres doctor``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fusedres.doctor import diagnose


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 1 where ``doctor`` finds something wrong."""
    parser = argparse.ArgumentParser("fusedres", description="Fused Triton kernels for residual networks.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="show versions, devices and the backend, and check every function")
    parser.parse_args(arguments)
    lines, problems = diagnose()
    print("\n".join(lines).strip())
    print("\n" + ("\n".join(f"wrong: {problem}" for problem in problems) or "nothing is wrong"))
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
