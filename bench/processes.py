"""What another process of this machine has used so far: CPU time and memory.

Linux says both exactly; elsewhere `ps` does, to a hundredth of a second. The children of a process
are not counted. It only looks: starting and stopping is `bench.serving`'s.
"""

import os
import subprocess
import sys
import time
from pathlib import Path


def cpu_s(pid: int) -> float:
    """CPU seconds of all threads, those that have ended too. Raises OSError when it is gone."""
    if sys.platform == "linux":
        # What clock_getcpuclockid(3) makes: the complement of the id, and 2 for the scheduler's.
        return time.clock_gettime((~pid << 3) | 2)
    minutes, _, seconds = _ps(pid, "time").rpartition(":")
    hours, _, minutes = minutes.rpartition(":")
    return 3600 * int(hours or 0) + 60 * int(minutes or 0) + float(seconds)


def rss_bytes(pid: int) -> int:
    """Resident memory. Raises OSError when it is gone."""
    if sys.platform == "linux":
        num_pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return num_pages * os.sysconf("SC_PAGE_SIZE")
    return 1024 * int(_ps(pid, "rss"))


def _ps(pid: int, column: str) -> str:
    command = ["ps", "-o", f"{column}=", "-p", str(pid)]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if not said:
        raise ProcessLookupError(pid)
    return said
