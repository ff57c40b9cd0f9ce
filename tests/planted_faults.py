"""Faults that the quick suite must notice: each is planted in a copy of the tree, where its tests have to fail.

``python -m tests.planted_faults`` plants all of them, or those whose names have one of its arguments in them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", "build", "dist", "gpu-out")


class Fault(NamedTuple):
    """``old``, which stands once in ``file``, becomes ``new``; ``tests`` are pytest's arguments."""

    name: str
    file: str
    old: str
    new: str
    tests: Sequence[str]


_COMMON, _STATISTICS, _BACKWARD = (
    f"fusedres/kernels/{name}.py" for name in ("_common", "batch_norm_statistics", "batch_norm_backward")
)
_BATCH_NORM, _ADD, _CONV, _HEAD, _JOIN, _POOL, _LINEAR = (
    f"tests/functional/test_{name}.py"
    for name in (
        "batch_norm_act", "add_batch_norm_act", "batch_norm_conv", "batch_norm_head", "batch_norm_join",
        "batch_norm_pool", "layer_norm_linear",
    )
)  # fmt: skip
_TRAFFIC = "tests/benchmarks/test_traffic.py"
_CODEGEN = "tests/kernels/test_codegen.py"

FAULTS = [
    Fault(
        "an extra pass over memory",
        _COMMON,
        "    x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)\n    if ADD:",
        "    x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)\n"
        "    x += 0 * tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)\n    if ADD:",
        [_TRAFFIC, "-k", "test_budget and batch_norm_act and 67"],
    ),
    Fault(
        "a load without its mask",
        _COMMON,
        "tl.load(vector_ptr + offsets, mask=mask, other=0.0)",
        "tl.load(vector_ptr + offsets)",
        [_TRAFFIC, "-k", "test_budget and linear and 175"],
    ),
    Fault(
        "a store without its mask",
        _STATISTICS,
        "tl.store(partials_ptr + pid_m * C + offs_c, mean_c, mask=mask_c)",
        "tl.store(partials_ptr + pid_m * C + offs_c, mean_c)",
        [_BATCH_NORM, "-k", "test_shapes"],
    ),
    Fault(
        "a mask of one row too many",
        _STATISTICS,
        "mask_m = (row0 + tl.arange(0, BLOCK_M) < M)[:, None]",
        "mask_m = (row0 + tl.arange(0, BLOCK_M) <= M)[:, None]",
        [_BATCH_NORM, "-k", "test_shapes"],
    ),
    Fault(
        "addresses in 32 bits",
        _COMMON,
        "base = row0 * C",
        "base = (row0 * C).to(tl.int32)",
        [_CODEGEN, "-k", "test_telling_kernels and sm_80"],
    ),
    Fault(
        "no barrier before the arrival",
        _COMMON,
        "    tl.debug_barrier()\n    return tl.atomic_add(counter_ptr, 1",
        "    return tl.atomic_add(counter_ptr, 1",
        [_CODEGEN, "-k", "test_telling_kernels and sm_80"],
    ),
    Fault(
        "E[x²] − E[x]²",
        _COMMON,
        "return mean_c, _average(m2 + spread * (count * spread), count, total)",
        "return mean_c, _average(m2 + mean * (count * mean), count, total) - mean_c * mean_c",
        [_BATCH_NORM, "-k", "test_large_mean"],
    ),
    Fault(
        "a running variance without Bessel's correction",
        _STATISTICS,
        "unbiased = var * (M.to(tl.float32) / (M - 1).to(tl.float32))",
        "unbiased = var",
        [_BATCH_NORM, "-k", "test_momentum"],
    ),
    Fault(
        "NaN is swallowed by the ReLU",
        _COMMON,
        "return (z.to(dtype).to(tl.float32) <= 0) == 0",
        "return z.to(dtype).to(tl.float32) > 0",
        [_BATCH_NORM, "-k", "test_not_finite"],
    ),
    Fault(
        "mask bits in another order",
        _COMMON,
        "bits = (packed.to(tl.int32)[:, None, :] >> shift) & 1",
        "bits = (packed.to(tl.int32)[:, None, :] >> (7 - shift)) & 1",
        [_BATCH_NORM, "-k", "test_oracle"],
    ),
    Fault(
        "the gradient of the sum is lost",
        _BACKWARD,
        "dx += ds.to(tl.float32)",
        "dx += 0 * ds.to(tl.float32)",
        [_ADD, "-k", "test_oracle"],
    ),
    Fault(
        "the second reader's gradient is lost",
        "fusedres/kernels/batch_norm_join_backward.py",
        "g += tl.load(dfork_ptr",
        "g += 0 * tl.load(dfork_ptr",
        [_JOIN, "-k", "test_oracle"],
    ),
    Fault(
        "a term of the gradient is left out",
        _BACKWARD,
        "dx = scale[None, :] * (g - mean_g[None, :] - x_centred * mean_gx[None, :])\n"
        "        if other_ptr is not None and not FORK:\n            dx += tl.load",
        "dx = scale[None, :] * (g - mean_g[None, :])\n"
        "        if other_ptr is not None and not FORK:\n            dx += tl.load",
        [_BATCH_NORM, "-k", "test_parameters_and_dtypes"],
    ),
    Fault(
        "the last of equal maxima wins",
        "fusedres/kernels/batch_norm_pool.py",
        "better = (z > best) | (z != z)",
        "better = (z >= best) | (z != z)",
        [_POOL, "-k", "test_ties_padding_and_nan"],
    ),
    Fault(
        "padding counts in LayerNorm's mean",
        _COMMON,
        "mean += tl.sum(tl.where(mask_n[None, :], z - mean[:, None], 0.0), axis=1) / total",
        "mean += tl.sum(z - mean[:, None], axis=1) / total",
        [_LINEAR, "-k", "test_constant_rows"],
    ),
    Fault(
        "ranks exchange variances for sums of squares",
        _STATISTICS,
        "tl.store(stats_ptr + C + offs_c, var_c * rows, mask=mask_c)",
        "tl.store(stats_ptr + C + offs_c, var_c, mask=mask_c)",
        ["tests/distributed/test_sync_batch_norm.py", "-k", "test_as_one_process"],
    ),
    Fault(
        "the backward keeps an activation",
        "fusedres/ops/batch_norm_family.py",
        "        ctx.save_for_backward(*family.saved(inputs, outputs, needs))",
        "        ctx.save_for_backward(*family.saved(inputs, outputs, needs))\n        ctx.kept = inputs[0].clone()",
        [_CONV, "-k", "test_saved_for_backward"],
    ),
    Fault(
        "a key of the state_dict is new",
        "fusedres/nn/batch_norm.py",
        "    module.act = act\n    return module",
        '    module.act = act\n    module.register_buffer("act_scale", torch.ones(()))\n    return module',
        ["tests/nn"],
    ),
    Fault(
        "an addition is not fused",
        "fusedres/fusion/patterns.py",
        "residual = self.residual(chain.reader, chain.last)",
        "residual = None",
        ["tests/fusion/test_fuse.py", "-k", "patterns_are_found"],
    ),
    Fault(
        "a layer with hooks is fused",
        "fusedres/fusion/refusals.py",
        """    if is_hooked(layer):
        return "it has hooks"
""",
        "",
        ["tests/fusion/test_fuse_changes.py", "-k", "hook"],
    ),
    Fault(
        "hooks put on later are not noticed",
        "fusedres/fusion/code.py",
        "if any(self.hooks):",
        "if any(()):",
        ["tests/fusion/test_fuse_changes.py", "-k", "hook"],
    ),
    Fault(
        "a value that is changed in place is read later",
        "fusedres/fusion/patterns.py",
        'if changes == "residual" and not self.is_spare(residual, add):',
        "if False:",
        ["tests/fusion/test_fuse_traps.py"],
    ),
    Fault(
        "the reference takes a maximum for the average",
        "fusedres/reference.py",
        "return F.adaptive_avg_pool2d(out, 1)",
        "return F.adaptive_max_pool2d(out, 1)",
        [_HEAD, "-k", "test_oracle"],
    ),
]  # fmt: skip


def verdict(fault: Fault, tree: Path) -> str:
    """What the tests of ``fault`` say in ``tree``, a copy, which is as before afterwards; "caught" is right."""
    path = tree / fault.file
    text = path.read_text()
    path.write_text(text.replace(fault.old, fault.new))
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *fault.tests],
            cwd=tree, env=environment, capture_output=True, text=True,
        )  # fmt: skip
    finally:
        path.write_text(text)
    if done.returncode == 1 and "\nFAILED " in done.stdout:
        return "caught"
    return "MISSED" if done.returncode == 0 else f"pytest ended with {done.returncode}\n{done.stdout[-2000:]}"


def main(names: Sequence[str]) -> int:
    faults = [fault for fault in FAULTS if not names or any(name in fault.name for name in names)]
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        shutil.copytree(ROOT, tree, symlinks=True, ignore=LEFT_OUT)
        for fault in faults:
            start = time.monotonic()
            found = verdict(fault, tree)
            missed += found != "caught"
            print(f"{fault.name:50} {time.monotonic() - start:5.0f} s  {found}", flush=True)
    print(f"{len(faults) - missed} of {len(faults)} faults caught")
    return int(missed > 0 or not faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
