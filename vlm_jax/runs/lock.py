"""One process at a time in a run folder."""

import os
import weakref
from pathlib import Path

from vlm_jax.errors import UserError, unwritten

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps a second process out
    fcntl = None


#: The file that a process locks while it works in a folder.
LOCK = ".lock"


class Lock:
    """The lock of a run folder. It is released when nothing refers to it any more, or when the process ends, even when
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
        """Takes the lock of a folder, which is made where there is none. A process that holds it gets it again."""
        path = folder / LOCK
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if path.exists() and (ours := _HELD.get(_identity(path))) is not None:
                return ours
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
