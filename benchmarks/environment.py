"""What a measurement was taken on: device, driver, versions, commit and date."""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from benchmarks.errors import BenchmarkError

ROOT = Path(__file__).resolve().parent.parent
CODE = ("fusedres", "kernels", "benchmarks")
DEVICES = ("cpu", "cuda")
IDENTITY = ("device", "driver", "torch", "triton", "python", "commit")  # a row is measured again where these differ


def resolve_device(name: str | None) -> torch.device:
    """The device asked for, or a GPU where there is one.

    Raises:
        BenchmarkError: an unknown device, or a GPU where there is none.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in DEVICES:
        raise BenchmarkError(f"unknown device {name!r}; choose from {', '.join(DEVICES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("device 'cuda' was asked for, but torch sees no GPU")
    return torch.device(name)


def folder_name(device: torch.device) -> str:
    """The folder under ``results/``: ``cpu``, or the GPU's name."""
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def describe(device: torch.device) -> dict[str, str | float | None]:
    """The fields every row carries."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "driver": _driver() if on_gpu else None,
        "torch": torch.__version__,
        "triton": _triton(),
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


@functools.cache
def commit() -> str:
    """Short hash of the checkout; where the measured code differs from it, or there is none, with the code's own."""
    head = _output(["git", "rev-parse", "--short=12", "HEAD"])
    changed = _output(["git", "status", "--porcelain", "--", "fusedres", "kernels", "benchmarks/*.py"])
    if head is not None and not changed:
        return head
    files = sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]
    return f"{head or 'unknown'}-dirty-{digest}"


@functools.cache
def _triton() -> str | None:
    """Of the module that is imported, whose distribution has other names too, such as pytorch-triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return importlib.import_module("triton").__version__


@functools.cache
def _processor() -> str:
    name = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), flags=re.MULTILINE)
        name = found[1].strip() if found else name
    return f"{name}, {os.cpu_count()} cores"


@functools.cache
def _driver() -> str | None:
    found = gpu_query("driver_version")
    return found[0] if found else None


def gpu_query(*fields: str) -> list[str] | None:
    """What nvidia-smi says of the first GPU; ``None`` where there is no such program."""
    output = _output(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"])
    return [field.strip() for field in output.splitlines()[0].split(",")] if output else None


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
