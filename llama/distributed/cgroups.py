"""The control groups (cgroups, version 1 and 2) that limit this process. Knows nothing of what they limit."""

from __future__ import annotations

import os
from pathlib import Path


def cgroup_folders(controller: str, root: Path) -> list[Path]:
    """Return the folders with the limits of this process's control groups, each group before its parents.

    controller: what is limited, such as "memory" or "cpu"; root: the root of the file system.
    """
    try:
        groups = os.fsdecode((root / "proc/self/cgroup").read_bytes()).splitlines()
    except OSError:
        return []
    found: list[Path] = []
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        # A container sees its own group at the top, whatever the path says.
        folders = [top / path.strip("/"), *(top / path.strip("/")).parents]
        found += folders[: folders.index(top) + 1]
    return found
