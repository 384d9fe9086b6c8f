"""What the tests of tuning share."""

from __future__ import annotations

import os

import pytest

from tests.tuning.builders import ROOT


@pytest.fixture(autouse=True)
def importable_workers(monkeypatch):
    """Workers import the tests' builders, from whatever directory a test runs in."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
