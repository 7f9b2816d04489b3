"""Runs a command no longer than the process that wants it: `python keeper.py PARENT GRACE COMMAND...`.

In: the parent's id, seconds between TERM and KILL, a command. Out: its exit status (127: not found).
Not here: whether the command works. Standard library only, so it starts at once.

A parent that is ended by kill -9 cleans nothing up, and a server left behind would keep its GPU. The
kernel's parent-death signal alone does not do: it reaches one process, while a server has workers, and
it fires when the *thread* that started the server ends. So this process stands between the two. The
command leads a process group of its own; the group is ended when the parent is gone, when this process
gets TERM, or when the command itself has ended and left workers behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
TICK_SECONDS = 0.05


def main(arguments: list[str]) -> int:
    parent, grace_seconds, command = int(arguments[0]), float(arguments[1]), arguments[2:]
    asked: list[int] = []

    def ask(number: int, _: FrameType | None) -> None:
        asked.append(number)

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # workers of a dead server become ours to reap
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_lead_a_group)
    except OSError as error:
        print(f"{command[0]}: {error.strerror or error}", file=sys.stderr, flush=True)
        return 127
    group, status = child.pid, None
    while status is None and not asked and os.getppid() == parent:
        time.sleep(TICK_SECONDS)
        status = _reap(group, status)
    for number, seconds in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, 5.0)):
        until = time.monotonic() + seconds
        if not _signal(group, number):
            break
        while _signal(group, 0) and time.monotonic() < until:
            time.sleep(TICK_SECONDS)
            status = _reap(group, status)
    return 0 if status is None else status if status >= 0 else 128 - status


def _lead_a_group() -> None:
    """In the command's process: a group of its own, and death with the keeper, which has one thread only."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _signal(group: int, number: int) -> bool:
    """Send a signal to the group; False when nobody is left in it."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _reap(pid: int, status: int | None) -> int | None:
    """Bury every dead child; the exit status of `pid` once it is known."""
    with contextlib.suppress(ChildProcessError):
        while True:
            dead, ended = os.waitpid(-1, os.WNOHANG)
            if dead == 0:
                break
            if dead == pid:
                status = os.waitstatus_to_exitcode(ended)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
