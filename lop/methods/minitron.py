"""Minitron (Muralidharan et al., NeurIPS 2024; NVIDIA ModelOpt): equal widths, of the neurons that answer least.

Neurons are ranked by (the paper's activation-based importance; github.com/NVIDIA/Model-Optimizer: `L2NormHook` in
`modelopt/torch/prune/importance_hooks/base_hooks.py`)

    sqrt(Σ_s (1/T_s · Σ_t |h_j(x_st)|)²),

the L2 norm over sequences s of the mean over their tokens t, its best aggregation. The hook sees the input of
`down_proj`, as here. Not covered: the widths of the residual stream and of attention, whole layers, the search among
candidates of equal size, and the distillation afterwards.
"""

from lop.methods.method import Method, Need, Side, reading
from lop.methods.spread import equal_ratios

METHOD = Method(
    "minitron",
    Side.BASELINE,
    reading(equal_ratios),
    needs=frozenset({Need.ACTIVATIONS, Need.SEQUENCES}),
    importance="sequences",
    start=equal_ratios,
    label="Minitron",
)
