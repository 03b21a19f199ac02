"""Moves from one allocation to another of the same budget."""

from collections.abc import Callable

import numpy as np

from lop.space.allocation import Allocation, Space, project

Move = Callable[[Allocation, Space, np.random.Generator, float], Allocation]
_MOST_WAVES = 4


def perturb(allocation: Allocation, space: Space, random: np.random.Generator, size: float) -> Allocation:
    """Every layer's ratio by up to `size`, up or down: the paper's (LOP A.3)."""
    return _moved(allocation, space, random.uniform(-size, size, space.layers))


def bend(allocation: Allocation, space: Space, random: np.random.Generator, size: float) -> Allocation:
    """Ratios that change smoothly over depth: up to four cosines, together up to about `size`."""
    depth = (np.arange(space.layers) + 0.5) / space.layers
    waves = np.arange(1, _MOST_WAVES + 1)
    heights = random.normal(size=_MOST_WAVES) / waves
    return _moved(allocation, space, size * np.cos(np.pi * np.outer(depth, waves)) @ heights)


def exchange(allocation: Allocation, space: Space, random: np.random.Generator, size: float) -> Allocation:
    """One layer, or two neighbours, give to one or two others."""
    step = random.uniform(0, size) * 2
    move = np.zeros(space.layers)
    for sign in (1, -1):
        first = int(random.integers(space.layers))
        width = int(random.integers(1, 3))
        move[first : first + width] += sign * step / width
    return _moved(allocation, space, move)


MOVES: tuple[Move, ...] = (perturb, bend, exchange)


def _moved(allocation: Allocation, space: Space, move: np.ndarray) -> Allocation:
    return project(np.array(allocation.ratios(space)) + move, space, allocation.budget)
