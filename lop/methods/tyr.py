"""Týr-the-Pruner (Li et al., NeurIPS 2025): a supernet of widths, and sparsity shifted between layers, coarse to fine.

The supernet has each layer at many widths, each with local recovery: neurons removed by the second-order rule of the
optimal brain surgeon (`lop.model.removal`; in the paper and in `src/local_pruner.py` by OSSCAR's, in 16 rounds where
here each is one), and the remaining weights solved for, which is recovery `refit`. Evolution then shifts sparsity
between layers under the fixed budget (`search_sparsity_dist.py` of github.com/AMD-AGI/Tyr-the-Pruner): an offspring is
its parent after one to four moves, the lesser of two draws, of one step from one layer to another; offspring are
selected on more and more tokens by KL, and the parent stays unless one is better. Four iterations, from steps of 12.5%
of a layer down to 1.56%, each start where the one before ended and stay within four steps of that: the nine levels of
its supernet (`script/example.sh`).

Published: 50 generations of 128 offspring an iteration, on 2k, 16k and 131k tokens (survivors 16, 4, 2). Here all
iterations together may spend what every method may, in the generations of `evolution`. The supernet's layers see the
dense model's inputs, where the published ones see those of a pruned model (error accumulation). Not covered: attention
heads.
"""

from collections.abc import Iterator, Sequence

from lop.methods.evolution import ROUNDS, Reach, evolve
from lop.methods.method import Discovery, Method, Need, Reward, Search, Side, look_up
from lop.space.allocation import Space, uniform

_COARSEST = 0.125
_ITERATIONS = 4
_LEVELS = 4  # To either side.
_MOVES = 4


def steps(space: Space) -> list[int]:
    """Neurons of a move in each iteration, coarse to fine: halved, in multiples of the granularity."""
    wanted = [_COARSEST / 2**iteration * space.neurons / space.granularity for iteration in range(_ITERATIONS)]
    return list(dict.fromkeys(max(round(units), 1) * space.granularity for units in wanted))


def coarse_to_fine(space: Space, reward: Reward, budgets: Sequence[int], seed: int) -> Iterator[Discovery]:
    """From the uniform allocation, for each budget."""
    sizes = steps(space)
    for budget in budgets:
        best, known = uniform(space, budget), reward.worth(uniform(space, budget))
        curve = [(1.0, known[0])]
        for iteration, size in enumerate(sizes):
            before = curve[-1][0]
            for state in evolve(
                best,
                space,
                reward.worth,
                evaluations=(reward.evaluations - before) / (len(sizes) - iteration),
                seed=(seed, budget, iteration),
                step=size,
                moves=_MOVES,
                reach=Reach(best, _LEVELS * size),
                known=known,
            ):
                curve.append((before + state.spent, state.worth[0]))
            best, known = state.best, state.worth
        yield Discovery(budget, best, known, tuple(curve))


METHOD = Method(
    "tyr",
    Side.RIVAL,
    look_up,
    needs=frozenset({Need.ACTIVATIONS, Need.EVALUATIONS, Need.REMOVAL}),
    importance="surgeon",
    search=Search(coarse_to_fine, shares=tuple(selection.share for selection in ROUNDS)),
    has_profile=True,
    label="Týr",
    in_curves="Týr",
)
