"""Princeton WordNet as Debian's `wordnet-base` lays it down: frequent words with their meanings and relations."""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path("/usr/share/wordnet")
SCOWL = Path("/usr/share/dict/scowl")
# Of SCOWL's lists: 10 to 35 are what it calls a small dictionary, some 50,000 words with their inflections.
SIZES = (10, 20, 35)
_MOST_MEANINGS = 3
# What neither a word nor its definition may hold: not every word is fit to be asked.
_UNFIT = re.compile(
    r"\b(sex|genital|offensive|derogat|disparag|slur|vulgar|obscen|slang|homosex|prostitut|excre|feces|fecal|urin|raci|drug"
    r"|breast|penis|vagina|vulva|negro|rape|incest|retard|suicide|genocid)",
    re.IGNORECASE,
)
_POS = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
_EXAMPLE = re.compile(r'"([^"]+)"')


@dataclass(frozen=True)
class Synset:
    """A meaning and the words for it.

    Attributes:
        key: byte offset and part of speech, such as `02084071-n`.
        field: the lexicographers' file, such as 5 for animals: synsets of one field are about alike things.
        words: those that have this meaning, the most usual first.
        definition: the gloss without its examples.
        examples: sentences of the gloss.
        pointers: (relation, key of the other synset, index of the word here, index there), indices from 1; 0 is all.
    """

    key: str
    field: int
    words: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]
    pointers: tuple[tuple[str, str, int, int], ...]

    @property
    def pos(self) -> str:
        """`n`, `v`, `a` or `r`."""
        return self.key[-1]

    def related(self, *relations: str) -> list["Synset"]:
        """The synsets that pointers of these relations lead to, such as `@` and `@i` to what it is a kind of."""
        return [synsets()[key] for relation, key, _, _ in self.pointers if relation in relations]


@cache
def synsets() -> dict[str, Synset]:
    """All synsets by key."""
    found = {}
    for pos, name in _POS.items():
        for line in (FOLDER / f"data.{name}").read_text().splitlines():
            if not line.startswith(" "):
                synset = _synset(line, pos)
                found[synset.key] = synset
    return found


@cache
def meanings() -> dict[str, Synset]:
    """Everyday words that mostly mean one thing, with what they mean, in order of the alphabet.

    The word is of letters alone, stands in SCOWL's lists of `SIZES`, and is the first of its synset. At least half
    of its uses in WordNet's tagged texts have this meaning; a word that was never tagged has few to choose from. Words
    that not everyone would want to be asked are left out.
    """
    places = {pos: _index(pos) for pos in _POS}
    counts: dict[str, Counter[tuple[str, int]]] = {}
    for line in (FOLDER / "cntlist.rev").read_text().splitlines():
        key, number, count = line.split()
        word, rest = key.split("%")
        counts.setdefault(word, Counter())["nvara"[int(rest[0]) - 1], int(number)] += int(count)
    found = {}
    for word in common_words():
        mine = counts.get(word) or Counter({(pos, 1): 1 for pos in _POS if word in places[pos]})
        if not mine:
            continue
        (pos, number), count = mine.most_common(1)[0]
        senses = places[pos].get(word, ())
        # The counts are of an older release, and name a few meanings that are gone.
        if number > len(senses) or (word not in counts and len(senses) > _MOST_MEANINGS) or 2 * count < mine.total():
            continue
        synset = synsets()[f"{senses[number - 1]}-{pos}"]
        if synset.words[0] == word and not _UNFIT.search(f"{word}: {synset.definition}"):
            found[word] = synset
    return found


def noun(words: str) -> Synset:
    """The most frequent meaning of a noun."""
    return synsets()[_index("n")[words.replace(" ", "_")][0] + "-n"]


def is_a(word: str, kind: Synset) -> bool:
    """Whether a noun has a meaning that is a kind of another."""
    offsets = _index("n").get(word.replace(" ", "_"), ())
    return any(kind in ancestors(synsets()[f"{offset}-n"]) for offset in offsets)


def ancestors(synset: Synset) -> list[Synset]:
    """What a synset is a kind of, the nearest first."""
    found: dict[str, Synset] = {}
    front = [synset]
    while front:
        front = [above for below in front for above in below.related("@", "@i") if above.key not in found]
        found |= {above.key: above for above in front}
    return list(found.values())


@cache
def common_words() -> tuple[str, ...]:
    """SCOWL's English and American words of lower-case letters alone, of `SIZES`, sorted."""
    words: set[str] = set()
    for size in SIZES:
        for name in ("english", "american"):
            words |= set((SCOWL / f"{name}-words.{size}").read_text(encoding="latin-1").split())
    return tuple(sorted(word for word in words if re.fullmatch("[a-z]{3,}", word)))


@cache
def _index(pos: str) -> dict[str, list[str]]:
    """For each word the offsets of its synsets, in order of frequency."""
    lines = (FOLDER / f"index.{_POS[pos]}").read_text().splitlines()
    rows = [line.split() for line in lines if not line.startswith(" ")]
    return {row[0]: row[-int(row[2]) :] for row in rows}


def _synset(line: str, pos: str) -> Synset:
    head, gloss = line.split(" | ", 1)
    fields = head.split()
    count = int(fields[3], 16)
    words = tuple(re.sub(r"\(.+\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * count : 2])
    start = 5 + 2 * count
    rows = [fields[at : at + 4] for at in range(start, start + 4 * int(fields[start - 1]), 4)]
    pointers = tuple(
        (relation, f"{offset}-{'a' if other == 's' else other}", int(ends[:2], 16), int(ends[2:], 16))
        for relation, offset, other, ends in rows
    )
    definition = gloss.split('"', 1)[0].strip().rstrip(";:").strip()
    return Synset(f"{fields[0]}-{pos}", int(fields[1]), words, definition, tuple(_EXAMPLE.findall(gloss)), pointers)
