"""What there is to report, and the parts that several sections share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import results
from benchmarks.reporting.markdown import fold, where
from benchmarks.results import Row

Rows = Mapping[tuple[str, str], Sequence[Row]]  # by folder of the device and suite


def load(folder: Path) -> Rows:
    """Every row under ``folder``, as ``<device>/<suite>.jsonl``.

    Raises:
        BenchmarkError: a line that is no row of the schema.
    """
    files = sorted(folder.glob("*/*.jsonl"))
    rows = {(path.parent.name, path.stem): results.read(path) for path in files}
    return {key: found for key, found in rows.items() if found}


@dataclass(frozen=True)
class Report:
    """All rows, and the names of the plots of them under ``folder``, as the text links to it."""

    rows: Rows
    plots: Collection[str]
    folder: Path

    def images(self, device: str, suite: str, text: str) -> str:
        found = [name for name in self.plots if name.startswith(f"{device}/{suite}-")]
        shown = "".join(f"![{text}]({self.folder.as_posix()}/{name})\n" for name in found)
        return fold(shown, f"{len(found)} plots", visible=-1) if len(found) > 2 else shown

    def section(self, suite: str, title: str, text: Callable[[Sequence[Row]], str]) -> str:
        """A section of a suite that may have been measured on any device."""
        parts = [
            f"{where(rows)}\n\n{text(rows)}\n{self.images(device, suite, title.lower())}"
            for (device, name), rows in self.rows.items()
            if name == suite
        ]
        return f"## {title}\n\n" + "\n".join(parts) if parts else ""
