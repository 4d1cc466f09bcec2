"""One process at a time writes a result: a lock that ends with its process, however that ends.

A stage can outlive the command that started it, for instance where only its launcher was killed. A second start would then
write between its files and remove its checkpoints.

Locks are files in the system's temporary folder, so they guard against a second start on the same machine. Where that
folder cannot be written, or the system has no `flock`, there is no lock.
"""

import contextlib
import hashlib
import os
import tempfile
import time
from pathlib import Path

from minionerec.common.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_HELD: dict[Path, int] = {}  # lock file -> its descriptor, in this process


def hold(path: Path, seconds: float = 5.0) -> None:
    """Hold the lock of the record `path` until `release` or the end of this process.

    Waits up to `seconds`: a process that was just killed may need a moment to end. Raises `UserError` naming the process
    that holds it.
    """
    file = _file_of(path)
    if fcntl is None or file in _HELD:
        return
    end = time.monotonic() + seconds
    with contextlib.suppress(OSError):
        file.parent.mkdir(mode=0o700, exist_ok=True)
        while not _lock(file):
            if time.monotonic() > end:
                owner = file.read_text().strip()
                raise UserError(
                    f"{path}: process {owner} is still writing this result; wait for it, or end it (kill {owner}) and "
                    "start again"
                )
            time.sleep(0.1)


def release(path: Path) -> None:
    """Give the lock back, if this process holds it."""
    file = _file_of(path)
    if file in _HELD:
        file.unlink(missing_ok=True)
        os.close(_HELD.pop(file))


def _lock(file: Path) -> bool:
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(file).st_ino == os.fstat(descriptor).st_ino:  # else its holder has just removed the file
            os.truncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
            _HELD[file] = descriptor
            return True
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return False


def _file_of(path: Path) -> Path:
    name = hashlib.blake2b(str(Path(path).resolve()).encode(), digest_size=16).hexdigest()
    user = os.getuid() if hasattr(os, "getuid") else ""
    return Path(tempfile.gettempdir()) / f"minionerec-{user}" / name


def _forget() -> None:
    """In a forked child, which must not keep the lock of a parent that ends."""
    for descriptor in _HELD.values():
        os.close(descriptor)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
