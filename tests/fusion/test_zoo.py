"""Networks of torchvision and timm: their BatchNorms run through fusedres, and compute what they computed.

``--slow`` takes every network of those families, as its library builds it; otherwise small ones stand for them.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusedres
from tests import zoo_public
from tests.zoo_public import SMALL, Entry


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "entry" in metafunc.fixturenames:
        entries = zoo_public.full() if metafunc.config.getoption("--slow") else SMALL
        metafunc.parametrize("entry", entries.values(), ids=entries.keys())


def test_every_batch_norm_is_ours_and_results_are_eagers(entry: Entry, monkeypatch):
    monkeypatch.setenv("FUSEDRES_BACKEND", "reference")
    model = entry.build().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # not 1 and 0, the last of a block least of all
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    x = torch.randn(2, 3, entry.size, entry.size, dtype=torch.float64)
    with zoo_public.counted_calls() as before:
        expected = zoo_public.step(model, x)
    keys = list(model.state_dict())
    fusedres.fuse(model)
    with zoo_public.counted_calls() as calls:
        actual = zoo_public.step(model, x)
    assert calls.ours == calls.all == before.all > 0
    assert list(model.state_dict()) == keys
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name] - value).abs().max() if value.numel() else 0
        assert error <= 1e-8 * value.abs().max(), name
