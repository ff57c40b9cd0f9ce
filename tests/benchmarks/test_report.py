"""The report: generated from the rows alone, whole, honest about what lost or is missing, and never typed."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
from benchmarks import results
from benchmarks.errors import BenchmarkError
from benchmarks.reporting import headline, page, plots, publish
from benchmarks.reporting.report import load
from benchmarks.results import Row

STALE = "run `python -m benchmarks report --publish --output benchmarks/results`"
ENVIRONMENT: dict[str, str | float | None] = {
    "device": "a <device>", "driver": "1.2", "torch": "2.13.0", "triton": "3.7.1", "python": "3.11.7",
    "commit": "0123456789ab", "date": "2026-01-02T03:04:05+00:00", "copy_gb_s": 2900.0,
}  # fmt: skip


def row(suite: str, workload: str = "layer", provider: str = "fusedres", **fields: Any) -> Row:
    given = {"mode": "training", "shape": [4, 8], "dtype": "float32", "layout": "contiguous"} | fields
    return Row(suite, workload, provider=provider, environment=dict(ENVIRONMENT), **given)


def timed(speedup: float | None, provider: str = "fusedres", **fields: Any) -> Row:
    figures: dict[str, float | None] = {"ms": 2.0, "ms_q1": 1.9, "ms_q3": 2.3, "speedup": speedup}
    if speedup:
        figures |= {"speedup_low": 0.9 * speedup, "speedup_high": 1.1 * speedup}
    return row("kernels", provider=provider, figures=figures | fields.pop("figures", {}), **fields)


def save(folder: Path, device: str, rows: list[Row]) -> None:
    results.write(folder / device / f"{rows[0].suite}.jsonl", rows)


TRAFFIC = {
    "launches": 2.0, "passes": 3.0, "aten_passes": 0.0, "budget_passes": 3.0, "eager_passes": 5.0,
    "inductor_passes": 3.5, "vector_share": 0.01, "us_h100": 12.5,
}  # fmt: skip
CODE = {"registers": 64.0, "spill_bytes": 0.0, "occupancy": 0.5, "bytes_in_flight": 1000.0, "bytes_needed": 2000.0}
LOSSES = {"ok": True, "losses": [2.0, 1.0, 0.5]}
EVERY_SUITE = [
    ("a-gpu", [timed(1.5), timed(0.5, workload="slow"), timed(1.0, "eager", workload="slow"),
               timed(None, workload="large", status="OOM"), timed(None, workload="wrong", status="WRONG")]),
    ("cpu", [row("traffic", mode=mode, figures=dict(TRAFFIC)) for mode in ("forward", "backward")]),
    ("cpu", [row("network", provider=name, figures={"moved_mib": moved, "eager_share": moved / 200})
             for name, moved in (("fusedres, whole network", 103.0), ("eager channels-last", 200.0))]),
    ("cpu", [row("codegen", "_kernel", "sm_90", figures=CODE | {"registers": 200.0, "spill_bytes": 16.0}, shape=[1]),
             row("codegen", "_kernel", "sm_90", figures=dict(CODE), shape=[2])]),
    ("cpu", [row("memory", figures={"saved_mib": 12.0, "saved_share": 0.5})]),
    ("cpu", [row("compile-study", figures={"kernels": 7.0, "compile_cold_s": 3.0})]),
    ("cpu", [row("train", "digits", figures={"steps": 3.0, "loss": 0.5}, check=LOSSES)]),
]  # fmt: skip
ROWS = dict(sorted(((device, rows[0].suite), rows) for device, rows in EVERY_SUITE))
SAID = (
    "1.50", "0.50 (0.45–0.55)", "1 of 2 slower", "1 WRONG", "1 OOM",
    "3 of 3 (eager 5, inductor 3.5)", "| 12.5 |", "200 (_kernel)", "| 200, 16 B, 50% |", "50% (_kernel)",
    "| eager channels-last | 200 | 100.0% |\n", "| fusedres, whole network | 103 | 51.5% |",
    "| 12 | 50% |", "| 7 | 3 |", "| 0.5000 |", "These are byte counts, not times",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for device, rows in EVERY_SUITE:
        save(tmp_path, device, rows)
    return tmp_path


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """Of ``EVERY_SUITE``."""
    return publish.generate(ROWS)


def visible(text: str) -> list[str]:
    """Lines outside of everything that has to be opened."""
    innermost = re.compile(r"<details>(?:(?!<details>).)*?</details>", flags=re.DOTALL)
    while innermost.search(text):
        text = innermost.sub("", text)
    return [line for line in text.splitlines() if line]


def committed() -> dict[str, bytes]:
    found = sorted(results.RESULTS.rglob("*.svg"))
    return {path.relative_to(results.RESULTS).as_posix(): path.read_bytes() for path in found}


def test_texts_agree_with_the_rows() -> None:
    _, between, _ = publish.split(publish.README)
    rows = load(results.RESULTS)
    assert between == publish.summary(rows), STALE
    assert publish.TABLES.read_text() == publish.render(rows, sorted(committed())), STALE


def test_committed_plots_agree_with_the_rows() -> None:
    rows, images = load(results.RESULTS), committed()
    assert plots.digest(rows["cpu", "network"]).encode() in images.pop("headline.svg"), STALE
    drawn = {(name.split("/")[0], name.split("/")[1].split("-")[0]) for name in images}
    assert drawn <= {(device, suite.split("-")[0]) for device, suite in rows}, STALE
    for (device, suite), found in rows.items():
        of = [content for name, content in images.items() if name.startswith(f"{device}/{suite}-")]
        assert all(plots.digest(found).encode() in content for content in of), STALE


def test_what_can_be_seen_is_short() -> None:
    _, between, _ = publish.split(publish.README)
    assert sum(line.startswith("|") for line in between.splitlines()) <= 2 + 10
    assert len(visible(publish.TABLES.read_text())) <= 120
    assert publish.TABLES.read_text().lower().count("not measured") <= 1, "said once"


def test_another_row_makes_the_readme_disagree() -> None:
    more = {**ROWS, ("a-gpu", "kernels"): [*ROWS["a-gpu", "kernels"], timed(7.25, workload="new")]}
    assert "7.25" in publish.render(more, [])
    assert "7.25" not in publish.render(ROWS, [])


def published(folder: Path, text: str = f"above\n{publish.BEGIN}\nprevious\n{publish.END}\nbelow\n") -> list[Path]:
    """Arguments of ``publish`` under ``folder``, with a README of ``text``."""
    paths = [folder / name for name in ("out", "README.md", "RESULTS.md")]
    paths[1].write_text(text)
    return paths


def test_publishing_merges_rows_and_rewrites_only_between_the_markers(folder: Path) -> None:
    into, readme, tables = published(folder.parent)
    save(into, "a-gpu", [timed(9.0), timed(3.0, workload="older")])
    publish.publish(folder, into, readme, tables)
    rows = results.read(into / "a-gpu" / "kernels.jsonl")
    assert [r.figures.get("speedup") for r in rows[:2]] == [1.5, 3.0], "the new figure of a key, and what is there"
    text = readme.read_text()
    assert text.startswith(f"above\n{publish.BEGIN}\n| eager over fusedres")
    assert text.endswith(f"{publish.END}\nbelow\n")
    assert "previous" not in text
    links = re.findall(r"!\[.*?\]\((.*?)\)", tables.read_text())
    assert links
    for link in links:
        assert (tables.parent / link).exists(), link
    assert not list(folder.parent.rglob("*.tmp"))


def test_the_headline_tells_speeds_counts_and_what_is_worse() -> None:
    host = [row("host", mode=m, provider=p, figures={"host_us": us}) for m in ("forward", "backward", "inference")
            for p, us in (("eager", 10.0), ("fusedres", 20.0))]  # fmt: skip
    lines = headline.lines({**ROWS, ("cpu", "host"): host})
    told = {line.what.removesuffix(", mean"): line[1:3] for line in lines}
    assert told["bytes, layer, whole network"] == ("1.94", "–")
    assert told["bytes of 1 BatchNorm functions"][0].startswith("1.67 ")
    assert told["saved for backward, layer"] == ("2.00", "–")
    assert told["host time a call, BatchNorm layers"] == ("0.50", "0.50")
    assert told["speed, 2 BatchNorm layers"][0] == "0.87 (0.81–0.93)", (
        "√(1.5 · 0.5), and half the width of one, over √2"
    )
    assert headline.worse(ROWS) == ["slow 4×8, training, fusedres: 0.50 (0.45–0.55)"]


def test_the_screen_is_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    cpu = {("cpu", suite): rows for (_, suite), rows in ROWS.items()}
    many = [timed(0.5, workload=f"layer {n}") for n in range(60)]
    headline.show({**cpu, ("cpu", "kernels"): [*cpu["cpu", "kernels"], *many]}, Console(width=170), "file:///page", 3)
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) <= 40
    assert max(len(line.rstrip()) for line in shown) <= 100
    assert headline.ON_CPU in shown
    assert "slower than eager, the whole interval: 61" in shown
    assert any("WRONG: kernels wrong" in line for line in shown)
    assert shown[-1] == "everything: file:///page"


def test_every_suite_is_reported() -> None:
    text = publish.render(ROWS, [])
    for expected in SAID:
        assert expected in text, expected
    assert "**These are not GPU timings.**" not in text, "nothing was timed on a CPU"


def test_a_report_of_nothing_says_so(tmp_path: Path) -> None:
    publish.draw(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [publish.PAGE]
    assert "There are no rows" in (tmp_path / publish.PAGE).read_text()
    text = publish.render({}, [])
    assert text.lower().count("not measured") == 1
    assert "\n## " not in text
    assert "1.0x" not in text


def test_the_same_rows_give_the_same_bytes(folder: Path, files: dict[str, bytes]) -> None:
    publish.draw(folder)
    written = (path for path in folder.rglob("*.*") if path.suffix != ".jsonl")
    assert files == {path.relative_to(folder).as_posix(): path.read_bytes() for path in written}


def test_plots_are_light_on_any_page_and_name_their_rows(files: dict[str, bytes]) -> None:
    drawn = {name: content for name, content in files.items() if name not in (publish.PAGE, page.HEADLINE)}
    assert list(drawn) == [
        "a-gpu/kernels-speed-float32.svg", "cpu/memory-saved-float32.svg",
        "cpu/traffic-passes.svg", "cpu/train-curves.svg",
    ]  # fmt: skip
    for name, content in drawn.items():
        text = content.decode()
        device, file = name.split("/")
        assert plots.digest(ROWS[device, file.split("-")[0]]) in text
        assert re.search(r'<g id="patch_1">\s*<path d="[^"]*" style="fill: #ffffff"/>', text), "opaque white"
        assert re.search(r"MiB|×|passes|nats", text), "a unit"


def test_losing_cases_are_drawn(files: dict[str, bytes]) -> None:
    text = files["a-gpu/kernels-speed-float32.svg"].decode()
    for shown in ("slow, 4×8", "large, 4×8", "wrong, 4×8", ">OOM<", ">WRONG<"):
        assert shown in text, shown


def test_a_plot_of_many_cases_is_split(tmp_path: Path) -> None:
    count = 2 * plots.LINES + 1
    save(tmp_path, "a-gpu", [timed(1.1, workload=f"layer {n}", dtype="bfloat16") for n in range(count)])
    names = [f"a-gpu/kernels-speed-bfloat16-{n}.svg" for n in (1, 2, 3)]
    assert list(plots.draw(load(tmp_path))) == names
    publish.draw(tmp_path)
    save(tmp_path, "a-gpu", [timed(1.1)])
    publish.draw(tmp_path)
    assert [path.name for path in tmp_path.glob("a-gpu/*.svg")] == ["kernels-speed-float32.svg"], "old plots are gone"


@pytest.mark.parametrize(
    ("figures", "name"),
    [
        ({"bandwidth_share": 0.7, "gb_s": 2000.0}, "bandwidth"),
        ({"peak_mib": 100.0}, "peak"),
        ({"saved_mib": 3.0}, "saved"),
    ],
)
def test_bandwidth_and_memory_are_drawn_where_they_were_measured(
    figures: dict[str, float], name: str, tmp_path: Path
) -> None:
    save(tmp_path, "a-gpu", [timed(1.1, figures=figures)])
    assert f"a-gpu/kernels-{name}-float32.svg" in plots.draw(load(tmp_path))


def test_the_page_needs_no_other_file_and_lists_every_row(files: dict[str, bytes]) -> None:
    text = files[publish.PAGE].decode()
    assert re.findall(r'(?:src|href)="(?!data:|#)', text) == []
    assert "http" not in text
    assert "prefers-color-scheme: dark" in text
    body = re.findall(r"<tbody>.*?</tbody>", text, flags=re.DOTALL)
    assert text.index("<details") > text.index(page.headline.TITLE), "what comes first need not be opened"
    assert [part.count("<tr") for part in body] == [len(found) for found in ROWS.values()]
    for shown in ("WRONG", "OOM", "a &lt;device&gt;", "0123456789ab", "copy_gb_s", "2900"):
        assert shown in text, shown
    images = [base64.b64decode(image) for image in re.findall(r'data:image/svg\+xml;base64,([^"]+)', text)]
    assert sorted(images) == sorted(content for name, content in files.items() if name != publish.PAGE)


def test_the_page_says_what_came_nearest_to_its_limit() -> None:
    check = {"ok": True, "loads": [128, 64], "outputs_l2": [1e-3, 2e-3], "outputs_max": [3e-3, 4e-3], "losses": [1, 2]}
    text = page.render({("cpu", "mlp"): [row("mlp", check=check)]}, {})
    assert "<td>outputs_max: 0.003 of 0.004</td>" in text


def test_a_row_of_another_schema_leaves_everything_as_it_is(folder: Path) -> None:
    paths = published(folder)
    with (folder / "cpu" / "traffic.jsonl").open("a") as rows:
        rows.write(json.dumps({"suite": "traffic", "schema": 1}) + "\n")
    for report in (lambda: publish.publish(folder, *paths), lambda: publish.draw(folder)):
        with pytest.raises(BenchmarkError, match="not a row of schema"):
            report()
    assert "previous" in paths[1].read_text()
    assert not list(folder.rglob("*.svg"))
    assert not (folder / publish.PAGE).exists()


def test_a_readme_without_markers_is_refused(folder: Path) -> None:
    paths = published(folder, "no markers")
    with pytest.raises(BenchmarkError, match="lacks the markers"):
        publish.publish(folder, *paths)
    assert not paths[0].exists()
    assert not paths[2].exists()


def test_every_field_and_figure_is_documented() -> None:
    text = (results.ROOT / "benchmarks" / "README.md").read_text()
    rows = [row for found in load(results.RESULTS).values() for row in found]
    names = {field.name for field in dataclasses.fields(Row)} | set(results.STATUSES)
    names |= {name for row in rows for name in (*row.figures, *row.environment)}
    missing = {name for name in names if not re.search(rf"`{name}(`|[/,])", text)}
    assert not missing
