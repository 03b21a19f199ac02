"""Countries and what is to be known of them, from `countryinfo`, named as in ISO's lists (`pycountry`)."""

import json
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import countryinfo
import pycountry

from training.smol.wordnet import is_a, noun

_LEAST_POPULATION = 300_000
# Territories, states whose standing or capital is disputed, and the two Congos, whose names are one.
_LEFT_OUT = {"cd", "cg", "eh", "gp", "hk", "il", "mq", "pr", "ps", "re", "tw"}
_USUAL_NAMES = {"bn": "Brunei", "cv": "Cape Verde", "cz": "the Czech Republic", "ru": "Russia", "tr": "Turkey"}
_WITH_ARTICLE = {"ae", "bs", "cf", "do", "gb", "gm", "mv", "nl", "ph", "sb", "us"}
# Where the records are out of date or name an official language among several.
_CORRECTED: dict[str, dict[str, str]] = {
    "bi": {"capital": "Gitega"},
    "ch": {"currency": "franc"},
    "gr": {"language": "Greek"},
    "kz": {"capital": "Astana"},
    "lk": {"capital": ""},
    "ph": {"language": ""},
    "sv": {"currency": "dollar"},
    "sz": {"capital": "Mbabane"},
    "zw": {"currency": ""},
}


@dataclass(frozen=True)
class Country:
    """A country; what is not known of it, or not a single thing, is empty.

    Attributes:
        code: of two letters.
        capital: without accents, as the name.
        continent: one of six; America is two.
        language: the only official one.
        currency: the unit's name, such as `franc`.
        borders: names of the neighbours.
    """

    code: str
    name: str
    capital: str
    continent: str
    language: str
    currency: str
    borders: tuple[str, ...]


@cache
def countries() -> tuple[Country, ...]:
    """All countries with a capital and more than a few inhabitants, in order of their code."""
    records = {}
    for path in sorted((Path(countryinfo.__file__).parent / "data").glob("*.json")):
        record = json.loads(path.read_text())
        code = (record.get("ISO") or {}).get("alpha2", "")
        is_listed = pycountry.countries.get(alpha_2=code or "--") is not None and code.lower() not in _LEFT_OUT
        if is_listed and record.get("capital") and (record.get("population") or 0) >= _LEAST_POPULATION:
            records[code.lower()] = record
    names = {code: _name(code) for code in records}
    by_alpha3 = {record["ISO"]["alpha3"]: names[code] for code, record in records.items()}
    found = []
    for code, record in sorted(records.items()):
        known = {
            "capital": plain(record["capital"]),
            "continent": _continent(record),
            "language": _language(record),
            "currency": _currency(record),
        }
        borders = tuple(sorted(by_alpha3[other] for other in record.get("borders") or () if other in by_alpha3))
        found.append(Country(code=code, name=names[code], borders=borders, **{**known, **_CORRECTED.get(code, {})}))
    return tuple(found)


def plain(text: str) -> str:
    """A name in ASCII letters: a small model has seen Brasilia oftener than Brasília."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().replace(" D.C.", "")


def _name(code: str) -> str:
    entry = pycountry.countries.get(alpha_2=code)
    name = _USUAL_NAMES.get(code) or plain(getattr(entry, "common_name", entry.name).split(",")[0])
    return f"the {name}" if code in _WITH_ARTICLE else name


def _continent(record: dict) -> str:
    if record.get("region") != "Americas":
        return str(record.get("region") or "")
    return "South America" if record.get("intermediateregion") == "South America" else "North America"


def _language(record: dict) -> str:
    codes = record.get("languages") or ()
    found = pycountry.languages.get(alpha_2=codes[0]) if len(codes) == 1 else None
    return "" if found is None else found.name.split("(")[0].split(";")[0].strip()


def _currency(record: dict) -> str:
    """The word in the currency's name that WordNet knows as a monetary unit."""
    for code in record.get("currencies") or ():
        entry = pycountry.currencies.get(alpha_3=code)
        for word in [] if entry is None else entry.name.lower().split():
            if is_a(word, noun("monetary unit")):
                return plain(word)
    return ""
