"""Whether what a command needs is installed; imports nothing that might not be."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def need(*names: str, extra: str = "bench") -> None:
    """End in one line, with status 2, where a package is not installed."""
    if missing := [name for name in names if find_spec(name) is None]:
        command = f"{sys.executable} -m pip install -e '.[{extra}]'"
        print(f"benchmarks: not installed: {', '.join(missing)}; run: {command}", file=sys.stderr)
        raise SystemExit(2)
