"""Finds the worker processes of a Ray of our own, to kill one; and has work that they cannot find."""

import os
from pathlib import Path


def answer(shared: None, call: int) -> int:
    """Work in a module that Ray's workers do not find."""
    return call


def busy_workers() -> list[int]:
    """Return the ids of the processes under this one that run a job, by the name that Ray gives them."""
    return [pid for pid in descendants(os.getpid()) if name(pid).startswith("ray::_attempt_there")]


def descendants(root: int) -> list[int]:
    """Return the ids of all processes under `root`."""
    parents = {int(each.name): parent(each) for each in Path("/proc").iterdir() if each.name.isdecimal()}
    found = {root}
    while grown := {pid for pid, above in parents.items() if above in found} - found:
        found |= grown
    return sorted(found - {root})


def parent(process: Path) -> int | None:
    """Return the id of a process's parent, None when it has just ended."""
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def name(pid: int) -> str:
    """Return what a process calls itself, nothing when it has just ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
