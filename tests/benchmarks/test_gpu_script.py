"""benchmarks/gpu.sh from end to end, with Python, compute-sanitizer and nvidia-smi stubbed at their entry."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
from rich.console import Console

import benchmarks.__main__ as cli
from benchmarks import providers, results, workloads
from benchmarks.reporting import summary
from benchmarks.results import Row
from benchmarks.suite import Request
from benchmarks.suites import SUITES
from tests.kernels import test_sanitize

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
CHECKS = ["memcheck", "racecheck", "initcheck"]
MEASURED = ["kernels", "mlp", "models", "memory", "compile-study"]
STAGES = ["sanity", "models", "kernels", "mlp", "compiled", "bits", *CHECKS]
FULL = ["full-kernels", "full-models", "full-mlp"]
NAMED = ["memory", *FULL, "compile-study", "max-autotune", "tests"]  # they run where they are named
PYTHON = f"""#!{sys.executable} -IS
import json, os, shutil, sys, time
from pathlib import Path

arguments = sys.argv[1:]
here = Path({{here!r}})
if arguments[0] == "-c":
    sys.exit(os.environ.get("STUB_MISSING", "nothing") in arguments[1])
if arguments[:2] == ["-m", "benchmarks.reporting.summary"]:
    (here / "summarised").write_text(arguments[2])
    sys.exit(print(os.environ.get("STUB_FIGURES", "no rows")))
tool = os.environ.pop("STUB_TOOL", None)
with (here / "calls.jsonl").open("a") as file:
    call = {{{{"tool": tool, "arguments": arguments, "measures": arguments[1] == "benchmarks"}}}}
    print(json.dumps(call | {{{{"environment": dict(os.environ)}}}}), file=file)
name = tool or " ".join(arguments[1:3])
print("this is", name)
if name in os.environ.get("STUB_SLEEP", "-"):
    time.sleep(60)
if arguments[1] == "benchmarks":
    folder = Path(arguments[arguments.index("--output") + 1]) / "nvidia-stub"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(here / "rows" / f"{{{{arguments[2]}}}}.jsonl", folder)
sys.exit(3 if name in os.environ.get("STUB_FAIL", "-") else 0)
"""
SANITIZER = """#!/bin/bash
tool=$2
while [[ $1 != */python ]]; do shift; done
STUB_TOOL=$tool "$@" || exit
[[ -z ${STUB_REPORT:-} ]] || echo "=========     at $STUB_REPORT+0x120 in somewhere.py:12"
echo "========= ${STUB_SUMMARY-ERROR SUMMARY: 1 errors}"
"""


@dataclass
class Done:
    status: int
    output: str
    errors: str
    out: Path
    calls: list[dict]

    @property
    def verdicts(self) -> dict[str, str]:
        """By stage, from the lines of the summary."""
        lines = self.output.split("summary: ")[1].splitlines()[1:]
        found = (re.match(r"(\S+) +(\S.*?) +\d+ s   ", line) for line in lines)
        return {match[1]: match[2] for match in found if match}

    @property
    def measured(self) -> list[str]:
        """Suites of the benchmarks, in the order of their runs."""
        return [call["arguments"][2] for call in self.calls if call["measures"]]


@pytest.fixture
def stub(tmp_path):
    """Runs the script with stubs, and returns what it did."""
    (tmp_path / "rows").mkdir()
    for suite in MEASURED:
        lines = [json.dumps(asdict(row)) + "\n" for row in rows(suite)]
        (tmp_path / "rows" / f"{suite}.jsonl").write_text("".join(lines))
    tools = {"python": PYTHON.format(here=str(tmp_path)), "compute-sanitizer": SANITIZER, "nvidia-smi": "#!/bin/bash\n"}
    (tmp_path / "bin").mkdir()
    for name, text in tools.items():
        path = tmp_path / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def run(*stages: str, **environment: str) -> Done:
        given = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": "/nonexistent"}
        given |= {"PYTHON": str(tmp_path / "bin" / "python")} | environment
        out = tmp_path / "out"
        done = subprocess.run(
            ["bash", str(SCRIPT), str(out), *stages], env=given, cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        log = tmp_path / "calls.jsonl"
        calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return Done(done.returncode, done.stdout, done.stderr, out, calls)

    return run


def rows(suite: str) -> list[Row]:
    """Plausible rows, and more workloads than a summary has room for."""
    environment: dict[str, str | float | None] = {
        "device": "NVIDIA Stub", "driver": "1", "torch": "2", "triton": "3", "python": "3", "commit": "unknown",
        "copy_gb_s": 2900.0, "matmul_tflop_s": 700.0,
    }  # fmt: skip
    made = []
    if suite in summary.SUITES:
        for number in range(12):
            for mode in summary.MODES:
                for provider, ms in (("eager channels-last", 3.0), ("torch.compile", 2.0), ("fusedres", 1.5)):
                    shape = [32, 3, 224, 224 + number % 2]
                    name = f"preact_resnet_cifar({number // 2}) 512→512"
                    row = Row(suite, name, mode, provider, shape, "bfloat16", "channels-last")
                    row.figures = {"ms": ms, "speedup": 3.0 / ms}
                    made.append(row)
    else:
        made.append(Row(suite, "resnet50", "training", "fusedres", [32], "bfloat16", "NCHW", "WRONG"))
    for row in made:
        row.environment = environment
    return made


def test_everything(stub, tmp_path, monkeypatch, capsys):
    """The first stages in order, nothing left but five files, and the summary of the rows last."""
    monkeypatch.setattr(sys, "argv", ["summary", str(tmp_path / "rows")])
    monkeypatch.delitem(sys.modules, summary.__name__)
    runpy.run_module(summary.__name__, run_name="__main__")
    done = stub(STUB_FIGURES=capsys.readouterr().out)
    assert done.status == 0, done.output + done.errors
    assert list(done.verdicts) == STAGES and set(done.verdicts.values()) == {"ok"}
    assert [call["tool"] for call in done.calls if call["tool"]] == CHECKS
    assert done.measured == ["models", "kernels", "mlp", "models"]
    left = sorted(str(path.relative_to(done.out)) for path in done.out.rglob("*") if path.is_file())
    suites = sorted(set(done.measured))
    assert left == sorted(["logs.tar.gz", "summary.txt", *(f"results/nvidia-stub/{name}.jsonl" for name in suites)])
    with tarfile.open(done.out / "logs.tar.gz") as archive:
        kept = {Path(name).name for name in archive.getnames()}
    assert kept >= {f"{stage}.log" for stage in STAGES}
    assert (tmp_path / "summarised").read_text() == str(done.out / "results")
    told = done.output[done.output.index("summary: ") :]
    assert told == (done.out / "summary.txt").read_text()
    lines = told.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 150 and len(told) < 12_000
    assert "copy 2900.0 GB/s" in told
    assert "2.00 (2.00-2.00, 2 sizes)  1.33 (1.33-1.33, 2 sizes)" in told and "1 WRONG" in told
    assert "…" not in told


def test_networks_come_before_what_compiles(stub):
    """Two networks in turns with eager, most telling batch first; torch.compile, which takes minutes, behind them."""
    models, kernels, mlp, compiled = (cli._parse(call["arguments"][2:]) for call in stub().calls if call["measures"])
    assert models.provider == ["fusedres", "fusedres + CUDA graph"] and compiled.provider == ["torch.compile"]
    for parsed in (models, compiled):
        assert parsed.batch == [256, 128, 32] and parsed.dtype == ["bfloat16"]
        assert parsed.workload == ["resnet50", "resnet34"]
    request = Request(torch.device("cuda"), Path("unused"), quick=models.quick)
    assert set(models.workload) <= {workload.name for workload in workloads.workloads("models", request)}
    for parsed in (kernels, mlp):
        assert not any(providers.PROVIDERS[name].compiles for name in parsed.provider) and parsed.quick


def test_commands_are_understood(stub):
    """By the real command line of the benchmarks, and by the real pytest, which collects few tests and none twice."""
    done = stub(*STAGES, *NAMED)
    assert list(done.verdicts) == [*STAGES, *NAMED] and set(done.measured) == set(MEASURED)
    for call in done.calls:
        assert "TRITON_INTERPRET" not in call["environment"]
        caches = [call["environment"][name] for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR")]
        assert not any(Path(cache).is_relative_to(done.out) for cache in caches)
        if call["tool"]:
            assert call["environment"]["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        if call["measures"]:
            parsed = cli._parse(call["arguments"][2:])
            assert parsed.suite in SUITES and parsed.quick != parsed.full
            assert providers.PROVIDERS.keys() >= set(parsed.provider or ())
            assert 0 < parsed.seconds < 510 and parsed.output == done.out / "results"
    sanity, bits, launches, *repeated, tests = (
        tuple(call["arguments"][2:]) for call in done.calls if not call["measures"]
    )
    assert set(repeated) == {launches}
    sanity, bits, launches, tests = map(collected, (sanity, bits, launches, tests))
    assert launches == {f"{SANITIZED}[{name}]" for name in test_sanitize.CASES}
    assert 0 < len(sanity) < 50 and all("test_gpu_sanity.py" in name for name in sanity)
    assert launches < bits and len(bits) < 100 and not any("oracle" in name or "compiled" in name for name in bits)
    for kind in ("bit_for_bit", "stream", "graph"):
        found = {name.split("::")[0] for name in bits if kind in name}
        assert len(found) >= 2, f"{kind}: {found}"
    assert (bits - launches) | sanity < tests and len(tests) < 500
    assert any("test_gpu_compile.py" in name for name in tests)


SANITIZED = "tests/kernels/test_sanitize.py::test_sanitize"


def collected(arguments: Sequence[str]) -> set[str]:
    """The tests that pytest finds, in this process, by ``arguments``; those of xdist apart."""
    plain = [a for i, a in enumerate(arguments) if a != "-n" and arguments[i - 1] != "-n"]
    found: list[str] = []

    class Plugin:
        def pytest_collection_finish(self, session: pytest.Session) -> None:
            found.extend(item.nodeid for item in session.items)

    quickly = ["--collect-only", "--no-header", "-p", "no:unraisableexception", "--rootdir", str(ROOT)]
    assert pytest.main([*plain, *quickly], [Plugin()]) == 0
    assert len(found) == len(set(found)), "no test twice"
    return set(found)


def test_a_failing_stage(stub):
    done = stub("bits", "memory", "memcheck", STUB_FAIL="pytest -p", STUB_SUMMARY="ERROR SUMMARY: 0 errors")
    assert done.status == 1
    assert done.verdicts == {"bits": "failed (3)", "memcheck": "ok", "memory": "ok"}


def test_a_stage_that_hangs(stub):
    """It is ended at its limit, and those behind it run."""
    start = time.monotonic()
    done = stub(STUB_SLEEP="benchmarks kernels", GPU_SH_SECONDS="30")
    assert done.status == 1
    assert done.verdicts == dict.fromkeys(STAGES, "ok") | {"kernels": "out of time"}
    assert time.monotonic() - start < 60


def test_no_time_left(stub):
    done = stub("memcheck", "full", STUB_SLEEP="memcheck", GPU_SH_SECONDS="0")
    assert done.status == 1 and set(done.verdicts.values()) == {"not run"} and not done.calls


@pytest.mark.parametrize(
    ("environment", "verdict"),
    [
        ({"STUB_REPORT": "_batch_norm_fwd_stats_kernel"}, "errors found"),
        ({"STUB_REPORT": "void at::native::vectorized_elementwise_kernel"}, "ok"),
        ({"STUB_SUMMARY": ""}, "no report"),
        ({"STUB_FAIL": "initcheck"}, "failed (3)"),
    ],
)
def test_what_the_sanitizer_says(stub, environment, verdict):
    """Reports on this package's kernels count, and so does a tool that reports nothing at all."""
    done = stub("initcheck", **environment)
    assert done.verdicts == {"initcheck": verdict} and done.status == int(verdict != "ok")


def test_no_sanitizer(stub, tmp_path):
    (tmp_path / "bin" / "compute-sanitizer").unlink()
    done = stub("memcheck", "memory")
    assert done.status == 1 and done.verdicts == {"memcheck": "not run", "memory": "ok"}


def test_no_xdist(stub):
    done = stub("bits", STUB_MISSING="xdist")
    [call] = done.calls
    assert done.status == 0 and "-n" not in call["arguments"]


def test_no_gpu(stub):
    done = stub(STUB_MISSING="is_available")
    assert done.status == 2 and "sees a GPU" in done.errors and not done.calls


@pytest.mark.parametrize(
    ("asked", "stages"),
    [
        (["full", "bits"], ["bits", *FULL]),
        (["max-autotune"], ["max-autotune"]),
        (["mlp"], ["mlp"]),
    ],
)
def test_named_stages(stub, asked, stages):
    """They run in the script's order and share all of the time."""
    done = stub(*asked, GPU_SH_SECONDS="100")
    assert done.status == 0 and list(done.verdicts) == stages
    if len(stages) == 1:
        assert re.search(r"\(at most (9\d|100) s\)", done.output)


def test_an_unknown_stage(stub):
    done = stub("bits", "nonsense")
    assert done.status == 2 and "nonsense" in done.errors and not done.calls


def test_a_summary_of_nothing(tmp_path, capsys):
    summary.main(tmp_path, Console(width=summary.WIDTH))
    assert capsys.readouterr().out == "no rows\n"


def test_a_summary_tells_captured_graphs_apart(tmp_path, capsys):
    for provider, ms in (("fusedres", 1.5), ("fusedres + CUDA graph", 1.2)):
        row = Row("models", "resnet50", "training", provider, [256, 3, 224, 224], "bfloat16", "channels-last")
        row.figures = {"ms": ms, "speedup": 3.0 / ms}
        results.append(tmp_path / "models.jsonl", row)
    summary.main(tmp_path, Console(width=summary.WIDTH))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "resnet50 bfloat16 2.00 - - -" in lines and "resnet50 bfloat16 + CUDA graph 2.50 - - -" in lines
