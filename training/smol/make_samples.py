"""Makes `smol`'s calibration, reward and test samples: knowledge, prose, and `tiny`'s questions about images.

    python -m training.smol.make_samples [--out FOLDER]

All text is dealt to the sets by groups (a family of words, a country, a chapter), in an order that a hash of the
group's name gives: where a group goes depends on no other choice made here.
"""

import argparse
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from lop.model.samples import LETTERS, PROSE, Sample, SampleSets, load_sample_sets
from training.smol.knowledge import Fact, facts
from training.smol.prose import Passage, passages
from training.smol.write import write

ASSETS = Path(str(files("lop"))) / "assets"
SEED = 2026
SETS = ("calibration", "reward", "test")
# What one hand of groups goes to; `training` is for who teaches a model the form of the questions.
_HAND = ("test", "reward", "test", "calibration", "test", "reward", "test", "training")
_OPTIONS = 4
# Of each kind and form at most so many, in order of the sets.
_FACTS = {
    "hypernym": (60, 120, 330),
    "opposite": (30, 60, 110),
    "meaning": (60, 120, 330),
    "definition": (50, 100, 300),
    "country_capital": (16, 30, 90),
    "capital_country": (16, 30, 90),
    "country_continent": (16, 30, 90),
    "country_language": (16, 30, 90),
    "country_currency": (16, 30, 90),
    "country_neighbour": (20, 40, 120),
}
_PASSAGES = {
    "manual": (24, 45, 120),
    "scripture": (24, 45, 120),
    "novel": (24, 45, 120),
    "lexicon": (20, 40, 110),
    "example": (40, 80, 240),
}
# Of `tiny`'s kinds those whose answers are words that a language model knows.
_IMAGES = dict.fromkeys(
    ("colour", "shape", "product", "worn", "country", "capital", "continent", "language", "demonym"), (8, 12, 40)
)


def main() -> None:
    """Writes the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS / "smol" / "samples")
    options = parser.parse_args()
    sets = make_sets()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in SETS:
        samples: tuple[Sample, ...] = getattr(sets, name)
        write(samples, options.out / f"{name}.parquet")
        print(name, len(samples), dict(Counter(sample.form for sample in samples)))


@dataclass(frozen=True)
class Dealt:
    """All facts and passages, and the set that each group belongs to; `training` are those of no set."""

    facts: list[Fact]
    passages: list[Passage]
    sets: dict[str, str]

    @classmethod
    def all(cls) -> "Dealt":
        """Dealt together: some passages are of the same groups as facts (a word and an example of its use)."""
        asked, told = facts(), passages(SEED)
        return cls(asked, told, deal([fact.group for fact in asked] + [passage.chapter for passage in told]))

    def facts_of(self, *sets: str) -> list[Fact]:
        """The facts of some sets, in order."""
        return [fact for fact in self.facts if self.sets[fact.group] in sets]

    def passages_of(self, *sets: str) -> list[Passage]:
        """The passages of some sets, in order."""
        return [passage for passage in self.passages if self.sets[passage.chapter] in sets]


def make_sets() -> SampleSets:
    """The three sets, which share no group, image or text."""
    dealt, seen = Dealt.all(), load_sample_sets(ASSETS / "tiny" / "samples")
    found: dict[str, tuple[Sample, ...]] = {}
    for number, name in enumerate(SETS):
        random = np.random.default_rng([SEED, number])
        found[name] = (
            *_asked(dealt.facts_of(name), number, random),
            *_told(dealt.passages_of(name), number, random),
            *_shown(getattr(seen, name), number),
        )
    return SampleSets(**found)


def deal(groups: Iterable[str]) -> dict[str, str]:
    """The set of each group: the groups of each source, shuffled by hash, are dealt by hands."""
    sources: dict[str, set[str]] = {}
    for group in groups:
        sources.setdefault(group.split("/")[0], set()).add(group)
    return {
        group: _HAND[place % len(_HAND)]
        for mine in sources.values()
        for place, group in enumerate(sorted(mine, key=lambda name: hashlib.sha256(name.encode()).digest()))
    }


def ask(fact: Fact, form: str, random: np.random.Generator) -> Sample | None:
    """A fact as a question for a word, or with options; None if too little is wrong for that."""
    options: tuple[str, ...] = ()
    answer = fact.answer
    if form == "choice":
        wrong = [other for other in dict.fromkeys(fact.wrong) if other != answer]
        if len(wrong) < _OPTIONS - 1:
            return None
        chosen = [answer, *(wrong[i] for i in random.choice(len(wrong), _OPTIONS - 1, replace=False))]
        options = tuple(chosen[i] for i in random.permutation(_OPTIONS))
        answer = LETTERS[options.index(answer)]
    return Sample(b"", fact.group, fact.source, fact.kind, form, fact.question, options, answer)


def tell(passage: Passage) -> Sample:
    """A passage as prose to continue."""
    source = "wordnet" if passage.kind == "example" else "books"
    return Sample(b"", passage.chapter, source, passage.kind, PROSE, passage.context, (), passage.text)


def _asked(found: list[Fact], number: int, random: np.random.Generator) -> Iterator[Sample]:
    """Facts by chance, each in one form, or in both where there would be too few."""
    for kind, counts in _FACTS.items():
        mine = [fact for fact in found if fact.kind == kind]
        mine = [mine[i] for i in random.permutation(len(mine))]
        for form in mine[0].forms:
            samples = filter(None, (ask(fact, form, random) for fact in mine))
            yield from (sample for sample, _ in zip(samples, range(counts[number])))
            # The next form begins with other facts.
            mine = mine[counts[number] :] + mine[: counts[number]]


def _told(found: list[Passage], number: int, random: np.random.Generator) -> Iterator[Sample]:
    for kind, counts in _PASSAGES.items():
        mine = [passage for passage in found if passage.kind == kind]
        for index in random.permutation(len(mine))[: counts[number]]:
            yield tell(mine[index])


def _shown(samples: Iterable[Sample], number: int) -> Iterator[Sample]:
    """The first of `tiny`'s questions of each kind and form; as many are answered by yes as by no."""
    taken: Counter[tuple[str, str, str]] = Counter()
    for sample in samples:
        most = _IMAGES.get(sample.kind, (0, 0, 0))[number]
        key = (sample.kind, sample.form, sample.answer if sample.form == "yes_no" else "")
        if taken[key] < (most // 2 if sample.form == "yes_no" else most):
            taken[key] += 1
            yield sample


if __name__ == "__main__":
    main()
