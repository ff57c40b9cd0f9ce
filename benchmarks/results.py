"""Raw results: one JSON line a measurement, in ``results/<device>/<suite>.jsonl``. Schema: benchmarks/README.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.environment import IDENTITY, ROOT
from benchmarks.errors import BenchmarkError

RESULTS = ROOT / "benchmarks" / "results"  # published
OURS = ROOT / "bench-results"  # of whoever runs them here
SCHEMA = 2
STATUSES = ("ok", "WRONG", "OOM", "failed", "unsupported", "not measured")
Key = tuple[str, str, str, tuple[int, ...], str, str]


@dataclass
class Row:
    """One measurement; ``figures`` hold numbers under names that end in their unit where they have one.

    Raises:
        ValueError: a field that the schema does not allow.
    """

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
    environment: dict[str, str | float | None] = field(default_factory=dict)
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"schema must be {SCHEMA}, got {self.schema!r}")
        for name in ("suite", "workload", "mode", "provider", "dtype", "layout", "note"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a string, got {getattr(self, name)!r}")
        if self.status not in STATUSES:
            raise ValueError(f"status must be one of {STATUSES}, got {self.status!r}")
        if not isinstance(self.shape, list) or not all(isinstance(size, int) for size in self.shape):
            raise ValueError(f"shape must be a list of integers, got {self.shape!r}")
        for name, value in self.figures.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise ValueError(f"figure {name!r} must be a number or null, got {value!r}")

    @property
    def key(self) -> Key:
        """What makes two rows the same measurement: the later one counts."""
        return self.workload, self.mode, self.provider, tuple(self.shape), self.dtype, self.layout


def read(path: Path) -> list[Row]:
    """The rows of ``path``, the last one of each key; none where there is no such file.

    Raises:
        BenchmarkError: a line that is no row of this schema. A last line without its end was cut short, and is not.
    """
    if not path.exists():
        return []
    rows: dict[Key, Row] = {}
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            row = Row(**json.loads(line))
        except (ValueError, TypeError, AttributeError) as error:
            raise BenchmarkError(f"{path}, line {number}: not a row of schema {SCHEMA}: {error}") from None
        rows[row.key] = row
    return list(rows.values())


def append(path: Path, row: Row) -> None:
    """Add one row at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def tidy(path: Path, keys: Iterable[Key] | None = None) -> None:
    """Leave one row a key, of ``keys`` alone where they are given and in their order; the file is replaced at once."""
    rows = {row.key: row for row in read(path)}
    if not path.exists():
        return
    kept = rows.values() if keys is None else [rows[key] for key in keys if key in rows]
    write(path, kept)


def write(path: Path, rows: Iterable[Row]) -> None:
    """Replace the rows of ``path``."""
    replace(path, "".join(json.dumps(asdict(row)) + "\n" for row in rows).encode())


def replace(path: Path, content: bytes) -> None:
    """Whoever reads ``path`` meanwhile sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_bytes(content)
    fresh.replace(path)


def measured(rows: Iterable[Row], environment: Mapping[str, str | float | None]) -> set[Key]:
    """Keys of what has been measured with this code, on this device and with these versions."""
    return {
        row.key
        for row in rows
        if row.status != "not measured" and all(row.environment.get(name) == environment[name] for name in IDENTITY)
    }
