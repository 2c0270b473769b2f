"""Twenty thousand mutated files: each reads as it was written or is refused; none ends the process or holds it up."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

import comq_np

PROCESSES, FILES = 2, 10_000
HERE = pathlib.Path(__file__).parent


@pytest.mark.skipif(os.name != "posix", reason="no other system has these limits for a process")
def test_mutated_files(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(comq_np.__file__).parents[1])}
    running = []
    for k in range(PROCESSES):
        folder = tmp_path / str(k)
        folder.mkdir()
        command = [sys.executable, HERE / "fuzz.py", folder, str(k * FILES), str(FILES)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        running.append((folder, process))
    ends = [(folder, process.communicate(), process.returncode) for folder, process in running]
    counts = []
    for folder, (printed, errors), status in ends:
        number = (folder / "number").read_text().strip()
        assert status == 0, (
            f"status {status} at file {number}, python tests/fuzz.py FOLDER {number} 1 makes it: {errors}"
        )
        counts.append(json.loads(printed))
    total = {key: sum(count.get(key, 0) for count in counts) for key in counts[0]}
    assert total["files"] == PROCESSES * FILES >= 20_000
    for layout in ("ours", "old", "packed"):
        assert total[f"{layout} equal"] > 100, total
        assert total[f"{layout} refused"] > 1000, total
    assert max(count["kilobytes"] for count in counts) < 100_000
