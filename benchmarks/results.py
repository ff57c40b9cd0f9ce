"""Raw results: one JSON line a measurement, in ``results/<device>/<suite>.jsonl``. Schema: benchmarks/README.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT

RESULTS = ROOT / "benchmarks" / "results"
STATUSES = ("ok", "WRONG", "OOM", "failed", "not measured")


@dataclass
class Row:
    """One measurement; ``figures`` hold numbers under names that end in their unit where they have one."""

    suite: str
    workload: str
    mode: str
    provider: str
    shape: list[int]
    dtype: str
    layout: str
    status: str = "ok"
    figures: dict[str, float | None] = field(default_factory=dict)
    check: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    environment: dict[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status must be one of {STATUSES}, got {self.status!r}")

    def case(self) -> tuple[Any, ...]:
        """What rows of one comparison have in common."""
        return self.workload, self.mode, tuple(self.shape), self.dtype


def write(path: Path, rows: Iterable[Row]) -> None:
    """Replace ``path``; a file always holds the rows of one run."""
    for _ in recorded(path, rows):
        pass


def recorded(path: Path, rows: Iterable[Row]) -> Iterator[Row]:
    """Pass ``rows`` on, each written as it comes: a run that is cut short leaves what it has measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", buffering=1) as file:
        for row in rows:
            file.write(json.dumps(asdict(row)) + "\n")
            yield row


def read(path: Path) -> list[Row]:
    """The rows of ``path``; none where there is no such file."""
    if not path.exists():
        return []
    return [Row(**json.loads(line)) for line in path.read_text().splitlines() if line.strip()]
