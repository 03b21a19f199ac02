"""`lop evaluate`: a checkpoint under lmms-eval, on the embedded benchmark or the real ones, and what is known kept."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lop.errors import LopError, first_line
from lop.model.find import assets, find_model, fingerprint_model
from lop.model.sources import check_checkpoint
from lop.report.benchmark import FOLDER, TASKS
from lop.storage.destination import check_writable
from lop.storage.files import read_as, write_json
from lop.storage.fingerprint import fingerprint, fingerprint_file
from lop.storage.location import Location

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

log = logging.getLogger(__name__)
EMBEDDED_TASKS = tuple(f"lop_{task}" for task in TASKS)
REAL_TASKS = ("mmbench_en_dev", "mme", "mmmu_val", "pope")
_METRICS = Path(str(files("lop"))) / "report" / "benchmark.py"
_EXTRA = "lmms-eval is not installed: pip install 'lop-vl[eval]'"


@dataclass(frozen=True)
class Evaluate:
    """How to evaluate.

    Attributes:
        batch_size: sequences generated together.
        device, dtype: as in LOP's config.
        limit: documents of each task; all if None.
        data: for a task the local folder with its data, in place of the hub or its cache.
        cache: where results are kept, by checkpoint and task; None keeps none.
    """

    batch_size: int = 16
    device: str = "auto"
    dtype: str = "auto"
    limit: int | None = None
    data: Mapping[str, Path] | None = None
    cache: Path | None = None


def manifest() -> "list[ModelManifest]":
    """What lmms-eval asks of a plugin: the models' names and where their classes are."""
    from lmms_eval.models.registry_v2 import ModelManifest

    own = ModelManifest(model_id="lop", simple_class_path="lop.plugins.lmms_lop.LopQwenVL")
    theirs = "lop.plugins.lmms_qwen.LopQwen2_5_VL"
    return [own, ModelManifest("lop_qwen2_5_vl", simple_class_path=theirs, chat_class_path=f"{theirs}Chat")]


def tasks_folder() -> Path:
    """The folder with the embedded benchmark's task files, for lmms-eval's `--include_path`."""
    return Path(str(files("lop"))) / "plugins" / "tasks"


def evaluate(model: str, tasks: Sequence[str], options: Evaluate) -> dict[str, dict[str, float]]:
    """Each task's metrics, as lmms-eval reports them; read from the cache where the same has been measured.

    Args:
        model: 'tiny', a local checkpoint (dense or pruned by LOP) or a hub id.
        tasks: names of lmms-eval's tasks; `embedded` and `real` stand for LOP's own four and the four of the paper.

    Raises:
        LopError: lmms-eval is not installed, LOP does not take the model, or a task is unknown or its data cannot be
            had; says which.
    """
    try:
        import lmms_eval  # noqa: F401
    except ImportError:
        raise LopError(_EXTRA) from None
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    folder = find_model(model)
    check_checkpoint(folder)
    loaded = {name: _load_task(name, options) for name in _expand(tasks)}
    checkpoint = fingerprint_model(folder)
    found: dict[str, dict[str, float]] = {}
    waiting = {}
    for name, (task, manager) in loaded.items():
        made_from = {"checkpoint": checkpoint, "task": _task_fingerprint(name, task, options)}
        path = options.cache / f"{name}-{fingerprint(made_from)}.json" if options.cache else None
        known = _read_metrics(path) if path and path.exists() else None
        if known is not None:
            log.info("evaluate: %s is known already (%s)", name, path)
            found[name] = known
        else:
            waiting[name] = (task, manager, path, made_from)
    if waiting:
        if options.cache:
            check_writable(Location.parse(options.cache))
        adapter = _adapter(folder, options)
        for name, (task, manager, path, made_from) in waiting.items():
            found[name] = _run(adapter, task, manager, name, options)
            if path:
                write_json(path, {"task": name, "model": model, **made_from, "metrics": found[name]})
    return {name: found[name] for name in loaded}


def _read_metrics(path: Path) -> dict[str, float] | None:
    """What an earlier evaluation has kept; None if it is damaged: then the same is measured again."""
    try:
        return read_as(path, _parse_metrics)
    except LopError as error:
        log.warning("%s; measured again", error)
        return None


def _parse_metrics(record: Any) -> dict[str, float]:
    return {str(metric): float(value) for metric, value in record["metrics"].items()}


def _expand(tasks: Sequence[str]) -> list[str]:
    groups = {"embedded": EMBEDDED_TASKS, "real": REAL_TASKS}
    return list(dict.fromkeys(name for task in tasks for name in groups.get(task, (task,))))


def _load_task(name: str, options: Evaluate) -> tuple[Any, Any]:
    """lmms-eval's task object, with its data, and its manager."""
    from lmms_eval.tasks import TaskManager, get_task_dict

    is_embedded = name in EMBEDDED_TASKS
    # lmms-eval's own tasks take eight seconds to index.
    manager = TaskManager("WARNING", include_path=str(tasks_folder()), include_defaults=not is_embedded)
    if name not in manager.all_tasks:
        raise LopError(
            f"task {name!r} is none of lmms-eval's: name {', '.join((*EMBEDDED_TASKS, *REAL_TASKS))} or another"
        )
    if name == "mmbench_en_dev" and not os.environ.get("OPENAI_API_KEY"):
        log.warning("mmbench_en_dev asks OPENAI_API_KEY's model what an unclear answer means, and guesses without one")
    local = (options.data or {}).get(name)
    wanted = name if local is None else {"task": name, "dataset_path": str(local), "dataset_kwargs": {}}
    try:
        return get_task_dict([wanted], manager)[name], manager
    except Exception as error:
        place = f"in {local}" if local else "on the hub or in its cache"
        raise LopError(
            f"task {name}: its data is not to be had {place} ({first_line(error)}): "
            f"name a local copy with --data {name}=FOLDER"
        ) from None


def _task_fingerprint(name: str, task: Any, options: Evaluate) -> str:
    """What a task's numbers depend on besides the checkpoint."""
    if name in EMBEDDED_TASKS:
        yaml = tasks_folder() / f"{name}.yaml"
        data = assets() / "samples" / FOLDER / f"{name.removeprefix('lop_')}.parquet"
        made_from: Any = [fingerprint_file(yaml), fingerprint_file(data), fingerprint_file(_METRICS)]
    else:
        docs = task.test_docs() if task.has_test_docs() else task.validation_docs()
        made_from = [json.dumps(task.dump_config(), default=str, sort_keys=True), getattr(docs, "_fingerprint", "")]
    settings = [options.limit, options.device, options.dtype, options.batch_size, version("lmms-eval")]
    return fingerprint([name, made_from, settings])


def _adapter(folder: Path, options: Evaluate) -> Any:
    from lop.plugins.lmms_lop import LopQwenVL

    return LopQwenVL(str(folder), batch_size=options.batch_size, device=options.device, dtype=options.dtype)


def _run(adapter: Any, task: Any, manager: Any, name: str, options: Evaluate) -> dict[str, float]:
    from lmms_eval.evaluator import simple_evaluate

    results = simple_evaluate(
        model=adapter,
        tasks=[task],
        task_manager=manager,
        limit=options.limit,
        batch_size=options.batch_size,
        log_samples=False,
        bootstrap_iters=0,
        process_docs_parallel=1,
        verbosity="WARNING",
    )
    if results is None:
        raise LopError(f"task {name}: lmms-eval gave no result")
    return {
        key.partition(",")[0]: float(value)
        for key, value in results["results"][name].items()
        if isinstance(value, (int, float)) and not key.startswith(("samples", "alias")) and "stderr" not in key
    }
