"""How fast llama.cpp runs a GGUF file, and in how much memory: `python benchmarks/edge_probe.py FILE`, for one process.

Prints JSON: tokens `read` and `written` in a second of a core's time, which other processes do not take a share of, and
`added_bytes`, by how much the process's memory grew at its most.
"""

import json
import sys
import time
from pathlib import Path

from tests.llama import Llama

READ, WRITTEN = 128, 24


def main() -> None:
    """Runs the file on one thread."""
    before = memory("VmRSS")
    with Llama(Path(sys.argv[1])) as llama:
        start = time.thread_time()
        llama.read([5 + index for index in range(READ)])
        read = READ / (time.thread_time() - start)
        start = time.thread_time()
        for index in range(WRITTEN):
            llama.read([7 + index], READ + index)
        written = WRITTEN / (time.thread_time() - start)
    print(json.dumps({"read": read, "written": written, "added_bytes": memory("VmHWM") - before}))


def memory(name: str) -> int:
    """Bytes of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


if __name__ == "__main__":
    main()
