"""The command line: its options, and what its end comes to as an exit code."""

import argparse
import atexit
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from lop import __version__, commands
from lop.checkpoint.bits import BITS, QUANTISED
from lop.checkpoint.formats import FORMATS
from lop.checkpoint.recoveries import RECOVERIES
from lop.errors import LopError
from lop.interrupt import Interrupted, interruptible
from lop.methods.registry import RESHAPINGS
from lop.model.find import EMBEDDED, SHIPPED
from lop.options import at_run
from lop.space.latency import PHASES
from lop.terminal import prepare_streams, say, settle_streams

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
        with at_run(options):
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
        description="Prune a vision-language model to any size: search allocations once, then predict them.",
    )
    parser.add_argument("--version", action="version", version=f"lop {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, summary: str, *actions: Command, common: bool = True) -> argparse.ArgumentParser:
        stage = subparsers.add_parser(name, help=summary, description=f"{summary}.")
        stage.set_defaults(stages=actions, is_demo=False)
        if common:
            _add_common(stage)
        return stage

    calibrate = add(
        "calibrate", "collect the statistics of every FFN neuron on the calibration samples", commands.calibrate
    )
    _add_workers(calibrate)
    search = add("search", "run one UCB tree per target on the reward samples, or go on with it", commands.search)
    _add_workers(search)
    _add_max_width(search)
    train = add("train", "train the predictors on what the search found", commands.train)
    _add_workers(train)
    predict = add("predict", "print the allocation for a target", commands.predict)
    _add_target(predict)
    _add_form(predict)
    _add_max_width(predict)
    _add_bits(predict)
    predict.add_argument("--json", action="store_true", help="print one JSON object")
    prune = add("prune", "write the pruned checkpoint for a target", commands.prune)
    _add_target(prune)
    _add_form(prune)
    _add_max_width(prune)
    _add_bits(prune)
    prune.add_argument("--vision", action="store_true", help="with --bits, quantise the vision tower, too")
    _add_out(prune)
    reshape = add(
        "reshape", "write a checkpoint with whole layers removed, by a method other than LOP", commands.reshape
    )
    reshape.add_argument("--method", choices=RESHAPINGS, required=True, metavar="NAME", help=", ".join(RESHAPINGS))
    help = "as many parameters less, at least, as this share of the FFN neurons has, such as 0.3"
    reshape.add_argument("--target", type=float, required=True, metavar="RATIO", help=help)
    reshape.add_argument("--recovery", choices=RECOVERIES, help="none or refit (default: refit)")
    _add_out(reshape)
    probe = add(
        "probe", "measure a few layers of a calibrated model, for `lop predict` without a search", commands.probe
    )
    _add_workers(probe)
    probe.add_argument("--budget", type=int, default=30, metavar="N", help="evaluations in all (30)")
    probe.add_argument("--target", type=float, metavar="RATIO", help="spend them on allocations of this target")
    measure = add("measure", "measure pruned and quantised models, for --bytes to choose by", commands.measure)
    _add_workers(measure)
    quantise = add("quantise", "write a checkpoint again with weights of fewer bits", commands.quantise, common=False)
    quantise.add_argument("model", type=_name, metavar="CHECKPOINT", help="a checkpoint, dense or pruned, or a hub id")
    quantise.add_argument("--bits", type=int, required=True, choices=QUANTISED, help="of each weight")
    quantise.add_argument("--vision", action="store_true", help="quantise the vision tower, too")
    _add_out(quantise)
    convert = add("convert", "write a checkpoint, dense or pruned, as GGUF", commands.convert, common=False)
    convert.add_argument(
        "checkpoint", type=_name, metavar="CHECKPOINT", help="what `lop prune` wrote, or a dense model"
    )
    convert.add_argument("--format", choices=[name for name in FORMATS if FORMATS[name].gguf], default="gguf")
    _add_out(convert)
    profile = add("profile", "measure on this device how long the model's parts take", commands.profile)
    profile.add_argument("--out", type=_local, required=True, metavar="FILE", help="where the profile goes, JSON")
    profile.add_argument("--context", type=int, default=512, metavar="TOKENS", help="read, and then held in decoding")
    distil = add("distil", "have a pruned checkpoint learn from its dense model", commands.distil)
    _add_workers(distil)
    _add_distil(distil)
    inspect = add("inspect", "tell what a checkpoint is, and check its files", commands.inspect, common=False)
    inspect.add_argument(
        "model", type=_name, metavar="MODEL", help=f"'{EMBEDDED}', a local checkpoint, dense or pruned, or a hub id"
    )
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    rivals = add("rivals", "run the rivals that search, each with as many evaluations as a tree", commands.rivals)
    _add_workers(rivals)
    rivals.add_argument("--seeds", type=int, metavar="N", help="repeat with N seeds")
    compare = add(
        "compare", "evaluate LOP and the baselines on the test samples and write report and tables", commands.compare
    )
    _add_workers(compare)
    _add_compare(compare)
    stages = (commands.check_trainable, commands.calibrate, commands.search, commands.train, commands.compare)
    pipeline = add("pipeline", "run calibrate, search, train and compare, up to the first that fails", *stages)
    _add_workers(pipeline)
    _add_max_width(pipeline)
    _add_compare(pipeline)
    evaluate = add("evaluate", "evaluate a checkpoint under lmms-eval", commands.evaluate, common=False)
    _add_evaluate(evaluate)
    ledger = add("ledger", "print a search's evaluations, while it runs or later", commands.ledger, common=False)
    ledger.add_argument("place", type=_name, metavar="RUN", help="the run's folder or URI")
    ledger.add_argument("--json", action="store_true", help="print one JSON object a line")
    watch = add("watch", "show a search that runs or has ended", commands.watch, common=False)
    watch.add_argument("place", type=_name, metavar="RUN", help="the run's folder or URI")
    watch.add_argument("--once", action="store_true", help="show it as it is now, and end")
    serve = add("serve", "start the service on this machine", commands.serve, common=False)
    serve.add_argument("--run", type=_local, action="append", default=[], dest="runs", metavar="DIR", help=_SERVED_HELP)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback need API keys")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--storage", type=_local, metavar="DIR", help="where checkpoints are kept (runs/service)")
    serve.add_argument("--keys", type=Path, metavar="FILE", help="API keys, one a line")
    serve.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one service setting")
    demo = add("demo", "run the whole path in minutes and write a report", commands.demo)
    _add_workers(demo)
    demo.set_defaults(is_demo=True)
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


def _add_bits(stage: argparse.ArgumentParser) -> None:
    help = "of the backbone's weights (default: 16; with --bytes the best that `lop measure` knows of)"
    stage.add_argument("--bits", type=int, choices=BITS, help=help)


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


def _add_distil(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("checkpoint", type=_local, metavar="CHECKPOINT", help="a folder that `lop prune` wrote")
    _add_out(stage)
    stage.add_argument(
        "--text", type=_local, action="append", default=[], metavar="FILE", help="plain text to learn from, too"
    )
    stage.add_argument(
        "--samples", type=_local, action="append", default=[], metavar="FOLDER", help="samples to learn from, too"
    )
    stage.add_argument(
        "--work", type=_local, default=Path("runs/distil"), metavar="DIR", help="where what the teacher says is kept"
    )


def _add_target(stage: argparse.ArgumentParser) -> None:
    target = stage.add_mutually_exclusive_group(required=True)
    target.add_argument("--target", metavar="RATIO", help="share of FFN neurons to remove, such as 0.3")
    target.add_argument("--parameters", metavar="COUNT", help="of the whole checkpoint, at most, such as 5B")
    target.add_argument("--bytes", metavar="SIZE", help="of the whole checkpoint's tensors, at most, such as 8GiB")
    target.add_argument("--memory", metavar="SIZE", help="held while it answers, at most, such as 24GiB; see --context")
    target.add_argument("--latency", metavar="TIME", help="of a token, at most, such as 40ms; see --device-profile")
    load = stage.add_argument_group("with --memory")
    load.add_argument("--context", type=int, metavar="TOKENS", help="of one sequence, images and answer included")
    load.add_argument("--images", type=int, metavar="N", help="in each sequence (0)")
    load.add_argument("--batch", type=int, metavar="N", help="sequences at once (1)")
    load.add_argument("--image-pixels", metavar="COUNT", help="of each image, before the processor scales it (1048576)")
    device = stage.add_argument_group("with --latency")
    device.add_argument("--device-profile", type=_local, metavar="FILE", help="what `lop profile` has measured")
    device.add_argument("--latency-of", choices=PHASES, help="of a token that is generated, or of one read (decode)")


def _add_out(stage: argparse.ArgumentParser) -> None:
    help = "a new folder, or a URI such as s3://bucket/folder"
    stage.add_argument("--out", type=_name, required=True, metavar="DIR", help=help)


def _add_form(stage: argparse.ArgumentParser) -> None:
    help = "true widths (hf), all padded to the widest (padded), or for llama.cpp (gguf, gguf-q8_0, gguf-q4_0 …)"
    stage.add_argument("--format", choices=FORMATS, default="hf", metavar="FORMAT", help=help)
    stage.add_argument("--recovery", choices=RECOVERIES, help="what makes up for the pruned neurons (default: refit)")


# They compute with the model themselves and start nothing else: a job runs them where the GPUs are.
COMPUTING: tuple[Command, ...] = (commands.calibrate, commands.distil)


def set_up_logging() -> None:
    """LOP's lines go to stderr as they are, and of the libraries' only errors."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("transformers", "httpx", "huggingface_hub", "matplotlib", "PIL", "gguf", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _complain(message: str) -> int:
    say(f"lop: {message}")
    return 2
