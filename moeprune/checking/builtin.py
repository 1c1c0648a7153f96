"""The built-in held-out set: public-domain facts and exact answers, for models that come without data of their own.

It is enough to see a broken model, not to see small losses; the report says so.
"""

from __future__ import annotations

ARITHMETIC = [
    (2, "+", 2),
    (17, "+", 25),
    (9, "-", 4),
    (100, "-", 37),
    (6, "*", 7),
    (12, "*", 3),
    (45, "+", 55),
    (81, "-", 9),
]
FACTS = {
    "The capital of France is": " Paris",
    "The capital of Japan is": " Tokyo",
    "The chemical symbol of gold is": " Au",
    "Water freezes at a temperature of 0 degrees": " Celsius",
    "The largest planet of the solar system is": " Jupiter",
    "Romeo and Juliet was written by William": " Shakespeare",
    "The opposite of hot is": " cold",
    "The first month of the year is": " January",
    "A week has seven": " days",
    "The currency of the United Kingdom is the pound": " sterling",
}
LANGUAGES = {
    "German": ("Guten Morgen, wie geht es", " Ihnen"),
    "French": ("Bonjour, comment allez", "-vous"),
    "Spanish": ("Buenos días, ¿cómo está", " usted"),
    "Chinese": ("中华人民共和国的首都是", "北京"),
    "Russian": ("Столица России — город", " Москва"),
    "Japanese": ("日本の首都は", "東京"),
}
TOOLS = {
    'Write {"city": "Oslo"} once more, as JSON only:\n': '{"city": "Oslo"}',
    'Write {"a": 1, "b": [2, 3]} once more, as JSON only:\n': '{"a": 1, "b": [2, 3]}',
    'Call the tool get_time with the argument zone = "UTC", as JSON with "name" and "arguments":\n': (
        '{"name": "get_time", "arguments": {"zone": "UTC"}}'
    ),
}
CODE = [
    "def add(a, b):\n    return a + b\n\n\ndef mean(values):\n    return sum(values) / len(values)\n",
    "SELECT name, COUNT(*) FROM orders WHERE year = 2020 GROUP BY name ORDER BY name;\n",
    "for (int i = 0; i < n; i++) {\n    total += values[i];\n}\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n",
]
PROSE = [
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.",
    "The sun rises in the east and sets in the west, because the Earth turns on its axis once a day.",
    "All happy families are alike; each unhappy family is unhappy in its own way.",
    "A triangle whose sides have the lengths three, four and five has a right angle between the two shorter sides.",
    "Call me Ishmael. Some years ago, never mind how long precisely, I thought I would sail about a little.",
    "Bread is made of flour, water, salt and yeast; the dough has to rest before it goes into a hot oven.",
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
    "人人生而自由,在尊严和权利上一律平等。",
]


def _sum(a: int, sign: str, b: int) -> str:
    return str({"+": a + b, "-": a - b, "*": a * b}[sign])


BUILTIN: list[dict[str, str]] = [
    *({"domain": "arithmetic", "prompt": f"{a} {s} {b} =", "answer": f" {_sum(a, s, b)}"} for a, s, b in ARITHMETIC),
    *({"domain": "facts", "prompt": prompt, "answer": answer} for prompt, answer in FACTS.items()),
    *({"domain": "languages", "prompt": prompt, "answer": answer} for prompt, answer in LANGUAGES.values()),
    *({"domain": "tools", "prompt": prompt, "answer": answer} for prompt, answer in TOOLS.items()),
    *({"domain": "code", "text": text} for text in CODE),
    *({"domain": "prose", "text": text} for text in PROSE),
]
