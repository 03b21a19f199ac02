"""The answer of a search, confirmed on samples that it has not seen.

The best of many noisy scores is partly the luckiest (Thaler 1988: the winner's curse). So the best few, and the uniform
allocation, are scored once more on samples kept back, and the best of these scores is the answer.
"""

from collections.abc import Callable, Mapping, Sequence

from lop.model.samples import Sample
from lop.search.evaluation import Evaluation
from lop.search.ledger import Ledger
from lop.search.loop import Workers, evaluate_recorded
from lop.search.racing import Candidate, split
from lop.search.tree import SearchTree
from lop.space.allocation import Allocation, uniform

# What finalists said to the samples kept back, the best by the search first.
Confirmed = dict[Allocation, Evaluation]


def kept_back(samples: Sequence[Sample], share: float, *, seed: int) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """The samples to search on, and those kept back: about `share` of them, all of an image or a text together."""
    keys = [sample.keys[0] for sample in samples]
    distinct = list(dict.fromkeys(keys))
    count = min(max(round(share * len(distinct)), 1), len(distinct) - 1)
    chosen = {distinct[index] for index in split(len(distinct), count, seed=seed)}
    parts: tuple[list[Sample], list[Sample]] = ([], [])
    for sample, key in zip(samples, keys, strict=True):
        parts[key in chosen].append(sample)
    return tuple(parts[0]), tuple(parts[1])


def confirm(
    trees: Mapping[float, SearchTree],
    count: int,
    workers: Workers,
    ledger: Ledger,
    tick: Callable[[Workers], None],
    *,
    guards: Mapping[float, Allocation] | None = None,
) -> dict[float, Confirmed]:
    """Scores each tree's best `count` allocations, and the uniform one, on the samples kept back.

    What the ledger holds is not evaluated again.

    Args:
        guards: by target an allocation that is scored, too, because the answer must not be behind it.
    """
    finalists = {target: _finalists(tree, count, (guards or {}).get(target)) for target, tree in trees.items()}
    wanted = [Candidate(allocation, confirms=True) for each in finalists.values() for allocation in each]
    found = evaluate_recorded(wanted, workers, ledger, lambda _: tick(workers))
    return {target: {allocation: found[allocation] for allocation in each} for target, each in finalists.items()}


def _finalists(tree: SearchTree, count: int, guard: Allocation | None) -> list[Allocation]:
    others = [uniform(tree.space, tree.budget), *([guard] if guard else [])]
    return list(dict.fromkeys([*tree.ranked[:count], *others]))
