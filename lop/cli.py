"""The command line: parse, call one function of the library, print."""

import argparse
import atexit
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tqdm import tqdm

from lop.checkpoint.formats import FORMATS
from lop.checkpoint.recoveries import RECOVERIES
from lop.errors import LopError
from lop.interrupt import Interrupted, interruptible
from lop.model.find import EMBEDDED, SHIPPED, find_model
from lop.run.config import Config, find_config, load_config
from lop.space.size import Target, parse_count
from lop.storage.places import check_lasting
from lop.terminal import prepare_streams, say, settle_streams

# Commands import what they run, torch with it: help and refusals need not wait for that.
if TYPE_CHECKING:
    from lop.run.run import Run

log = logging.getLogger(__name__)
Command = Callable[[argparse.Namespace], None]
_SHIPPED = " or ".join(map(repr, SHIPPED))
_SERVED_HELP = "a run to serve, again for each; without any, what ships for the embedded model"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns the exit code: 0, 2 for what the user can mend, 130 for Ctrl-C, 143 for SIGTERM, 141 where whoever read the
    output has left.
    """
    prepare_streams()
    options = build_parser().parse_args(arguments)
    return exit_code(partial(run_stages, options))


def run_stages(options: argparse.Namespace) -> int:
    """Runs what the options were parsed for, one after the other, and returns 0.

    Raises:
        LopError, OSError: one of them fails; the others after it are not run.
    """
    for stage in options.stages:
        with _at(options):
            stage(options)
    return 0


def exit_code(action: Callable[[], int]) -> int:
    """What the action returns, or what its end by an error or a signal comes to, which is told in one line."""
    set_up_logging()
    try:
        with interruptible():
            code = action()
        sys.stdout.flush()
    except LopError as error:
        return _complain(str(error))
    except BrokenPipeError:  # The reader (`| head`) has seen enough; what was being done may not be.
        return 141
    except OSError as error:
        # What the system says comes in parts; what remote storage says is a sentence that names the place.
        return _complain(f"{error.filename or 'disk'}: {error.strerror}" if error.strerror else str(error))
    except KeyboardInterrupt as error:
        say("lop: interrupted; the same command goes on where it stopped")
        interrupted = error.code if isinstance(error, Interrupted) else 130
        # What had to be put in order is: to take torch and Ray apart would cost seconds more.
        atexit.register(os._exit, interrupted)
        return interrupted
    finally:
        settle_streams()
    return code


class _Parser(argparse.ArgumentParser):
    """Refuses what it cannot read in one line, as everything else is refused."""

    def error(self, message: str) -> NoReturn:
        sys.exit(_complain(f"{message} (see `{self.prog} --help`)"))


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="lop",
        description="Prune a Qwen2.5-VL checkpoint to any size: search allocations once, then predict them.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, summary: str, *actions: Command, common: bool = True) -> argparse.ArgumentParser:
        stage = commands.add_parser(name, help=summary, description=f"{summary}.")
        stage.set_defaults(stages=actions, default_config=None)
        if common:
            _add_common(stage)
        return stage

    calibrate = add("calibrate", "collect the statistics of every FFN neuron on the calibration samples", _calibrate)
    _add_workers(calibrate)
    search = add("search", "run one UCB tree per target on the reward samples, or go on with it", _search)
    _add_workers(search)
    _add_max_width(search)
    train = add("train", "train the predictors on what the search found", _train)
    _add_workers(train)
    predict = add("predict", "print the allocation for a target", _predict)
    _add_target(predict)
    _add_form(predict)
    _add_max_width(predict)
    predict.add_argument("--json", action="store_true", help="print one JSON object")
    prune = add("prune", "write the pruned checkpoint for a target", _prune)
    _add_target(prune)
    _add_form(prune)
    _add_max_width(prune)
    prune.add_argument(
        "--out", type=_name, required=True, metavar="DIR", help="a new folder, or a URI such as s3://bucket/folder"
    )
    inspect = add("inspect", "tell what a checkpoint is, and check its files", _inspect, common=False)
    inspect.add_argument(
        "model", type=_name, metavar="MODEL", help=f"'{EMBEDDED}', a local checkpoint, dense or pruned, or a hub id"
    )
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    rivals = add("rivals", "run the rivals that search, each with as many evaluations as a tree", _rivals)
    _add_workers(rivals)
    rivals.add_argument("--seeds", type=int, metavar="N", help="repeat with N seeds")
    compare = add("compare", "evaluate LOP and the baselines on the test samples and write report and tables", _compare)
    _add_workers(compare)
    _add_compare(compare)
    stages = (_calibrate, _search, _train, _compare)
    pipeline = add("pipeline", "run calibrate, search, train and compare, up to the first that fails", *stages)
    _add_workers(pipeline)
    _add_max_width(pipeline)
    _add_compare(pipeline)
    evaluate = add("evaluate", "evaluate a checkpoint under lmms-eval", _evaluate, common=False)
    _add_evaluate(evaluate)
    ledger = add("ledger", "print a search's evaluations, while it runs or later", _ledger, common=False)
    ledger.add_argument("place", type=_name, metavar="RUN", help="the run's folder or URI")
    ledger.add_argument("--json", action="store_true", help="print one JSON object a line")
    watch = add("watch", "show a search that runs or has ended", _watch, common=False)
    watch.add_argument("place", type=_name, metavar="RUN", help="the run's folder or URI")
    watch.add_argument("--once", action="store_true", help="show it as it is now, and end")
    serve = add("serve", "start the service on this machine", _serve, common=False)
    serve.add_argument("--run", type=_local, action="append", default=[], dest="runs", metavar="DIR", help=_SERVED_HELP)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback need API keys")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--storage", type=_local, metavar="DIR", help="where checkpoints are kept (runs/service)")
    serve.add_argument("--keys", type=Path, metavar="FILE", help="API keys, one a line")
    serve.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one service setting")
    demo = add("demo", "run the whole path in minutes and write a report", _demo)
    _add_workers(demo)
    demo.set_defaults(default_config="demo")
    return parser


def _name(text: str) -> str:
    """The value of an option that names something."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it names nothing")
    if any("\ud800" <= character <= "\udfff" for character in text):  # How Python holds bytes that are no text.
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8")
    return text


def _add_common(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("--model", type=_name, help=f"{_SHIPPED}, a local checkpoint folder or a hub id")
    stage.add_argument("--config", type=_name, metavar="YAML", help="a settings file, or the name of one in configs/")
    stage.add_argument("--run", type=_name, metavar="DIR", help="the folder that holds the run, or its URI (s3://…)")
    stage.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting")


def _local(text: str) -> Path:
    """For places that are on a disk; a URI would become a folder of an odd name."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is a URI: name a local path")
    return Path(text)


def _add_workers(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("--workers", type=int, metavar="N", help="Ray actors; 0 evaluates in this process")


def _add_max_width(stage: argparse.ArgumentParser) -> None:
    help = "no layer wider than X times the mean width; bounds what --format padded costs"
    stage.add_argument("--max-width-ratio", type=float, metavar="X", help=help)


def _add_compare(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("--seeds", type=int, metavar="N", help="repeat searches and trainings with N seeds")
    stage.add_argument(
        "--against", type=_name, action="append", default=[], metavar="MODEL", help="another model, for table 2"
    )


def _add_evaluate(stage: argparse.ArgumentParser) -> None:
    stage.add_argument(
        "--model", type=_name, required=True, help=f"{_SHIPPED}, a local checkpoint, dense or pruned, or a hub id"
    )
    stage.add_argument("--tasks", default="embedded", metavar="NAMES", help="embedded, real, or lmms-eval's names")
    stage.add_argument("--batch-size", type=int, default=16, metavar="N", help="sequences generated together")
    stage.add_argument("--device", default="auto", help="auto, cpu, cuda:0 …")
    stage.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    stage.add_argument("--limit", type=int, metavar="N", help="only the first N documents of each task")
    stage.add_argument("--data", action="append", default=[], metavar="TASK=FOLDER", help="a task's data, if local")
    stage.add_argument(
        "--cache", type=_local, default=Path("runs/evaluations"), metavar="DIR", help="where results are kept"
    )
    stage.add_argument("--json", action="store_true", help="print one JSON object")


def _add_target(stage: argparse.ArgumentParser) -> None:
    target = stage.add_mutually_exclusive_group(required=True)
    target.add_argument("--target", metavar="RATIO", help="share of FFN neurons to remove, such as 0.3")
    target.add_argument("--parameters", metavar="COUNT", help="of the whole checkpoint, at most, such as 5B")
    target.add_argument("--bytes", metavar="SIZE", help="of the whole checkpoint's tensors, at most, such as 8GiB")


def _add_form(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("--format", choices=FORMATS, default="hf", help="true widths (hf), or all padded to the widest")
    stage.add_argument("--recovery", choices=RECOVERIES, help="what makes up for the pruned neurons (default: refit)")


def settle(options: argparse.Namespace) -> tuple[Config, argparse.Namespace]:
    """The settings that a stage's command would run with, and its options for a process with another working directory.

    Raises:
        LopError: they are not valid, or what the stage writes would be lost.
    """
    with _at(options):
        run = _run(options)
        return run.config, argparse.Namespace(**{**vars(options), "run": run.location.uri})


def _config(options: argparse.Namespace) -> Config:
    """The named config, else the run's own, else the one made for the model."""
    own = options.folder / "config.yaml" if options.folder else None
    if options.config:
        path = find_config(options.config)
    elif own is not None and own.is_file() and not options.default_config:
        path = own
    else:
        model = options.model or EMBEDDED
        path = find_config(options.default_config or (model if model in SHIPPED else "qwen2_5_vl_7b"))
    seeds = getattr(options, "seeds", None)
    overrides = [*options.set, *([] if seeds is None else [f"tables.seeds={seeds}"])]
    named = {name: getattr(options, name, None) for name in ("model", "workers", "recovery", "max_width_ratio")}
    return load_config(path, overrides, **named)


@contextmanager
def _at(options: argparse.Namespace) -> Iterator[None]:
    """Makes the run that `--run` names a local folder inside the block."""
    options.folder, options.origin = None, None
    if not getattr(options, "run", None):
        yield
        return
    from lop.storage.mirror import local_run

    check_lasting("--run", options.run)
    with local_run(options.run) as (options.folder, options.origin):
        yield


def _named_run(options: argparse.Namespace, config: Config) -> "Run | None":
    from lop.run.run import Run

    return Run(config, options.folder, options.origin) if options.folder else None


def _run(options: argparse.Namespace, default: Path | None = None) -> "Run":
    config = _config(options)
    from lop.run.run import Run

    if named := _named_run(options, config):
        return named
    folder = default or Path("runs") / Path(config.model).name
    check_lasting("without --run, the folder", folder)
    return Run(config, folder)


def _target(options: argparse.Namespace) -> Target:
    if options.parameters is not None:
        return Target(parameters=parse_count(options.parameters, what="parameters"))
    if options.bytes is not None:
        return Target(bytes=parse_count(options.bytes, what="bytes"))
    try:
        return Target(ratio=float(options.target))
    except ValueError:
        raise LopError(f"target {options.target!r} is not a number such as 0.3") from None


def _calibrate(options: argparse.Namespace) -> None:
    from lop.stages.stages import calibrate_stage

    run = _run(options)
    calibrate_stage(run)
    print(run.location / run.statistics_file.name)


# They compute with the model themselves and start nothing else: a job runs them where the GPUs are.
COMPUTING: tuple[Command, ...] = (_calibrate,)


def _search(options: argparse.Namespace) -> None:
    from lop.stages.stages import search_stage

    run = _run(options)
    search_stage(run)
    print(run.location / run.search_file.name)


def _train(options: argparse.Namespace) -> None:
    from lop.stages.stages import train_stage

    run = _run(options)
    train_stage(run)
    print(run.location / run.predictor_folder.name)


def _predict(options: argparse.Namespace) -> None:
    from lop.checkpoint.footprint import Footprint
    from lop.run.prediction import predictor_for

    config, target = _config(options), _target(options)
    predictor = predictor_for(_named_run(options, config), config)
    footprint = Footprint(predictor.size, options.format, config.recovery)
    allocation = footprint.allocate(target, predictor.space, predictor.allocate)
    answer = footprint.describe(allocation, predictor.space)
    if options.json:
        print(json.dumps(answer))
        return
    print(f"{answer['parameters']:,} parameters, {answer['bytes']:,} bytes, ratio {answer['ratio']:.4f}")
    for layer, (ratio, width) in enumerate(zip(answer["ratios"], answer["widths"])):
        print(f"layer {layer:>2}  {width:>6}  {'█' * round(40 * (1 - ratio)):<40}  {ratio:.1%} pruned")


def _prune(options: argparse.Namespace) -> None:
    from lop.stages.stages import prune_stage

    check_lasting("--out", options.out)
    config = _config(options)
    run = _named_run(options, config)
    with _bars() as progress:
        manifest = prune_stage(run, config, _target(options), options.out, format=options.format, progress=progress)
    if options.format == "padded":
        log.info("padding: %s bytes of zeros", f"{manifest['padding_bytes']:,}")
    print(options.out)


def _inspect(options: argparse.Namespace) -> None:
    from lop.checkpoint.inspection import inspect, print_inspection

    found = inspect(find_model(options.model))
    if options.json:
        print(json.dumps(found.as_dict()))
    else:
        print_inspection(found)
    if found.damage:
        raise LopError(found.damage)


def _compare(options: argparse.Namespace) -> None:
    from lop.model.find import find_model
    from lop.stages.compare import compare_stage, tables_stage

    run = _run(options)
    for name in options.against:
        find_model(name)  # Before anything is done for nothing.
    print(compare_stage(run))
    if (tables := tables_stage(run, others=options.against)) is not None:
        print(tables)


def _rivals(options: argparse.Namespace) -> None:
    from lop.stages.rivals import rivals_stage

    run = _run(options)
    for outcome in rivals_stage(run, seeds=run.config.tables.seeds):
        print(f"{outcome.rival:<14} {outcome.target:>6.1%}  seed {outcome.seed}  reward {outcome.reward:.4f}")


def _evaluate(options: argparse.Namespace) -> None:
    from lop.report.evaluate import Evaluate, evaluate

    data = {}
    for entry in options.data:
        task, equals, folder = entry.partition("=")
        if not equals or not Path(folder).is_dir():
            raise LopError(f"--data {entry!r}: write TASK=FOLDER with a folder that is there")
        data[task] = Path(folder)
    if options.batch_size < 1 or (options.limit is not None and options.limit < 1):
        raise LopError(f"--batch-size {options.batch_size} and --limit {options.limit} must be at least 1")
    settings = Evaluate(options.batch_size, options.device, options.dtype, options.limit, data, options.cache)
    results = evaluate(options.model, options.tasks.split(","), settings)
    if options.json:
        print(json.dumps(results))
        return
    for task, metrics in results.items():
        for metric, value in metrics.items():
            print(f"{task:<16} {metric:<12} {value:.4f}")


def _demo(options: argparse.Namespace) -> None:
    from lop.stages.demo import demo

    print(demo(_run(options, Path("runs/demo"))))


def _ledger(options: argparse.Namespace) -> None:
    from lop.search.watch import print_ledger
    from lop.storage.location import Location

    print_ledger(Location.parse(options.place), as_json=options.json)


def _watch(options: argparse.Namespace) -> None:
    from lop.search.watch import watch
    from lop.storage.location import Location

    watch(Location.parse(options.place), once=options.once)


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """A callback that shows each step as a progress bar of its own."""
    bars: dict[str, tqdm[Any]] = {}

    def update(step: str, done: int, total: int) -> None:
        if step not in bars:
            unit = {"unit": "B", "unit_scale": True} if step == "export" else {"unit": "layer"}
            bars[step] = tqdm(total=total, desc=step, **unit)
        bars[step].update(done - bars[step].n)

    try:
        yield update
    finally:
        for bar in bars.values():
            bar.close()


def _serve(options: argparse.Namespace) -> None:
    from ray_jobs.cluster import connected
    from serve.app import app
    from serve.launch import check_address, launch, service_settings

    settings = service_settings(options.runs, options.set, storage=options.storage, keys_file=options.keys)
    check_address(settings, options.host, options.port)
    application = app(settings)  # What is wrong with a model or the storage is told before anything is started.
    with connected():
        launch(application, host=options.host, port=options.port)


def set_up_logging() -> None:
    """LOP's lines go to stderr as they are, and of the libraries' only errors."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("transformers", "httpx", "huggingface_hub", "matplotlib", "PIL", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _complain(message: str) -> int:
    say(f"lop: {message}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
