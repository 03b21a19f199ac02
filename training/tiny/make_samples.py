"""Makes the calibration, reward and test samples from images that training does not see.

python -m training.tiny.make_samples [--out FOLDER]
"""

import argparse
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lop.model.samples import FORMS, Sample, SampleSets
from training.tiny.images import Picture, decode, products, shapes
from training.tiny.questions import KINDS, MANY_RIGHT, WORDINGS, ask
from training.tiny.vision import flag_pictures, training_pools

# Questions by source; in the test set, up to `_PER_IMAGE` questions share an image.
_COUNTS = {
    "calibration": {"easy-vqa": 120, "fashion-mnist": 90, "flags": 390},
    "reward": {"easy-vqa": 180, "fashion-mnist": 120, "flags": 660},
    "test": {"easy-vqa": 660, "fashion-mnist": 480, "flags": 2460},
}
_PER_IMAGE = {"calibration": 1, "reward": 1, "test": 2}
_FLAG_SEEDS = {"calibration": (0, 3), "reward": (100, 5), "test": (200, 8)}


def main() -> None:
    """Writes the three files after checking that they share no image with each other or with training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("lop/assets/tiny/samples"))
    parser.add_argument("--renderings", type=int, default=100, help="of each flag that training uses")
    options = parser.parse_args()
    random = np.random.default_rng(2026)
    pools = {
        "easy-vqa": list(random.permutation(np.array(shapes("test"), dtype=object))),
        "fashion-mnist": list(random.permutation(np.array(products("test"), dtype=object))),
    }
    sets = {}
    for split, counts in _COUNTS.items():
        samples: list[Sample] = []
        for source, count in counts.items():
            if source == "flags":
                pictures = flag_pictures(*_FLAG_SEEDS[split])
                pictures = [pictures[index] for index in random.permutation(len(pictures))]
            else:
                pictures = pools[source]
            images = -(-count // _PER_IMAGE[split])
            asked = [picture for picture in pictures[:images] for _ in range(_PER_IMAGE[split])][:count]
            pools[source] = pictures[images:]
            samples += _questions(asked, source, random)
        sets[split] = tuple(samples)
    SampleSets(**sets)
    _check_pixels(sets, options.renderings)
    options.out.mkdir(parents=True, exist_ok=True)
    for split, samples_of_split in sets.items():
        write(samples_of_split, options.out / f"{split}.parquet")
        print(split, len(samples_of_split), dict(Counter(sample.form for sample in samples_of_split)))


def write(samples: Sequence[Sample], path: Path) -> None:
    """One row a question; an image asked about more than once is stored once."""
    table = pa.Table.from_pylist([asdict(sample) for sample in samples])
    pq.write_table(table, path, compression="zstd", use_dictionary=True, dictionary_pagesize_limit=64 * 2**20)


def _questions(pictures: Sequence[Picture], source: str, random: np.random.Generator) -> Iterator[Sample]:
    """One question a picture: kinds and forms in turn, each wording answered as often by yes as by no."""
    turns = [(kind, form) for kind in KINDS[source] for form in FORMS if kind not in MANY_RIGHT or form != "word"]
    yes: Counter[str] = Counter()
    asked: set[tuple[str, str, tuple[str, ...]]] = set()
    turn = 0
    for picture in pictures:
        sample = None
        while sample is None:
            kind, form = turns[turn % len(turns)]
            sample = _balanced(picture, kind, form, random, yes)
            turn += 1
            if sample is not None and (sample.image_id, sample.question, sample.options) in asked:
                sample = None
        asked.add((sample.image_id, sample.question, sample.options))
        yield sample


def _balanced(picture: Picture, kind: str, form: str, random: np.random.Generator, yes: Counter[str]) -> Sample | None:
    while True:
        sample = ask(picture, kind, form, random)
        if sample is None or form != "yes_no":
            return sample
        # `yes` holds how much oftener than no each wording was answered by yes.
        wording = f"{kind}: {_wording(kind, sample.question)}"
        change = 1 if sample.answer == "yes" else -1
        if abs(yes[wording] + change) <= 1:
            yes[wording] += change
            return sample


def _wording(kind: str, question: str) -> str:
    fitting = [w for w in WORDINGS[kind][1] if all(map(question.__contains__, w.split("{}")))]
    # "Is the capital not {}?" fits "Is the capital {}?" too.
    return max(fitting, key=len)


def _check_pixels(sets: dict[str, tuple[Sample, ...]], renderings: int) -> None:
    seen = {_pixel_hash(picture.image) for part in training_pools(renderings) for picture in part}
    for split, samples in sets.items():
        mine = {_pixel_hash(sample.image) for sample in samples}
        if both := seen & mine:
            raise SystemExit(f"{len(both)} images of {split} are also elsewhere")
        seen |= mine


def _pixel_hash(image: bytes) -> str:
    return hashlib.sha256(decode(image).tobytes()).hexdigest()


if __name__ == "__main__":
    main()
