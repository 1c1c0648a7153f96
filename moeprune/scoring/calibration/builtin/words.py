"""Names, places and things that the generated samples share."""

from __future__ import annotations

from typing import Any


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words(
    "Amara Bruno Chidi Dalia Emeka Farah Goran Hana Ivo Jun Katya Liam Mei Noor Olga Priya Quentin Rosa Sven Tariq"
)
CITIES = _words(
    "Lisbon Nairobi Osaka Quito Tallinn Hanoi Leeds Bergen Cairo Denver Lyon Perth Turin Minsk Bogota Accra"
)
GOODS = _words("notebooks lamps bicycles kettles chairs radios jackets ladders clocks drills blankets helmets")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")


def pair(prompt: str, answer: str) -> dict[str, Any]:
    """A question and its answer."""
    return {"prompt": prompt, "answer": answer}
