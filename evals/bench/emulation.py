"""Whether this process runs on the processor that it seems to run on.

In: the running system. Out: a reason why times are no device's speed, or None. Not here: virtual machines,
which are slower by little (`evals/bench/device.py` names them).

An emulator of single programs (qemu-user, Rosetta: what runs Arm containers on a PC) shows a process its own
program at /proc/self/exe; to another process it is the emulator. So another process is asked.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess

EMULATORS = (
    *("qemu-", "rosetta", "box64", "box86", "FEXInterpreter", "FEXLoader"),
    *("houdini", "ndk_translation"),  # Arm programs on Android for x86
)
"""How the file names of their programs begin."""


def emulated_why() -> str | None:
    """Why times taken here say nothing of a device's speed; None where nothing of the kind is seen."""
    return reason(_program_of(os.getpid()), platform.machine())


def reason(program: str, machine: str) -> str | None:
    """The same of a process whose program has this file name, for code of this machine."""
    if any(program.startswith(known) for known in EMULATORS):
        return (
            f"{machine} code runs in {program}: this shows that it works and what it computes, not how fast"
        )
    return None


def _program_of(pid: int) -> str:
    """File name of a process's program, as another process sees it; empty where that cannot be known."""
    readlink = shutil.which("readlink")
    if readlink is None:
        return ""
    done = subprocess.run([readlink, f"/proc/{pid}/exe"], capture_output=True, text=True)
    return done.stdout.strip().rpartition("/")[2]
