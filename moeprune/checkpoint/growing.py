"""A file that grows by pieces of others: large ones pass inside the kernel where it can, a buffer takes the rest."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import BinaryIO

from moeprune.errors import InputError

STEP = 16 << 20  # bytes per system call
BUFFER = 1 << 20  # stays in the processor's cache
PAGE = 4096
CANNOT_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}


class Growing:
    """The end of a growing file. Small pieces gather in a buffer; long ones pass from file to file in the kernel.

    The kernel hands on whole pages cheaply. Where pieces are small, or lie otherwise within their pages than they did,
    a buffer takes three quarters of its time.
    """

    def __init__(self, out: BinaryIO, go_on: Callable[[], None]) -> None:
        self.out, self.go_on = out, go_on
        self.buffer, self.held, self.at = memoryview(bytearray(BUFFER)), 0, 0
        self.kernel_copies = hasattr(os, "copy_file_range")

    def write(self, content: bytes) -> None:
        """Append bytes that are in memory."""
        self.flush()
        self._put(memoryview(content))
        self.at += len(content)

    def copy(self, source: BinaryIO, start: int, end: int) -> None:
        """Append bytes `start` to `end` of another file."""
        for step in range(start, end, STEP):
            self._copy_step(source, step, min(end, step + STEP))

    def _copy_step(self, source: BinaryIO, start: int, end: int) -> None:
        if hasattr(os, "posix_fadvise"):  # read ahead as one: what is not in memory comes 1.4 times as fast
            os.posix_fadvise(source.fileno(), start, end - start, os.POSIX_FADV_WILLNEED)
        if self.kernel_copies and end - start >= BUFFER and (start - self.at) % PAGE == 0:
            self.flush()
            start = self._copy_in_kernel(source, start, end)
        while start < end:
            self.go_on()
            done = os.preadv(source.fileno(), [self.buffer[self.held :][: end - start]], start)
            self.held += _some(done, source, start, end)
            start, self.at = start + done, self.at + done
            if self.held == BUFFER:
                self.flush()

    def _copy_in_kernel(self, source: BinaryIO, start: int, end: int) -> int:
        """As much of the range as the file systems copy by themselves; gives where they stopped."""
        while start < end:
            self.go_on()
            try:
                done = os.copy_file_range(source.fileno(), self.out.fileno(), end - start, offset_src=start)
            except OSError as error:
                if error.errno not in CANNOT_COPY:
                    raise
                self.kernel_copies = False
                break
            start += _some(done, source, start, end)
            self.at += done
        return start

    def flush(self) -> None:
        """Write what has gathered."""
        self._put(self.buffer[: self.held])
        self.held = 0

    def _put(self, rest: memoryview) -> None:
        """An unbuffered write may take only a part; the next one then says why."""
        while rest:
            rest = rest[self.out.write(rest) :]


def _some(count: int, source: BinaryIO, start: int, end: int) -> int:
    """A number of bytes read, which must not be zero."""
    if count == 0:
        raise InputError(f"{source.name} ends at byte {start:,}, before byte {end:,}; it was cut while it was read")
    return count
