"""LOP's search: the best allocation that a run's own search has found for the budget."""

from lop.methods.method import Method, Need, Side, look_up

METHOD = Method(
    "lop-search",
    Side.LOP,
    look_up,
    needs=frozenset({Need.ACTIVATIONS, Need.SEARCH}),
    in_report=True,
    has_profile=True,
    label="LOP search",
    in_curves="MCTS with roots",
)
