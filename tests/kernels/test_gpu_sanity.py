"""Every public function on hardware against float64, forward and backward: the first minute on a new device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusedres import doctor

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("triton_backend")]
FUNCTIONS = [name for name in doctor.FUNCTIONS if "conv2d" not in name]  # those launch what the others do
SIZES = {8: 16, 20: 64, 7: 28, 9: 28, 48: 1024, 40: 512, 24: 256}  # of what takes two launches, for doctor's one


def enlarged(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(SIZES[size] for size in shape)


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("dtype", "large"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True)],
    ids=["bfloat16, several programs", "bfloat16, one program", "float32, several programs"],
)  # fmt: skip
def test_oracle(function, dtype, large, monkeypatch):
    if large:
        shapes = {name: enlarged(shape) for name, shape in doctor.FUNCTIONS[function].items()}
        monkeypatch.setitem(doctor.FUNCTIONS, function, shapes)
    make = doctor._tensors
    monkeypatch.setattr(doctor, "_tensors", lambda *given: {name: channels_last(t) for name, t in make(*given).items()})
    found = doctor.check(function, dtype, torch.device("cuda"))
    assert found.path == "triton" and found.problem is None, found
