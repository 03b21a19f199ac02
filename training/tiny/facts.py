"""Facts about countries: what the embedded model has to know, beyond what it sees."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import countryinfo
import numpy as np
import pycountry
from PIL import Image

FLAGS = Path("/usr/share/iso-flags-png-320x240")
_LEAST_POPULATION = 150_000
_LEAST_DISTANCE = 18.0


@dataclass(frozen=True)
class Country:
    """One country with the facts that questions ask for; `borders` names its neighbours."""

    code: str
    name: str
    capital: str
    continent: str
    subregion: str
    currency: str
    language: str
    calling_code: str
    demonym: str
    code3: str
    german: str
    borders: tuple[str, ...]


@cache
def countries() -> tuple[Country, ...]:
    """The countries whose flags can be told apart, in order of their code."""
    found = []
    for path in sorted((Path(countryinfo.__file__).parent / "data").glob("*.json")):
        record = json.loads(path.read_text())
        country = _country(record)
        if country and (record.get("population") or 0) >= _LEAST_POPULATION:
            found.append((country, tuple(record.get("borders") or ())))
    found.sort(key=lambda item: item[0].code)
    distinct = _distinct([country for country, _ in found])
    names = {pycountry.countries.get(alpha_2=c.code.upper()).alpha_3: c.name for c in distinct}
    borders = {country.code: codes for country, codes in found}
    return tuple(
        Country(**{**vars(c), "borders": tuple(names[code] for code in borders[c.code] if code in names)})
        for c in distinct
    )


def _country(record: dict) -> Country | None:
    code = (record.get("ISO") or {}).get("alpha2", "")
    entry = pycountry.countries.get(alpha_2=code) if code else None
    fields = ("capital", "region", "subregion", "currencies", "languages", "callingCodes", "demonym", "translations")
    if entry is None or not all(record.get(f) for f in fields) or not (FLAGS / f"{code.lower()}.png").is_file():
        return None
    language = pycountry.languages.get(alpha_2=record["languages"][0])
    if language is None or not record["callingCodes"][0].isdigit():
        return None
    return Country(
        code=code.lower(),
        name=getattr(entry, "common_name", entry.name).split(",")[0],
        capital=record["capital"],
        continent=record["region"],
        subregion=record["subregion"],
        currency=record["currencies"][0],
        language=language.name.split("(")[0].split(";")[0].strip(),
        calling_code=record["callingCodes"][0],
        demonym=record["demonym"],
        code3=record["ISO"]["alpha3"],
        german=record["translations"]["de"],
        borders=(),
    )


def _distinct(found: list[Country]) -> list[Country]:
    """Leaves out every flag that is close to an earlier one (Chad and Romania, Indonesia and Monaco, territories)."""
    kept: list[tuple[Country, np.ndarray]] = []
    names: set[str] = set()
    for country in found:
        image = Image.open(FLAGS / f"{country.code}.png").convert("RGB").resize((24, 18), Image.Resampling.BOX)
        pixels = np.asarray(image, dtype=np.float32)
        if country.name not in names and all(np.abs(pixels - other).mean() >= _LEAST_DISTANCE for _, other in kept):
            kept.append((country, pixels))
            names.add(country.name)
    return [country for country, _ in kept]
