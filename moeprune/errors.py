"""Every way a stage can end: the exception class is the exit code, and one wrapper turns it into one line."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn


class StageError(Exception):
    """An expected end of a stage; the message says what is wrong, where, and what to do."""

    exit_code = 1


def reason(error: BaseException) -> str:
    """The first line of what an error says, or its name."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class UsageError(StageError):
    """Something wrong was asked for; another flag or setting mends it."""

    exit_code = 2


class InputError(StageError):
    """The input cannot be used: missing, damaged, hostile, or of an unknown kind."""

    exit_code = 3


class MachineError(StageError):
    """This machine cannot do it: memory, disk, network, or a program that is not there."""

    exit_code = 4


class ResultError(StageError):
    """The result is wrong: the verification or a quality gate failed."""

    exit_code = 5


class Interrupted(BaseException):
    """SIGTERM arrived. Not an Exception, so that nothing on the way swallows it."""


OUT_OF_MEMORY = {"OutOfMemoryError", "AcceleratorError"}  # torch's own classes, named so that torch is not imported
FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
UNFIT_PLACE = {errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EIO}


def run(stage: Callable[[list[str]], None]) -> NoReturn:
    """Run a stage with the command line and leave with its exit code; expected ends print one line on stderr."""
    _in_utf8()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        _refuse_names_that_are_not_utf8()
        stage(sys.argv[1:])
        print(end="", flush=True)  # sys.stdout is None where it was closed
        code = 0
    except BrokenPipeError:
        # The reader left; flushing at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (Exception, KeyboardInterrupt, Interrupted) as error:  # noqa: BLE001 - the one place that catches all
        code = _report(error)
    sys.exit(code)


def _in_utf8() -> None:
    """Where the locale is another one, begin again in UTF-8 mode: names, data and results are UTF-8 everywhere."""
    if sys.getfilesystemencoding() != "utf-8":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # PYTHONIOENCODING may still name another one


def _refuse_names_that_are_not_utf8() -> None:
    """They could be opened, but not written into a result's JSON."""
    settings = {f"the value of {name}": text for name, text in os.environ.items() if name.startswith("REAP_")}
    for what, text in {**{ascii(text): text for text in (*sys.argv[1:], str(Path.cwd()))}, **settings}.items():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{what} is not UTF-8; rename the file or folder") from None


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise Interrupted


def _report(error: BaseException) -> int:
    """Print what ended the stage and return its exit code."""
    message, code = _explain(error)
    if code == 1:
        traceback.print_exception(error)
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _explain(error: BaseException) -> tuple[str, int]:
    if isinstance(error, StageError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; run the same command again to go on", 130
    if isinstance(error, Interrupted):
        return "stopped by SIGTERM; run the same command again to go on", 143
    if isinstance(error, MemoryError) or type(error).__name__ in OUT_OF_MEMORY:
        return f"out of memory: {error}; lower REAP_BATCH_SIZE or REAP_MAX_SEQ_LEN", MachineError.exit_code
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        where = f" at {error.filename}" if error.filename else ""
        return (
            f"no space left on the disk{where}; free some space and run the same command again",
            MachineError.exit_code,
        )
    if isinstance(error, PermissionError):
        return f"not permitted: {error.filename}; check who owns it", MachineError.exit_code
    if isinstance(error, OSError) and error.errno in UNFIT_PLACE and error.filename:
        return f"{error.strerror}: {error.filename}; name another place or mend this one", MachineError.exit_code
    return f"{type(error).__name__}: {error}; this is a bug in moeprune, please report it with the lines above", 1
