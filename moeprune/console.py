"""What a person sees: messages, warnings and progress, all on stderr. stdout is for results alone."""

from __future__ import annotations

import os
import sys
import time

_warnings: list[str] = []


def say(text: str = "") -> None:
    """One line for the person who watches."""
    _end_progress_line()
    print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """A line that matters later too: it is printed now and kept for `warnings()`. The same text is said once."""
    if text not in _warnings:
        _warnings.append(text)
        say(f"warning: {text}")


def warnings() -> list[str]:
    """All that was warned of so far, for the summary and for the result's JSON."""
    return list(_warnings)


def size(count: float) -> str:
    """A number of bytes in decimal units, as disks and model hubs count: 9.75 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """8 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Progress:
    """One line that is rewritten on a terminal; elsewhere a plain line at most every ten seconds."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, total, 0
        self.start = self.last = time.monotonic()

    def step(self, detail: str = "", by: int = 1) -> None:
        """Count one more (or `by` more) of the total as done and show it."""
        self.done += by
        now = time.monotonic()
        finished = self.done >= self.total
        tty = sys.stderr.isatty()
        if not finished and now - self.last < (0.1 if tty else 10.0):
            return
        self.last = now
        left = (now - self.start) / self.done * (self.total - self.done)
        ending = f"{duration(now - self.start)} in all" if finished else f"{duration(left)} left"
        text = ", ".join(part for part in (f"{self.label} {self.done}/{self.total}", detail, ending) if part)
        if tty:
            _show_progress_line(text, finished)
        else:
            print(text, file=sys.stderr, flush=True)


_open_line = False


def _show_progress_line(text: str, finished: bool) -> None:
    """A line that is wider than the terminal would wrap, and could not be rewritten; its end is left out."""
    global _open_line
    width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
    shown = text if finished or len(text) < width else text[: width - 2] + "…"
    sys.stderr.write(f"\r\x1b[K{shown}" + ("\n" if finished else ""))
    sys.stderr.flush()
    _open_line = not finished


def _end_progress_line() -> None:
    global _open_line
    if _open_line:
        sys.stderr.write("\n")
        _open_line = False
