"""The `.env` file: only lines that every program reads the same way."""

from __future__ import annotations

import re
from pathlib import Path

from moeprune.errors import UsageError

# A shell, `docker run --env-file`, compose and python-dotenv disagree about quotes, inline comments, spaces and $.
# This is the part of the syntax that all four read the same way.
DOTENV_LINE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[^\s\"'$`\\#]*")


def read_dotenv(path: Path) -> dict[str, str]:
    """The names and values of an `.env` file; a line that programs would read differently is refused."""
    if not path.exists():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} cannot be read as text ({error}); make it a UTF-8 file such as .env.example"
        ) from None
    if lines and lines[0].startswith("\ufeff"):
        raise UsageError(f"{path} begins with a byte order mark; save it as UTF-8 without one")
    for at, line in enumerate(lines, start=1):
        if line.strip() and not line.startswith("#") and not DOTENV_LINE.fullmatch(line):
            raise UsageError(f"{path}:{at}: write NAME=value, without quotes, spaces, $ or a comment behind it")
    try:
        from dotenv import dotenv_values
    except ModuleNotFoundError:  # doctor and serve run before the set-up; any reader agrees on the lines that got here
        pairs = (line.split("=", 1) for line in lines if line.strip() and not line.startswith("#"))
        return {name: value for name, value in pairs if value}
    return {name: value for name, value in dotenv_values(path, interpolate=False).items() if value}
