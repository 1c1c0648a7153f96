"""Hooks that are taken off again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class Removable(Protocol):
    """A hook that can be taken off again."""

    def remove(self) -> None:
        """Take it off."""


@dataclass
class Undo:
    """Calls a function when removed."""

    remove: Callable[[], None]
