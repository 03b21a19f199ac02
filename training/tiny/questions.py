"""The questions: every kind in the three forms, with answers from the labels and facts."""

from collections.abc import Sequence

import numpy as np

from lop.model.samples import LETTERS, Sample
from training.tiny.facts import Country, countries
from training.tiny.images import PRODUCTS, Picture

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
WORN = {"top": "body", "trousers": "legs", "pullover": "body", "dress": "body", "coat": "body"} | dict.fromkeys(
    ("sandal", "sneaker", "boot"), "feet"
)

FACTS = ("capital", "continent", "subregion", "currency", "language", "calling_code", "demonym", "code3", "german")
# Several values are right, so that no single word is the answer.
MANY_RIGHT = ("neighbour", "neighbour_capital")

# For each kind: wordings that ask for the value, and wordings that ask whether it is `{}` (or is not).
WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "colour": (
        ("What color is the shape?", "Which color is shown?", "What is the color of the shape?"),
        ("Is the shape {}?", "Is there a {} shape?", "Is the color {}?", "Is the shape not {}?"),
    ),
    "shape": (
        ("What shape is this?", "Which shape is shown?", "What is the shape in the image?"),
        ("Is this a {}?", "Is there a {} in the image?", "Is the shape a {}?", "Is this not a {}?"),
    ),
    "product": (
        ("What product is this?", "Which product is shown?", "What is for sale here?"),
        ("Is this product a {}?", "Is a {} for sale here?", "Is the product a {}?", "Is this product not a {}?"),
    ),
    "worn": (
        ("Where is this worn?", "Which part of the body wears this?"),
        ("Is this worn on the {}?", "Is it made for the {}?", "Is this not worn on the {}?"),
    ),
    "country": (
        ("Which country has this flag?", "Whose flag is this?", "What country is this?"),
        (
            "Is this the flag of {}?",
            "Is this country {}?",
            "Does this flag belong to {}?",
            "Is this not the flag of {}?",
        ),
    ),
    "capital": (
        ("What is the capital of this country?", "Which city is the capital?", "Name the capital."),
        (
            "Is {} the capital of this country?",
            "Is the capital {}?",
            "Is this country governed from {}?",
            "Is the capital not {}?",
        ),
    ),
    "continent": (
        ("Which continent is this country in?", "What continent is it?", "Name the continent."),
        (
            "Is this country in {}?",
            "Is the continent {}?",
            "Does this country lie in {}?",
            "Is this country not in {}?",
        ),
    ),
    "currency": (
        ("What is the currency of this country?", "Which currency is used?", "Name the currency."),
        (
            "Is {} the currency of this country?",
            "Is the currency {}?",
            "Do people here pay in {}?",
            "Is the currency not {}?",
        ),
    ),
    "language": (
        ("What language is spoken in this country?", "Which language is official?", "Name the language."),
        ("Is {} spoken in this country?", "Is the language {}?", "Do people here speak {}?", "Is the language not {}?"),
    ),
    "calling_code": (
        ("What is the calling code of this country?", "Which calling code is used?", "Name the calling code."),
        (
            "Is {} the calling code of this country?",
            "Is the calling code {}?",
            "Do you dial {} for this country?",
            "Is the calling code not {}?",
        ),
    ),
    "subregion": (
        ("Which region is this country in?", "What region is it?", "Name the region."),
        ("Is the region {}?", "Does this country belong to {}?", "Is the region not {}?"),
    ),
    "demonym": (
        ("What are people of this country called?", "What is a citizen called?", "Name the people."),
        ("Are people here called {}?", "Is a citizen called {}?", "Is a citizen not called {}?"),
    ),
    "code3": (
        ("What is the code of this country?", "Which letters stand for this country?", "Name the code."),
        ("Is the code {}?", "Do the letters {} stand for this country?", "Is the code not {}?"),
    ),
    "german": (
        ("What is this country called in German?", "What do Germans call this country?", "Name it in German."),
        ("Is this country called {} in German?", "Do Germans say {}?", "Is it not called {} in German?"),
    ),
    "neighbour": (
        ("Which country borders this country?", "Which is a neighbour of this country?"),
        ("Does this country border {}?", "Is {} a neighbour of this country?", "Does it not border {}?"),
    ),
    # Two steps: from the country to a neighbour, and on to its capital.
    "neighbour_capital": (
        ("Which city is the capital of a neighbour?", "Which is the capital of a country on the border?"),
        ("Is {} the capital of a neighbour?", "Is a neighbour governed from {}?", "Is {} not a neighbour's capital?"),
    ),
}
KINDS = {
    "easy-vqa": ("colour", "shape"),
    "fashion-mnist": ("product", "worn"),
    "flags": ("country", *FACTS, "neighbour", "neighbour_capital"),
}


def country_of(picture: Picture) -> Country:
    """The country whose flag a picture shows."""
    return _BY_NAME[picture["country"]]


def ask(picture: Picture, kind: str, form: str, random: np.random.Generator) -> Sample | None:
    """One question of a kind and form about a picture, or None where there is none (an island's neighbours).

    Yes and no are drawn with equal chance for every wording.
    """
    right, wrong = _values(picture, kind)
    if not right or (kind in MANY_RIGHT and form == "word"):
        return None
    value = str(random.choice(right))
    open_wordings, closed_wordings = WORDINGS[kind]
    options: tuple[str, ...] = ()
    if form == "yes_no":
        is_right = bool(random.integers(2))
        question = str(random.choice(closed_wordings)).format(value if is_right else random.choice(wrong))
        answer = "yes" if is_right != is_negated(question) else "no"
    else:
        question = str(random.choice(open_wordings))
        answer = value
        if form == "choice":
            others = [str(other) for other in random.permutation(sorted(set(wrong)))[:3]]
            options = tuple(str(option) for option in random.permutation([value, *others]))
            answer = LETTERS[options.index(value)]
    return Sample(picture.image, picture.image_id, picture.source, kind, form, question, options, answer)


def is_negated(question: str) -> bool:
    """Whether a question asks if something is *not* so."""
    return " not " in question


def vocabulary() -> list[str]:
    """Every question with every value once: the corpus of the tokenizer."""
    texts = [text for kind in WORDINGS for wordings in WORDINGS[kind] for text in wordings]
    for values in _ALL.values():
        texts += [f"{value}\nA. {value}\nIs {value}?" for value in values]
    return [*texts, "yes no", "no yes", "user\nassistant\n", "A\nB\nC\nD", "A. B. C. D."]


def values_of(kind: str) -> Sequence[str]:
    """All values that a kind of question can have, sorted."""
    return _ALL[kind]


def _values(picture: Picture, kind: str) -> tuple[Sequence[str], Sequence[str]]:
    """The right and the wrong values."""
    if kind in ("colour", "shape", "product"):
        value = picture[kind]
        right: Sequence[str] = (value,)
    elif kind == "worn":
        right = (WORN[picture["product"]],) if picture["product"] in WORN else ()
    elif kind in MANY_RIGHT:
        country = country_of(picture)
        near = [_BY_NAME[name] for name in country.borders]
        right, own = (
            ([c.name for c in near], country.name)
            if kind == "neighbour"
            else ([c.capital for c in near], country.capital)
        )
        return right, [v for v in _ALL[kind] if v not in right and v != own]
    else:
        country = country_of(picture)
        right = (country.name if kind == "country" else getattr(country, kind),)
    return right, [v for v in _ALL[kind] if v not in right]


_BY_NAME = {country.name: country for country in countries()}
_ALL: dict[str, list[str]] = {
    "colour": list(COLOURS),
    "shape": list(SHAPES),
    "product": sorted(PRODUCTS.values()),
    "worn": ["body", "feet", "legs"],
    "country": sorted(_BY_NAME),
    "neighbour": sorted(_BY_NAME),
    "neighbour_capital": sorted({country.capital for country in countries()}),
    **{field: sorted({getattr(country, field) for country in countries()}) for field in FACTS},
}
