"""Smaller than pruning alone: `python benchmarks/smaller.py`, over its three parts, each a benchmark of its own.

`distil` (`smaller_distil.py`): what distillation brings back. `bits` (`smaller_bits.py`): what 8 and 4 bits cost, and
what pruning and bits are worth together. `edge` (`smaller_edge.py`): whether llama.cpp says the same. Each keeps its
cells under `results/smaller`; what is missing is made, which takes hours on two cores, and `--parts` names those to be
made or printed. `--check N` makes N cells of each part again, chosen at random, and says whether they agree.

The last line is JSON: what the parts' last lines say, among it `distilled_back` by method and ratio,
`four_bit_kl_ratio` by ratio, `joint_lead` by size, and `gguf_kl` by model, widths and type.
"""

import argparse
import importlib
import json
from typing import Any

import torch

PARTS = ("distil", "bits", "edge")


def main() -> None:
    """Makes what is missing, and prints."""
    parser = argparse.ArgumentParser(description="Distillation, fewer bits, and files for the edge.")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--check", type=int, default=0, metavar="N", help="make N cells of each part again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines: dict[str, Any] = {"checked": 0, "agree": 0} if options.check else {}
    for part in options.parts:
        # When it is its turn: llama.cpp's package is needed by `edge` alone.
        module = importlib.import_module(f"smaller_{part}")
        print(f"-- {part}")
        if options.check:
            checked, agree = module.check(options.check)
            lines["checked"] += checked
            lines["agree"] += agree
        else:
            lines |= module.summary()
    print(json.dumps(lines | {"benchmark": "smaller"}))


if __name__ == "__main__":
    main()
