"""Questions that a language model answers from what it knows: about words, after WordNet, and about countries."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from training.smol.geography import Country, countries
from training.smol.wordnet import Synset, ancestors, meanings, noun, synsets

# What an everyday thing is a kind of: the nearest of these above it. Words for them, and the nouns they are in WordNet.
_SAME = """
    animal bird fish insect reptile dog horse tree flower fruit vegetable food beverage meat vehicle boat aircraft
    building room furniture weapon container scientist relative metal disease sport game emotion science organ bone
    fabric road book poem crime meal document punishment ceremony machine musician criminal color tool
"""
CATEGORIES = {
    **{name: name for name in _SAME.split()},
    "clothing": "garment",
    "instrument": "musical instrument",
    "song": "music",
}
_LONGEST_GLOSS = 12
_DRAWN = 12
_WORD = re.compile("[a-z]{3,}")


@dataclass(frozen=True)
class Fact:
    """Something that can be asked, as a word or as options.

    Attributes:
        group: what must stay in one set of samples: a family of words, or a country.
        source: `wordnet` or `countries`.
        wrong: what is plausible and not right.
        forms: the forms that it can be asked in.
    """

    group: str
    source: str
    kind: str
    question: str
    answer: str
    wrong: tuple[str, ...]
    forms: tuple[str, ...] = ("choice", "word")


def facts() -> list[Fact]:
    """All facts whose question does not give the answer away by its letters, in a fixed order."""
    found = [*_hypernyms(), *_opposites(), *_meanings(), *_geography()]
    return [fact for fact in found if not gives_away(fact.question, fact.answer) or fact.kind == "definition"]


def gives_away(text: str, answer: str) -> bool:
    """Whether a word of a text begins like a word of the answer, or holds it or is held by it."""
    words = _words(text)
    return any(one[:4] == other[:4] or one in other or other in one for other in _words(answer) for one in words)


@cache
def families() -> dict[str, str]:
    """For each word with an opposite the first of those that opposites link it to, which names its group."""
    family: dict[str, str] = {}
    for one, other in _pairs():
        first, second = sorted((family.setdefault(one, one), family.setdefault(other, other)))
        family |= {word: first for word, mine in family.items() if mine == second}
    return family


def _hypernyms() -> Iterator[Fact]:
    names = {noun(meant).key: name for name, meant in CATEGORIES.items()}
    for word, synset in meanings().items():
        above = [names[found.key] for found in ancestors(synset) if found.key in names]
        if synset.pos == "n" and synset.key not in names and above:
            wrong = tuple(name for name in CATEGORIES if name not in above and not gives_away(name, word))
            question = f"{'An' if word[0] in 'aeiou' else 'A'} {word} is a kind of what?"
            yield _of_word(word, "hypernym", question, above[0], wrong)


def _opposites() -> Iterator[Fact]:
    others = sorted({word for pair in _pairs() for word in pair})
    for pair in _pairs():
        for word, answer in (pair, pair[::-1]):
            pos = meanings()[word].pos
            wrong = tuple(w for w in others if w not in pair and meanings()[w].pos == pos)
            yield _of_word(word, "opposite", f'What is the opposite of "{word}"?', answer, wrong)


def _meanings() -> Iterator[Fact]:
    """A gloss asks for its word, and a word for its gloss."""
    for word, synset in meanings().items():
        others = tuple(other for other in _alike(word) if short_gloss(meanings()[other]))
        if not (gloss := short_gloss(synset)) or gives_away(gloss, word) or not others:
            continue
        yield _of_word(word, "meaning", f'Which word means "{gloss}"?', word, others)
        glosses = tuple(short_gloss(meanings()[other]) for other in others)
        yield _of_word(word, "definition", f'What does "{word}" mean?', gloss, glosses, forms=("choice",))


def _geography() -> Iterator[Fact]:
    for country in countries():
        name = country.name
        asked = {
            "country_capital": (f"What is the capital of {name}?", country.capital),
            "capital_country": (f"Which country has the capital {country.capital}?", name),
            "country_continent": (f"Which continent is {name} in?", country.continent),
            "country_language": (f"Which language is spoken in {name}?", country.language),
            "country_currency": (f"What is the currency of {name}?", country.currency),
        }
        for kind, (question, answer) in asked.items():
            if answer and country.capital:
                field = "name" if kind == "capital_country" else kind.split("_")[1]
                wrong = sorted({getattr(other, field) for other in countries()} - {answer, ""})
                yield Fact(_country_group(country), "countries", kind, question, answer, tuple(wrong))
        far = tuple(other.name for other in countries() if other.name not in (*country.borders, name))
        for neighbour in country.borders[:2]:
            question = f"Which country has a border with {name}?"
            yield Fact(_country_group(country), "countries", "country_neighbour", question, neighbour, far, ("choice",))


def short_gloss(synset: Synset) -> str:
    """The definition without asides, up to its first semicolon; empty if it is long."""
    gloss = re.sub(r"\s*\([^)]*\)\s*", " ", synset.definition).split(";")[0].strip()
    return gloss if 3 <= len(gloss.split()) <= _LONGEST_GLOSS else ""


def _of_word(word: str, kind: str, question: str, answer: str, wrong: tuple[str, ...], **more: tuple[str, ...]) -> Fact:
    return Fact(f"wordnet/{families().get(word, word)}", "wordnet", kind, question, answer, wrong, **more)


def _country_group(country: Country) -> str:
    return f"country/{country.code}"


@cache
def _fields() -> dict[tuple[str, int], tuple[str, ...]]:
    found: dict[tuple[str, int], list[str]] = {}
    for word, synset in meanings().items():
        found.setdefault((synset.pos, synset.field), []).append(word)
    return {key: tuple(words) for key, words in found.items()}


def _alike(word: str) -> tuple[str, ...]:
    """Some words of the same field that are neither above nor below a word, nor of its form."""
    synset = meanings()[word]
    near = {synset.key, *(key for _, key, _, _ in synset.pointers)}
    field = _fields()[synset.pos, synset.field]
    drawn = random.Random(word).sample(field, min(_DRAWN, len(field)))
    return tuple(other for other in drawn if meanings()[other].key not in near and not gives_away(word, other))


@cache
def _pairs() -> tuple[tuple[str, str], ...]:
    """Everyday words that are opposites of each other."""
    found = set()
    for word, synset in meanings().items():
        for relation, key, here, there in synset.pointers:
            if relation == "!" and here == 1:
                other = synsets()[key].words[there - 1]
                if other in meanings() and meanings()[other].key == key:
                    found.add((min(word, other), max(word, other)))
    return tuple(sorted(found))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
