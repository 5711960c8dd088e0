"""The highest memory of a process and its children in a while: `python -m benchmarks.resident PID`, until its input ends.

Read from /proc by a process of its own, for the one that is watched may hold its interpreter's lock while it writes. Anonymous
memory alone: pages of files that are mapped can be dropped at any time.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PERIOD = 0.001


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """Bytes, after the block: `before` it, and the `highest` in it, of this process and all that it starts."""
    found: dict[str, int] = {}
    command = [sys.executable, "-S", __file__, str(os.getpid())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdin is not None and reader.stdout is not None
        found["before"] = int(reader.stdout.readline())
        try:
            yield found
        finally:
            reader.stdin.close()
            found["highest"] = int(reader.stdout.readline())


def anonymous(pid: int) -> int:
    """Bytes of a process that are no file's; 0 of one that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def family(pid: int) -> Iterator[int]:
    """A process and what it started, but for this one and for any that still shows the memory of what starts it."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text(encoding="utf-8").split()
        except OSError:
            continue
        for child in children:
            if int(child) != os.getpid() and _command(int(child)) != _command(pid):
                yield from family(int(child))


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def main() -> None:
    pid = int(sys.argv[1])
    highest = sum(map(anonymous, family(pid)))
    print(highest, flush=True)
    while not select.select([sys.stdin], [], [], PERIOD)[0]:
        highest = max(highest, sum(map(anonymous, family(pid))))
    print(highest, flush=True)


if __name__ == "__main__":
    main()
