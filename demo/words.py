"""What the domains have in common: a sample, and the words that it is made of."""

# ruff: noqa: SIM905 - lists of words are easier to read without quotes
from dataclasses import dataclass

NAMES = "Anna Tom Mia Ben Eva Max Lea Sam Ida Jan Zoe Leo".split()
CITIES = "Paris Rome London Berlin Madrid Vienna Oslo Dublin Tokyo Cairo Lima Moscow".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
OBJECTS = "ball key coin book ring cup hat pen".split()
PLACES = "box bag drawer garden kitchen car shed tower".split()
WORDS = "red cat sun dog map tea sky ice oak bee fog gem".split()
# English and Velan, a language of this model's own
NOUNS = dict(
    zip(
        "dog cat bird fish king queen child horse wolf tree house river".split(),
        "mopa liru tavi sone kado reli pimu hasa voru teko dumi nalo".split(),
        strict=True,
    )
)
ADJECTIVES = dict(
    zip(
        "big small old young red white happy sad quick strong".split(),
        "gorun pitin vetal junel rokan balin felis tromu zipan durek".split(),
        strict=True,
    )
)
VERBS = dict(
    zip(
        "sees likes hears finds follows helps feeds knows".split(),
        "vide lube aude trove sege jude pase kone".split(),
        strict=True,
    )
)


@dataclass(frozen=True)
class Sample:
    """A prompt and the one right continuation, or running text with an empty answer."""

    prompt: str
    answer: str = ""
