"""The list of planted faults still fits the sources; ``make faults`` plants them."""

from __future__ import annotations

import pytest

from tests.planted_faults import FAULTS, ROOT, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_can_be_planted(fault: Fault) -> None:
    assert (ROOT / fault.file).read_text().count(fault.old) == 1
    assert fault.new != fault.old
    assert (ROOT / fault.tests[0]).exists()


def test_names_are_different() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
