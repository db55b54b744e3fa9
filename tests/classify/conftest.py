from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _quick(no_curves: None) -> None:
    """For every test, but not for what tests of a module share."""
