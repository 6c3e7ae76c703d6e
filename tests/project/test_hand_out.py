"""How pytest-xdist hands out the slow tests: real time to one process, a file to one process."""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    "tests/hardware/test_hardware_zeusd.py",
    "tests/hardware/lead/test_asynchronous_scheduling.py",
    "tests/core/test_roots.py",
    "tests/core/test_markdown.py",
]


@pytest.mark.slow
def test_real_time_runs_in_one_process_and_no_file_in_two():
    words = [sys.executable, "-m", "pytest", "-v", "-n", "2", "--dist", "loadgroup", *FILES]
    words += ["-m", "not slow", "-p", "no:cacheprovider"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    ran = defaultdict(set)
    for process, file in re.findall(r"^\[(gw\d)\] .* PASSED (\S+?)::", done.stdout, re.M):
        ran[file].add(process)
    assert set(ran) == set(FILES)
    assert all(len(processes) == 1 for processes in ran.values()), ran
    assert ran[FILES[0]] == ran[FILES[1]]
    assert ran[FILES[0]] != ran[FILES[2]], "the rest waits for real time"
