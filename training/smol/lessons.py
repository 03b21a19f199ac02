"""What a pruned `smol` can learn from by `lop distil --samples FOLDER`, ten times its calibration samples.

    python -m training.smol.lessons FOLDER [--passages N]

Writes `FOLDER/calibration.parquet`: the calibration samples' groups and those of no set (`make_samples`), every fact in
every form that it can be asked in, and at most so many passages of each kind of prose. None of the shipped calibration
samples is among them, and no group of reward or test samples.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from lop.model.samples import Sample, load_samples
from training.smol.knowledge import Fact
from training.smol.make_samples import ASSETS, SEED, SETS, Dealt, ask, tell
from training.smol.prose import Passage
from training.smol.write import write

_HANDS = ("calibration", "training")
PASSAGES = 300  # Of each kind of prose.


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--passages", type=int, default=PASSAGES, help="of each kind of prose, at most")
    options = parser.parse_args()
    samples = write_lessons(options.folder, options.passages)
    print(len(samples), dict(Counter(sample.form for sample in samples)))


def write_lessons(folder: Path, passages: int = PASSAGES) -> list[Sample]:
    """Makes the file, and returns what it holds."""
    samples = make_lessons(passages)
    folder.mkdir(parents=True, exist_ok=True)
    write(samples, folder / "calibration.parquet")
    return samples


def make_lessons(passages: int = PASSAGES) -> list[Sample]:
    """The samples, questions first.

    Args:
        passages: of each kind of prose, at most.
    """
    known = {key for sample in load_samples(ASSETS / "smol" / "samples" / "calibration.parquet") for key in sample.keys}
    dealt, random = Dealt.all(), np.random.default_rng([SEED, len(SETS)])
    asked = _asked(dealt.facts_of(*_HANDS), random)
    told = map(tell, _some(dealt.passages_of(*_HANDS), passages, random))
    return [sample for sample in (*asked, *told) if sample.keys[-1] not in known]


def _asked(facts: Iterable[Fact], random: np.random.Generator) -> Iterator[Sample]:
    for fact in facts:
        yield from filter(None, (ask(fact, form, random) for form in fact.forms))


def _some(passages: Sequence[Passage], most: int, random: np.random.Generator) -> Iterator[Passage]:
    taken: Counter[str] = Counter()
    for index in random.permutation(len(passages)):
        passage = passages[index]
        taken[passage.kind] += 1
        if taken[passage.kind] <= most:
            yield passage


if __name__ == "__main__":
    main()
