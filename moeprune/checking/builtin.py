"""The built-in held-out set, for models that come without data of their own: written for this project, but for
proverbs and the first lines of old books, which are in the public domain.

Enough to see a broken model and a doubled loop rate; small losses need data of the kind that the model is used for.
"""

from __future__ import annotations

from moeprune.checking import asked

CAPITALS = {
    "Austria": "Vienna", "Australia": "Canberra", "Brazil": "Brasília", "Canada": "Ottawa", "Chile": "Santiago",
    "China": "Beijing", "Cuba": "Havana", "Denmark": "Copenhagen", "Egypt": "Cairo", "Finland": "Helsinki",
    "France": "Paris", "Germany": "Berlin", "Greece": "Athens", "Hungary": "Budapest", "Iceland": "Reykjavik",
    "India": "New Delhi", "Iran": "Tehran", "Ireland": "Dublin", "Italy": "Rome", "Japan": "Tokyo", "Kenya": "Nairobi",
    "Mexico": "Mexico City", "Nepal": "Kathmandu", "Norway": "Oslo", "Peru": "Lima", "Poland": "Warsaw",
    "Portugal": "Lisbon", "Russia": "Moscow", "Spain": "Madrid", "Sweden": "Stockholm", "Thailand": "Bangkok",
    "Turkey": "Ankara", "Ukraine": "Kyiv", "Vietnam": "Hanoi",
}  # fmt: skip
SYMBOLS = {
    "gold": "Au", "silver": "Ag", "iron": "Fe", "copper": "Cu", "lead": "Pb", "sodium": "Na", "potassium": "K",
    "helium": "He", "carbon": "C", "oxygen": "O", "hydrogen": "H", "nitrogen": "N", "calcium": "Ca", "tin": "Sn",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "up": "down", "early": "late", "rich": "poor", "full": "empty", "old": "young", "wet": "dry",
    "open": "closed", "heavy": "light", "north": "south", "day": "night", "loud": "quiet", "left": "right",
}  # fmt: skip
FACTS = {
    **{f"The capital of {country} is": f" {city}" for country, city in CAPITALS.items()},
    **{f"The chemical symbol of {element} is": f" {symbol}" for element, symbol in SYMBOLS.items()},
    **{f"The opposite of {word} is": f" {other}" for word, other in OPPOSITES.items()},
    "Water freezes at a temperature of 0 degrees": " Celsius",
    "The largest planet of the solar system is": " Jupiter",
    "Romeo and Juliet was written by William": " Shakespeare",
    "The first month of the year is": " January",
    "A week has seven": " days",
    "The currency of the United Kingdom is the pound": " sterling",
    "The tallest mountain on Earth is Mount": " Everest",
    "The theory of relativity was published by Albert": " Einstein",
    "A spider has eight": " legs",
    "The Eiffel Tower stands in": " Paris",
    "The planet closest to the sun is": " Mercury",
    "The frozen form of water is called": " ice",
}
LANGUAGES = {
    "Guten Morgen, wie geht es": " Ihnen",
    "eins, zwei, drei, vier,": " fünf",
    "Montag, Dienstag, Mittwoch,": " Donnerstag",
    "Die Hauptstadt von Frankreich ist": " Paris",
    "Morgenstund hat Gold im": " Mund",
    "Bonjour, comment allez": "-vous",
    "un, deux, trois, quatre,": " cinq",
    "lundi, mardi, mercredi,": " jeudi",
    "La capitale de l'Allemagne est": " Berlin",
    "Buenos días, ¿cómo está": " usted",
    "uno, dos, tres, cuatro,": " cinco",
    "lunes, martes, miércoles,": " jueves",
    "La capital de Italia es": " Roma",
    "uno, due, tre, quattro,": " cinque",
    "lunedì, martedì, mercoledì,": " giovedì",
    "um, dois, três, quatro,": " cinco",
    "A capital de Portugal é": " Lisboa",
    "中华人民共和国的首都是": "北京",
    "一、二、三、四、": "五",
    "星期一、星期二、星期三、": "星期四",
    "Столица России — город": " Москва",
    "один, два, три, четыре,": " пять",
    "日本の首都は": "東京",
    "일, 이, 삼, 사,": " 오",
}
CODE = [
    "def add(a, b):\n    return a + b\n\n\ndef mean(values):\n    return sum(values) / len(values)\n",
    "SELECT name, COUNT(*) FROM orders WHERE year = 2020 GROUP BY name ORDER BY name;\n",
    "for (int i = 0; i < n; i++) {\n    total += values[i];\n}\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
    "        self.items.append(item)\n\n    def pop(self):\n        return self.items.pop()\n",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
    "def is_prime(n):\n    if n < 2:\n        return False\n    for d in range(2, int(n ** 0.5) + 1):\n"
    "        if n % d == 0:\n            return False\n    return True\n",
    "function area(width, height) {\n  return width * height;\n}\n\nconsole.log(area(3, 4));\n",
    'fn main() {\n    let names = vec!["Ada", "Grace"];\n    for name in &names {\n        println!("{name}");\n'
    "    }\n}\n",
    '#!/bin/sh\nset -e\nfor file in *.txt; do\n    wc -l "$file"\ndone\n',
    "<ul>\n  <li>One</li>\n  <li>Two</li>\n  <li>Three</li>\n</ul>\n",
    "CREATE TABLE books (\n    id INTEGER PRIMARY KEY,\n    title TEXT NOT NULL,\n    year INTEGER\n);\n",
    "public static int max(int a, int b) {\n    return a > b ? a : b;\n}\n",
    'import json\n\nwith open("settings.json") as file:\n    settings = json.load(file)\nprint(settings["name"])\n',
    "int gcd(int a, int b) {\n    while (b != 0) {\n        int rest = a % b;\n        a = b;\n        b = rest;\n"
    "    }\n    return a;\n}\n",
]
PROSE = [
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.",
    "The sun rises in the east and sets in the west, because the Earth turns on its axis once a day.",
    "All happy families are alike; each unhappy family is unhappy in its own way.",
    "A triangle whose sides have the lengths three, four and five has a right angle between the two shorter sides.",
    "Call me Ishmael. Some years ago, never mind how long precisely, I thought I would sail about a little.",
    "Bread is made of flour, water, salt and yeast; the dough has to rest before it goes into a hot oven.",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife.",
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do.",
    "You will rejoice to hear that no disaster has accompanied the commencement of an enterprise which you have "
    "regarded with such evil forebodings.",
    "The station master looked at his watch, then down the empty track, and decided to wait another minute.",
    "When the snow had melted, the farmer found his ladder exactly where he had left it in November.",
    "Sound travels faster through water than through air, because water is harder to compress.",
    "The committee met on Tuesday, heard both sides, and put the decision off until the spring.",
    "Add the onions to the pan, lower the heat, and stir now and then until they are soft and golden.",
    "A map leaves most things out; what it keeps is what its maker thought a traveller would ask for.",
    "The patient reports a dry cough for five days, without fever; both lungs are clear.",
    "Shares of the company fell by four percent after it lowered its forecast for the second half of the year.",
    "A stitch in time saves nine. Too many cooks spoil the broth. All that glitters is not gold.",
    "The tenant shall return the keys on the day on which the lease ends, and shall leave the rooms swept.",
    "Photosynthesis turns carbon dioxide and water into sugar and oxygen, with the light of the sun as its fuel.",
    "If you have lost your card, call the number on the back of your last statement; the card is blocked at once.",
    "Heavy rain is expected in the north tonight, easing by morning, with a light wind from the west.",
]
TRANSLATED = [
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
    "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti.",
    "Todos os seres humanos nascem livres e iguais em dignidade e em direitos.",
    "人人生而自由,在尊严和权利上一律平等。",
    "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "Gestern Abend hat es so stark geregnet, dass der Bach über die Wiese lief.",
    "Le facteur passe chaque matin vers neuf heures, sauf le dimanche.",
    "El tren de las ocho sale siempre del andén número tres.",
]


def _answered(domain: str, pairs: dict[str, str]) -> list[dict[str, str]]:
    return [{"domain": domain, "prompt": prompt, "answer": answer} for prompt, answer in pairs.items()]


def _texts(domain: str, texts: list[str]) -> list[dict[str, str]]:
    return [{"domain": domain, "text": text} for text in texts]


BUILTIN: list[dict[str, str]] = [
    *_answered("facts", FACTS),
    *_answered("languages", LANGUAGES),
    *asked.entries(),
    *_texts("code", CODE),
    *_texts("prose", PROSE),
    *_texts("other languages", TRANSLATED),
]
