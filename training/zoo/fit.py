"""Compares the kinds of predictors by leaving out one model after the other, and writes the one that ships.

    python -m training.zoo.fit [--kind KIND]

Printed for each kind: the error of the logarithm of damages on models left out, the rank agreement with what was
measured (Kendall's τ), and how many of the measured damages lie in the 90% intervals. Which kind ships is decided by
what its allocations cost on models left out (`benchmarks/transfer.py`).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lop.predictor.curves import Curves, Rule
from lop.predictor.general_training import FITS, Measured, fit_general, leave_one_out
from training.zoo.data import load_members

OUT = Path("lop/assets/general/predictor.safetensors")
KIND, RULE = "ridge", Rule(power=1.0, cap=0.3)


def agreement(curves: Curves, member: Measured) -> dict[str, float]:
    """How predicted curves agree with what was measured of a model that was left out."""
    known = ~np.isnan(member.logs)
    error = curves.mean[known] - member.logs[known]
    low, high = curves.interval()
    inside = (low <= member.damages) & (member.damages <= high)
    return {
        "error": float(np.sqrt(np.mean(error**2))),
        "tau": kendall(curves.mean[known], member.logs[known]),
        "inside": float(inside[known].mean()),
    }


def kendall(first: np.ndarray, second: np.ndarray) -> float:
    """Kendall's τ of two lists [n]: the share of pairs that they order alike, less that of those they do not."""
    pairs = np.triu_indices(len(first), 1)
    alike = np.sign(first[pairs[0]] - first[pairs[1]]) * np.sign(second[pairs[0]] - second[pairs[1]])
    return float(alike.mean())


def compare(members: Sequence[Measured]) -> dict[str, dict[str, dict[str, float]]]:
    """By kind and member left out."""
    found = {}
    measured = [member for member in members if member.is_measured]
    for kind in FITS:
        left_out = leave_one_out(kind, members)
        found[kind] = {
            member.name: agreement(left_out[member.name].curves(member.features), member) for member in measured
        }
    return found


def main() -> None:
    """Prints the comparison and writes what ships."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=FITS, default=KIND)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    members = load_members()
    for kind, found in compare(members).items():
        for name, values in found.items():
            print(f"{kind:<13} {name:<9}", " ".join(f"{key} {value:.3f}" for key, value in values.items()))
        means = {key: np.mean([values[key] for values in found.values()]) for key in ("error", "tau", "inside")}
        print(f"{kind:<13} {'mean':<9}", " ".join(f"{key} {value:.3f}" for key, value in means.items()))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    fit_general(options.kind, members, rule=RULE).save(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
