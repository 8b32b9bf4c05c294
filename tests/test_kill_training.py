"""A few of the kills of `python -m tests.kill_training`; the full number is run by hand."""

import json
import subprocess
import sys
from pathlib import Path


def test_killed_training_loads_and_ends_bitwise_as_if_untouched():
    command = [sys.executable, "-m", "tests.kill_training", "--kills", "3", "--seed", "1"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=root)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["kills"] == 3 and result["ended_bitwise_equal"] >= 1
