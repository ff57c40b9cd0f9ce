"""The pages for people: what they name exists, what they count was counted, and nothing is said twice."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINES = {"README.md": 150, "CONTRIBUTING.md": 100}
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / folder / "README.md" for folder in ("fusedres/kernels", "benchmarks")]
# Lines of the README's table, in order: what `traffic` calls the function.
WORKLOADS = (
    "batch_norm_act", "batch_norm_act + residual", "forked_batch_norm_act + residual", "add_batch_norm_act",
    "batch_norm_add_batch_norm_act", "batch_norm_act_max_pool2d", "batch_norm_act_global_avg_pool2d + residual",
    "layer_norm_linear_act", "linear_layer_norm_act + residual",
)  # fmt: skip


def prose(page: Path) -> str:
    """Without code, tables and what is generated."""
    text = re.sub(r"<!-- (\w+):begin -->.*?<!-- \1:end -->|```.*?```", "", page.read_text(), flags=re.DOTALL)
    return "\n".join(line for line in text.splitlines() if not line.startswith(("    ", "|")))


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", LINES)
def test_length(name):
    assert len((ROOT / name).read_text().splitlines()) <= LINES[name]


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names(page):
    """Files by their paths from the root, with functions and classes of theirs behind a colon; make's targets."""
    text = page.read_text()
    for path, name in re.findall(r"`([\w.*]+/[\w./*]*\.\w+)(?::(\w+))?`", text):
        assert list(ROOT.glob(path)), path
        assert not name or name in defined(ROOT / path), f"{path}:{name}"
    for path in re.findall(r"`([\w.]+/[\w./]*)`", text):
        assert (ROOT / path).exists() or path in ignored(), path
    commands = "\n".join([*re.findall(r"`(.*?)`", text), *re.findall(r"^    (.*?)(?:  .*)?$", text, re.MULTILINE)])
    targets = {
        target for words in re.findall(r"^make((?: [a-z-]+)+)", commands, re.MULTILINE) for target in words.split()
    }
    assert targets <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def defined(file: Path) -> set[str]:
    """Functions and classes at the top of a Python file."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, kinds)}


def ignored() -> set[str]:
    return set((ROOT / ".gitignore").read_text().split())


def test_passes_of_the_table():
    """Those of `traffic`: kernels and ATen's operators together; of functions with a product MiB."""
    counted: dict[tuple[str, str], str] = {}
    for line in (ROOT / "benchmarks" / "results" / "cpu" / "traffic.jsonl").read_text().splitlines():
        row = json.loads(line)
        figures, key = row["figures"], (row["workload"], row["mode"])
        unit, size = ("passes", 1) if "passes" in figures else ("bytes", 2**20)
        ours = figures["passes" if size == 1 else "distinct_bytes"] + figures[f"aten_{unit}"]
        if row["layout"] != "NCHW":  # the first shape is the largest
            counted.setdefault(key, (figures[f"eager_{unit}"] / size, ours / size))
    shown = re.findall(
        r"^\| `.*\| ([\d.]+) \+ ([\d.]+) \| ([\d.]+) \+ ([\d.]+) \|$", (ROOT / "README.md").read_text(), re.M
    )
    exact = [[*zip(counted[name, "forward"], counted[name, "backward"], strict=True)] for name in WORKLOADS]
    assert [list(line) for line in shown] == [
        [f"{figure:.2f}".rstrip("0").rstrip(".") for pair in pairs for figure in pair] for pairs in exact
    ]


def test_nothing_is_said_twice():
    sentences = [
        sentence
        for page in [*PAGES, *OTHERS]
        for item in re.split(r"\n\n|\n *[-\d]+\.? ", prose(page))
        for sentence in re.split(r"(?<=[.:;])\s", " ".join(item.split()))
        if len(sentence.split()) > 6
    ]
    assert len(sentences) > 200
    assert [sentence for sentence, count in Counter(sentences).items() if count > 1] == []
