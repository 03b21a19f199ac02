"""What `lop compare` and `lop demo` leave for people: a table, plots, and the same numbers as JSON."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from lop.console import PlainConsole
from lop.methods.registry import CONTEXTUAL, DROPPINGS, EVERY
from lop.model.samples import FORMS
from lop.report.cells import recovered_in_words
from lop.report.compare import Average, Comparison, Recovered, Spent, asked, bootstrap
from lop.report.intervals import Interval
from lop.report.needs import needs_in_words, without_checkpoint
from lop.report.operations import Answered, Way
from lop.report.plots import plot_accuracy, plot_allocations, plot_search, plot_trees
from lop.run.results import Found, read_search
from lop.run.run import Run
from lop.space.allocation import uniform
from lop.space.size import ModelSize
from lop.storage.files import atomic_file, read_json

_FORM_NAMES = {"choice": "multiple choice", "yes_no": "yes / no", "word": "one word"}


def write_report(run: Run, comparison: Comparison, answered: Mapping[Way, Answered] | None = None) -> Path:
    """Writes the plots and `report.md` into the run's folder; prints the table.

    Args:
        answered: what ways to compute less answer.

    Raises:
        LopError: an earlier stage has not been run.
    """
    found = read_search(run)
    ratios = np.array([result.best.ratios(run.space) for result in found])
    plot_accuracy(comparison.averages, run.folder / "accuracy.png")
    plot_allocations(found, ratios, run.folder / "allocations.png", parts=len(run.space.parts))
    plot_search(found, run.config.search.reward, run.folder / "search.png")
    if any(result.depths for result in found):  # Searches of earlier versions did not tell.
        plot_trees(found, run.folder / "trees.png")
    with atomic_file(run.report_file) as temporary:
        temporary.write_text(_markdown(run, comparison, answered or {}), encoding="utf-8")
    print_table(comparison)
    return run.report_file


def print_table(comparison: Comparison) -> None:
    """The comparison as a table on the terminal."""
    table = Table(title="Accuracy on the test samples (mean over forms, 95% interval)")
    targets = sorted({average.target for average in comparison.averages if average.method != "dense"})
    table.add_column("method")
    for target in targets:
        table.add_column(f"{target:.0%} pruned", justify="right")
    by_key = {(average.method, average.target): average for average in comparison.averages}
    dense = by_key["dense", 0.0]
    table.add_row("dense", *[_percent(dense)] * len(targets))
    for method in dict.fromkeys(average.method for average in comparison.averages if average.method != "dense"):
        table.add_row(method, *(_percent(by_key[method, target]) for target in targets))
    PlainConsole().print(table)


def _markdown(run: Run, comparison: Comparison, answered: Mapping[Way, Answered]) -> str:
    config, search = run.config, run.config.search
    predictors = read_json(run.folder / "predictors.json")
    targets = search.targets.ratios
    seconds = run.seconds()
    parts = [
        f"# LOP on `{config.model}`",
        f"{run.space.layers} layers of {run.space.neurons} FFN neurons, widths in steps of {run.space.granularity}"
        f"{_attention(run)}; "
        f"{len(run.samples.calibration)} calibration, {len(run.samples.reward)} reward and "
        f"{len(run.samples.test)} test samples, which share no image{_limited(run)}. The search: {len(targets)} "
        f"targets from {targets[0]:.1%} to {targets[-1]:.1%}, {search.simulations} simulations and at most "
        f"{search.evaluations} evaluated allocations each (the paper: 300 and 200), roots: "
        f"{', '.join(search.roots) or 'none'}.",
        "## Accuracy on the test samples",
        f"Every method {recovered_in_words(run)}. Mean over the forms of question, with the 95% interval of a "
        "bootstrap over images. The last column is the difference to the best baseline at that target, in points, "
        "paired on the same questions.",
        _average_table(comparison),
        "![Accuracy by target](accuracy.png)",
        "### By form of question",
        "Share of exact answers, with Wilson's 95% interval.",
        _form_table(comparison),
        *_recovery_parts(comparison),
        *_operations_parts(run, answered),
        *_confirmation_parts(run, read_search(run)),
        "## Needs and seconds",
        "What a method needs beside the weights, with the memory that a further pass over the samples takes on top of "
        "what calibration takes. `calibrate`, further passes included, is spent once for a model, `allocate` and "
        "`apply` for each target (medians). What `lop-search` allocates is its own search for one target; "
        "`lop-predictor` has the search and the training behind it, once for all targets.",
        _seconds_table(comparison.seconds, run.size),
        *without_checkpoint(spent.method for spent in comparison.seconds),
        "Once for all targets, in this run: "
        + ", ".join(f"{stage} {spent:.1f} s" for stage, spent in seconds.items())
        + ".",
        "## Predictors",
        f"Trained on what the search found best by {search.reward.replace('_', ' ')} at "
        f"{len(predictors['training_targets'])} targets; validated at "
        f"{', '.join(f'{target:.1%}' for target in predictors['validation_targets'])}, which training did not see. "
        f"Chosen by the mean reward at all targets: **{predictors['chosen']}**.",
        _predictor_table(predictors),
        "## Search",
        "![Best reward by evaluation](search.png)",
        "![Allocations by layer](allocations.png)",
        *(["![Nodes and visits by depth](trees.png)"] if (run.folder / "trees.png").exists() else []),
    ]
    return "\n\n".join(parts) + "\n"


def _attention(run: Run) -> str:
    attention = run.space.attention
    if attention is None:
        return ""
    return (
        f", and {attention.groups} groups of attention heads, pruned like them: ratios are shares of the parameters of "
        "both, and methods that know FFNs alone keep attention dense where the budget allows"
    )


def _limited(run: Run) -> str:
    most = run.config.compare.limit
    return f" ({most} questions of the last, drawn at random, are compared on)" if most else ""


def _confirmation_parts(run: Run, found: Sequence[Found]) -> list[str]:
    """What the search's reward said of its answer and of the uniform allocation, and what samples kept back say."""
    if not any(result.confirmed for result in found):
        return []
    reward = run.config.search.reward
    header = ["pruned", "answer: searched", "answer: kept back", "uniform: searched", "uniform: kept back"]
    rows = []
    for result in found:
        searched, confirmed = dict(result.evaluations), dict(result.confirmed)
        numbers = [
            "-" if allocation not in evaluations else f"{evaluations[allocation].worth(reward):.4f}"
            for allocation in (result.best, uniform(run.space, run.space.budget(result.target)))
            for evaluations in (searched, confirmed)
        ]
        rows.append([f"{result.target:.1%}", *numbers])
    return [
        "## The answers on samples kept back",
        f"Rewards ({reward.replace('_', ' ')}, more is better) by which the search chose its finalists, and on the "
        "part of the reward samples that it did not see, by which the answer was chosen among them. The best of many "
        "scores is partly the luckiest; what is kept back tells by how much.",
        _table(header, rows),
    ]


def _average_table(comparison: Comparison) -> str:
    rows = [
        [
            average.method,
            f"{average.target:.0%}",
            _percent(average),
            "" if average.method == "dense" else f"{_points(average.difference)} against {average.best_baseline}",
        ]
        for average in comparison.averages
    ]
    return _table(["method", "pruned", "accuracy (%)", "against the best baseline"], rows)


def _form_table(comparison: Comparison) -> str:
    cells: dict[tuple[str, float], dict[str, str]] = {}
    for row in comparison.rows:
        text = f"{100 * row.accuracy:.1f} ({100 * row.low:.1f} to {100 * row.high:.1f})"
        cells.setdefault((row.method, row.target), {})[row.form] = text
    rows = [
        [method, f"{target:.0%}", *(forms.get(form, "") for form in FORMS)] for (method, target), forms in cells.items()
    ]
    return _table(["method", "pruned", *(_FORM_NAMES[form] for form in FORMS)], rows)


def _recovery_parts(comparison: Comparison) -> list[str]:
    """How each recovery does on every method's allocation: what is due to the allocation, and what to the recovery."""
    if not comparison.recoveries:
        return []
    kinds = list(dict.fromkeys(result.recovery for result in comparison.recoveries))
    columns = [*kinds, *(f"{kind} − {other}" for at, kind in enumerate(kinds) for other in kinds[:at])]
    order = list(EVERY)
    cells: dict[tuple[str, float], dict[str, str]] = {}
    for result in comparison.recoveries:
        row = cells.setdefault((result.method, result.target), {})
        row[result.recovery] = _percent(result)
        row |= {f"{result.recovery} − {other}": _points(value) for other, value in result.differences.items()}
    rows = [
        [method, f"{target:.0%}", *(row.get(column, "-") for column in columns)]
        for (method, target), row in sorted(cells.items(), key=lambda item: (item[0][1], order.index(item[0][0])))
    ]
    return [
        "## Recovery",
        "The same allocations and neurons with each recovery, LOP's and the baselines' alike: accuracy in percent, and "
        "differences in points, paired on the same questions. `bias` adds the pruned neurons' mean contribution, "
        "`refit` solves for new `down_proj` weights on the calibration samples.",
        _table(["method", "pruned", *columns], rows),
    ]


def _operations_parts(run: Run, answered: Mapping[Way, Answered]) -> list[str]:
    """What computes less and leaves the weights, by operations: for images' tokens, and with other neurons by token."""
    if not answered:
        return []
    parts = [
        "## At equal operations",
        "What computes less and leaves the weights is told by the operations of the language backbone, as a share of "
        "the dense model's, counted from shapes (`lop.model.beyond.flops`). Each is held against the widest of "
        "`lop-predictor`'s allocations that computes no more, paired on the same questions; all of LOP's widths with "
        f"recovery `{run.config.scored_recovery}`. `seconds` are those to set it up. No checkpoint holds any of them: "
        "what differs is how weights are used.",
    ]
    interval = bootstrap(asked(run))
    for told, ways in (
        ("Less for a share of images' tokens, of the dense model and of LOP's:", DROPPINGS),
        ("Other neurons for each token, a share of which it does not use; all weights stay:", CONTEXTUAL),
    ):
        rows = [
            {
                "method": way.method,
                "share": f"{way.share:.0%}",
                **({"on LOP at": f"{way.base:.0%}"} if ways is DROPPINGS else {}),
                **_against_lop(found, interval),
                "needs": needs_in_words(ways[way.method].needs, run.size),
                "parameters added": f"{found.added:,}",
                "seconds": f"{found.seconds:.2f}",
            }
            for way, found in answered.items()
            if way.method in ways
        ]
        if rows:
            parts += [told, _table(list(rows[0]), [list(row.values()) for row in rows])]
    return parts


def _against_lop(found: Answered, interval: Callable[[np.ndarray], Interval]) -> dict[str, str]:
    lead = None if found.ratio is None else interval(found.hits.astype(np.int64) - found.alone.astype(np.int64))
    return {
        "operations": f"{found.flops:.1%}",
        "accuracy (%)": _interval(interval(found.hits)),
        "LOP alone at": "-" if found.ratio is None else f"{found.ratio:.1%}",
        "ahead of it by": "-" if lead is None else _points(lead),
    }


def _seconds_table(spent: tuple[Spent, ...], size: ModelSize) -> str:
    rows = [
        [
            of.method,
            needs_in_words(EVERY[of.method].needs, size),
            f"{of.seconds.calibrate:.3f}",
            f"{of.seconds.allocate:.6f}",
            f"{of.seconds.apply:.4f}",
        ]
        for of in spent
    ]
    return _table(["method", "needs", "calibrate", "allocate", "apply"], rows)


def _predictor_table(predictors: dict[str, Any]) -> str:
    rows = [
        [p["architecture"], f"{p['parameters']:,}", f"{p['validation_error']:.5f}", f"{p['reward']:.4f}"]
        for p in predictors["architectures"]
    ]
    # Which was not trained for this model; runs made before do not know it.
    rows += [[other["source"], "", "", f"{other['reward']:.4f}"] for other in predictors.get("others", [])]
    return _table(["architecture", "parameters", "validation MSE", "mean reward"], rows)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _points(difference: Interval) -> str:
    return f"{100 * difference.value:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"


def _percent(result: Average | Recovered) -> str:
    return _interval(result.accuracy)


def _interval(value: Interval) -> str:
    return f"{100 * value.value:.1f} ({100 * value.low:.1f} to {100 * value.high:.1f})"
