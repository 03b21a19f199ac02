"""Moves from one allocation to another of the same budget."""

from collections.abc import Callable

import numpy as np

from lop.space.allocation import Allocation, Space, project

Move = Callable[[Allocation, Space, int, np.random.Generator, float], Allocation]
_MOST_WAVES = 4


def perturb(allocation: Allocation, space: Space, budget: int, random: np.random.Generator, size: float) -> Allocation:
    """Every axis's ratio by up to `size`, up or down: the paper's (LOP A.3)."""
    return _moved(allocation, space, budget, random.uniform(-size, size, space.axes))


def bend(allocation: Allocation, space: Space, budget: int, random: np.random.Generator, size: float) -> Allocation:
    """Ratios that change smoothly over depth, by part: up to four cosines, together up to about `size`."""
    depth = (np.arange(space.layers) + 0.5) / space.layers
    waves = np.arange(1, _MOST_WAVES + 1)
    shapes = size * np.cos(np.pi * np.outer(depth, waves))
    move = [shapes @ (random.normal(size=_MOST_WAVES) / waves) for _ in space.parts]
    return _moved(allocation, space, budget, np.concatenate(move))


def exchange(allocation: Allocation, space: Space, budget: int, random: np.random.Generator, size: float) -> Allocation:
    """One axis, or two neighbours of one part, give to one or two others."""
    step = random.uniform(0, size) * 2
    move = np.zeros(space.axes)
    for sign in (1, -1):
        first = int(random.integers(space.axes))
        width = int(random.integers(1, 3))
        last = first // space.layers * space.layers + space.layers  # Of its part.
        move[first : min(first + width, last)] += sign * step / width
    return _moved(allocation, space, budget, move)


MOVES: tuple[Move, ...] = (perturb, bend, exchange)


def _moved(allocation: Allocation, space: Space, budget: int, move: np.ndarray) -> Allocation:
    return project(np.array(allocation.ratios(space)) + move, space, budget)
