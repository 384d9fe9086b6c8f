"""Warns where every user of the machine can change code that is about to run."""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path


def warn_if_writable_by_all(path: Path, status: os.stat_result, advice: str) -> None:
    """Warn of a file that every user can write or replace.

    It is a warning: mounts without permissions, such as those of virtual machines, show all files
    so.

    Parameters
    ----------
    path : Path
    status : os.stat_result
        Of the file that was opened.
    advice : str
        What else to do than to change the mode.
    """
    if status.st_mode & stat.S_IWOTH:
        what, mode, fix = str(path), status.st_mode, f"chmod o-w {path}"
    else:
        folder = os.path.dirname(os.path.realpath(path))
        mode = os.stat(folder).st_mode
        # In a sticky directory, such as /tmp, only a file's owner replaces it.
        if not mode & stat.S_IWOTH or mode & stat.S_ISVTX:
            return
        what, fix = f"the directory of {path}", f"chmod o-w {folder}"
    warnings.warn(
        f"{what} can be written by every user (mode {stat.S_IMODE(mode):o}), and a compiled model "
        f"is code: {fix}, or {advice}",
        RuntimeWarning,
        stacklevel=3,
    )
