"""The tests of a GPU, which are skipped without one: that they can be set up is known before a card is lent."""

import os
import subprocess
import sys
from pathlib import Path


def test_every_fixture_of_theirs_exists():
    environment = {**os.environ, "DDO_TEST_DEVICE": "cpu", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "--setup-plan", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    found = subprocess.run(
        command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    assert "test_gpu_training.py::test_a_round_of_ddo" in found.stdout
