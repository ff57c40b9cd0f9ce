"""The benchmarks' own rules: rows are saved as they come and measured once, bad requests end in one line."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

pytest.importorskip("rich")
from benchmarks import __main__ as command
from benchmarks import environment, results, suite
from benchmarks.environment import commit, describe
from benchmarks.errors import BenchmarkError
from benchmarks.results import Key, Row
from benchmarks.suite import CPU, Request, Suite

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class One:
    """A case of one row."""

    workload: str

    @property
    def keys(self) -> list[Key]:
        return [row(self.workload).key]


def row(workload: str, **others: object) -> Row:
    return replace(Row("suite", workload, "training", "eager", [4, 8], "float32", ""), **others)  # pyright: ignore


def counting(measured: list[str], *, stop_at: str | None = None, status: str = "ok") -> Suite:
    """A suite of cases a, b, c that notes what it measures, and is interrupted before ``stop_at``."""

    def run(request: Request, cases: Sequence[One]) -> Iterator[Row]:
        for case in cases:
            if case.workload == stop_at:
                raise KeyboardInterrupt
            measured.append(case.workload)
            yield row(case.workload, status=status, figures={"ms": len(measured)}, environment=describe(CPU))

    return Suite("suite", "", lambda request: [One(name) for name in "abc"], run, lambda rows: Table())


def drive(one: Suite, request: Request) -> list[Row]:
    return suite.drive(one, request, one.plan(request), lambda text, count: None)


def test_a_rerun_measures_what_is_missing(tmp_path: Path) -> None:
    request = Request(CPU, tmp_path)
    measured: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        drive(counting(measured, stop_at="c"), request)
    assert [r.workload for r in results.read(tmp_path / "cpu" / "suite.jsonl")] == ["a", "b"], "nothing is lost"
    rows = drive(counting(measured), request)
    assert measured == ["a", "b", "c"]
    assert [(r.workload, r.figures["ms"]) for r in rows] == [("a", 1), ("b", 2), ("c", 3)]
    assert drive(counting(measured), replace(request, fresh=True)) != rows
    assert measured == [*"abcabc"]


@pytest.mark.parametrize("name", ["commit", "torch", "device"])
def test_other_code_or_machines_are_measured_again(name: str, tmp_path: Path) -> None:
    path = tmp_path / "cpu" / "suite.jsonl"
    results.write(path, [row("a", environment=describe(CPU) | {name: "other"}), row("b", environment=describe(CPU))])
    measured: list[str] = []
    drive(counting(measured), Request(CPU, tmp_path))
    assert measured == ["a", "c"]
    assert len(results.read(path)) == 3


def test_what_is_out_of_time_is_not_saved(tmp_path: Path) -> None:
    shown = drive(counting([], status="not measured"), Request(CPU, tmp_path))
    assert [r.status for r in shown] == ["not measured"] * 3
    assert results.read(tmp_path / "cpu" / "suite.jsonl") == []
    drive(counting([]), Request(CPU, tmp_path))
    shown = drive(counting([], status="not measured"), Request(CPU, tmp_path, fresh=True))
    assert [r.status for r in shown] == ["ok"] * 3, "older figures stay"


def test_a_whole_fresh_run_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "cpu" / "suite.jsonl"
    results.write(path, [row("gone"), row("c")])
    drive(counting([]), Request(CPU, tmp_path, fresh=True, workloads=("a",)))
    assert {r.workload for r in results.read(path)} == {"gone", "a", "b", "c"}
    drive(counting([]), Request(CPU, tmp_path, fresh=True))
    assert [r.workload for r in results.read(path)] == ["a", "b", "c"]


def test_the_last_row_of_a_key_counts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for ms in (1.0, 2.0):
        for name in "ab":
            results.append(path, row(name, figures={"ms": ms}))
    assert [(r.workload, r.figures["ms"]) for r in results.read(path)] == [("a", 2.0), ("b", 2.0)]
    results.tidy(path)
    assert len(path.read_text().splitlines()) == 2


def test_a_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    results.write(path, [row("a"), row("b")])
    path.write_text(path.read_text()[:-20])
    assert [r.workload for r in results.read(path)] == ["a"]
    results.tidy(path)
    results.append(path, row("b"))
    assert [r.workload for r in results.read(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 1}, "schema must be 2"),
        ({"status": "fine"}, "status must be one of"),
        ({"figures": {"ms": "3"}}, "figure 'ms' must be a number"),
        ({"figures": {"ms": True}}, "figure 'ms' must be a number"),
        ({"shape": [4, "8"]}, "shape must be a list of integers"),
        ({"workload": 3}, "workload must be a string"),
        ({"extra": 1}, "extra"),
    ],
)
def test_rows_of_another_schema_are_refused(
    change: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cpu" / "kernels.jsonl"
    path.parent.mkdir()
    before = json.dumps(asdict(row("a"))) + "\n" + json.dumps(asdict(row("b")) | change) + "\n"
    path.write_text(before)
    with pytest.raises(BenchmarkError, match=f"line 2: .*{message}"):
        results.read(path)
    with pytest.raises(SystemExit, match="2"):
        command.main(["kernels", "--output", str(tmp_path)])
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert path.read_text() == before, "left as it was"


def test_committed_rows_are_of_the_schema() -> None:
    paths = sorted(results.RESULTS.glob("*/*.jsonl"))
    assert paths
    for path in paths:
        rows = results.read(path)
        assert rows
        assert {r.suite for r in rows} == {path.stem}
        assert all({"device", "driver", "torch", "triton", "commit", "date"} <= set(r.environment) for r in rows)


def test_the_code_that_is_measured_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def name(head: str | None, changes: str | None) -> str:
        outputs = {"rev-parse": head, "status": changes}
        monkeypatch.setattr("benchmarks.environment._output", lambda words: outputs[words[1]])
        return commit.__wrapped__()

    assert name("abc", "") == "abc"
    assert name("abc", " M fusedres/nn/blocks.py").startswith("abc-dirty-")
    assert name(None, None).startswith("unknown-dirty-")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["mlp", "--dtype", "bfloat16"], "is not measured on cpu"),
        (["models", "--provider", "jax"], "unknown provider 'jax'"),
        (["models", "--provider", "cuDNN"], "provider 'cuDNN' cannot run on cpu: it needs a GPU"),
        (["models", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["models", "--workload", "resnet9000"], "unknown workload 'resnet9000'; choose from basic block"),
        (["models", "--batch", "0"], "--batch must be positive"),
        (["models", "--device", "tpu"], "unknown device 'tpu'"),
        (["models", "--device", "cuda"], "torch sees no GPU"),
        (["models", "--device", "cpu", "--dtype", "float16"], "is not measured on cpu"),
        (["models", "--quick", "--full"], "not allowed with argument"),
        (["train", "--interpreted-steps", "-1"], "must not be negative"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["kernels", "--publish"], "run: python -m benchmarks report --publish"),
    ],
)
def test_bad_requests_end_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        command.main([*arguments, "--output", str(tmp_path)])
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not list(tmp_path.iterdir()), "nothing is half-written"


@pytest.mark.parametrize("word", ["kernels", "report", "all"])
def test_a_folder_that_cannot_be_written_to(
    word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    measured: list[str] = []
    monkeypatch.setattr(command, "SUITES", {"kernels": counting(measured)})
    monkeypatch.setattr(command, "ALL", ("kernels",))
    file = tmp_path / "file"
    file.write_text("in the way")
    with pytest.raises(SystemExit, match="2"):
        command.main([word, "--output", str(file / "rows")])
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert str(file) in message
    assert "--output FOLDER" in message
    assert measured == [], "before anything is measured"


@pytest.mark.parametrize(("package", "word"), [("rich", "--help"), ("matplotlib", "all")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(package: str, word: str, tmp_path: Path) -> None:
    program = (
        "import importlib.util, runpy, sys\n"
        f"find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *rest: None if name == {package!r} else find(name, *rest)\n"
        f"sys.argv[1:] = [{word!r}, '--output', {str(tmp_path / 'rows')!r}]\n"
        "runpy.run_module('benchmarks', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    [message] = done.stderr.splitlines()
    assert message.startswith(f"benchmarks: not installed: {package}; run: ")
    assert message.endswith("-m pip install -e '.[bench]'")
    assert not list(tmp_path.iterdir())


def test_everything_ends_in_one_screen_and_touches_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "SUITES", {"suite": counting([])})
    monkeypatch.setattr(command, "ALL", ("suite",))
    monkeypatch.setattr(command, "CONSOLE", Console(width=170))
    before = {path: path.read_bytes() for path in results.RESULTS.rglob("*.*")}
    assert command.main(["--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out.strip().splitlines()
    assert len(shown) <= 40
    assert shown[-1] == f"everything: {(tmp_path / 'index.html').as_uri()}"
    assert (tmp_path / "index.html").exists()
    assert "rows:" not in "".join(shown), "tables are for those who ask"
    assert before == {path: path.read_bytes() for path in results.RESULTS.rglob("*.*")}
    assert command.main(["--output", str(tmp_path), "--tables"]) == 0
    assert "rows:" in capsys.readouterr().out


def test_a_run_writes_where_git_does_not_look() -> None:
    assert command._parse([]).output == results.OURS
    assert f"{results.OURS.name}/" in (ROOT / ".gitignore").read_text().splitlines()


def test_measuring_needs_no_plots() -> None:
    """A machine with a GPU need not have matplotlib: rows are drawn elsewhere."""
    program = "import sys, benchmarks.__main__; raise SystemExit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_triton_by_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    wanted = describe(CPU)["triton"]
    environment._triton.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert describe(CPU)["triton"] == wanted is not None
    environment._triton.cache_clear()


def test_the_command_ends_with_its_status(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks", "nonsense", "--output", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("benchmarks: argument SUITE: invalid choice: 'nonsense'")
    assert "Traceback" not in done.stderr + done.stdout


def test_an_interrupted_command_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(command.SUITES, "kernels", counting([], stop_at="b"))
    monkeypatch.setattr(command, "CONSOLE", Console(width=170))
    assert command.main(["kernels", "--output", str(tmp_path)]) == 130
    assert f"What was measured is kept in {tmp_path}; the same command goes on from there." in capsys.readouterr().out
    assert [r.workload for r in results.read(tmp_path / "cpu" / "suite.jsonl")] == ["a"]


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("OOM", 0), ("WRONG", 1), ("failed", 1)])
def test_what_is_wrong_shows_in_the_exit_status(
    status: str, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(command.SUITES, "kernels", counting([], status=status))
    assert command.main(["kernels", "--output", str(tmp_path)]) == code
