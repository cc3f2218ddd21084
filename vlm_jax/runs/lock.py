"""A lock that keeps other processes out of a run folder."""

import os
import weakref
from pathlib import Path

from vlm_jax.errors import UserError, unwritten

try:
    import fcntl
except ImportError:  # Windows has no such locks, so a second process is not kept out
    fcntl = None


#: The file that a process locks while it works in a folder.
LOCK = ".lock"


class Lock:
    """The lock of a run folder. It is released when no variable refers to it any more, and when the process ends or is
    killed."""

    def __init__(self, path: Path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, handle)
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError:  # a file system that has no locks
                pass

    @staticmethod
    def take(folder: Path) -> "Lock":
        """Takes the lock of a folder. A folder that does not exist is made. A process that holds the lock already gets
        the same lock again.

        Raises:
            UserError: if another process holds the lock, or if the folder cannot be written to.
        """
        path = folder / LOCK
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if path.exists() and (held := _HELD.get(_identity(path))) is not None:
                return held
            lock = Lock(path)
        except BlockingIOError:
            raise UserError(f"another process is at work in {folder}: let it end or choose another --out") from None
        except OSError as error:
            raise unwritten(path, error) from None
        _HELD[_identity(path)] = lock
        return lock


#: The locks that this process holds, by device and inode of their files. Two runs of one folder share a lock.
_HELD: weakref.WeakValueDictionary[tuple[int, int], Lock] = weakref.WeakValueDictionary()


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
