"""Kills, full disks and I/O errors at the file operations of whole commands; see `faults/campaign.py`."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parent / "faults" / "campaign.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler")
@pytest.mark.parametrize("options", [("--fault", "kill", "--at", "random", "--count", "1")])
def test_every_command_ends_as_undisturbed(options):
    done = subprocess.run([sys.executable, CAMPAIGN, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
