"""LOP's predictor: the allocation that a network, trained on what the search found, predicts for the budget."""

import time

from lop.errors import LopError
from lop.methods.method import Given, Method, Need, Root, Side
from lop.space.allocation import Allocation


def predicted(given: Given, budget: int) -> tuple[Allocation, float]:
    """What the predictor says.

    Raises:
        LopError: there is none.
    """
    if given.predictor is None:
        raise LopError("the predictor is missing: run `lop train` first")
    given.predictor.allocate(budget)  # The first call pays for set-up that later ones do not.
    start = time.perf_counter()
    allocation = given.predictor.allocate(budget)
    return allocation, time.perf_counter() - start


METHOD = Method(
    "lop-predictor",
    Side.LOP,
    predicted,
    needs=frozenset({Need.ACTIVATIONS, Need.PREDICTOR}),
    in_report=True,
    has_profile=True,
    label="LOP predictor",
)
# Where LOP's search may start on a model that was calibrated, and at most probed.
GENERAL = Method("general", Side.LOP, predicted, needs=METHOD.needs, root=Root.PREDICTED, is_compared=False)
