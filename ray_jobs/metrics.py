"""A search's progress as metrics of the Ray cluster, which its dashboard and Prometheus show."""

import math

from ray.util.metrics import Gauge

from lop.search.progress import Progress, Sink


def metrics_sink() -> Sink:
    """Sets the gauges `lop_*`; needs a process that is connected to a cluster.

    Gauges, not counters: a search that is resumed begins with what it had done before.
    """
    done = Gauge("lop_evaluations_done", "Evaluations that the search's trees have committed.")
    planned = Gauge("lop_evaluations_planned", "Evaluations that the search's trees plan in all.")
    rate = Gauge("lop_evaluations_per_second", "Evaluations per second over the last two minutes.")
    left = Gauge("lop_seconds_left", "Seconds until the search ends at this rate; NaN while it is not known.")
    workers = Gauge("lop_workers_alive", "Evaluator actors that are ready.")
    best = Gauge("lop_best_reward", "Best reward so far.", tag_keys=("target",))

    def publish(progress: Progress) -> None:
        done.set(progress.done)
        planned.set(progress.planned)
        rate.set(progress.per_second)
        left.set(math.nan if progress.seconds_left is None else progress.seconds_left)
        workers.set(progress.workers)
        for target in progress.targets:
            if target.best is not None:
                best.set(target.best, tags={"target": f"{target.target:g}"})

    return publish
