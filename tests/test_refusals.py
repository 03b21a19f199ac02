"""What a user may get wrong: each is refused with exit code 2 and one line on stderr, and nothing is written."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from lop.cli import main
from lop.model.find import assets
from lop.plugins import evaluate as evaluation

Refused = Callable[..., str]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 4467088\n"
MODEL_FILES = ("model.safetensors", "config.json", "tokenizer.json")


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command in an empty folder; it must be refused. Returns the line."""
    place = tmp_path / "empty"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments: str | Path) -> str:
        capfd.readouterr()
        try:
            code: object = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        assert code == 2, err
        assert (out, err.count("\n"), err[:5]) == ("", 1, "lop: "), err
        assert "Traceback" not in err
        assert len(err) < 800
        assert not list(place.iterdir())
        return err

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the embedded model, to be damaged."""
    return Path(shutil.copytree(assets() / "model", tmp_path / "model"))


PREDICT = "predict --target 0.3"
PRUNE = "prune --target 0.3 --out out"
WRONG = """
|required: COMMAND
nonsense|invalid choice
predict|is required
predict --target|expected one argument
predict --target x|'x' is not a number
predict --target=-0.1|-0.1
predict --target 1|outside
predict --target nan|nan
predict --target inf|inf
predict --target 1e400|inf
predict --target 0.3 --bytes 5|not allowed with
predict --parameters 0|'0'
predict --parameters=-5|'-5'
predict --parameters 5Q|'5Q'
predict --bytes 5e999|'5e999'
predict --bytes 1KiB|outside
PREDICT --max-width-ratio nan|max_width_ratio
PREDICT --max-width-ratio 0.5|max_width_ratio
PREDICT --max-width-ratio x|invalid float
PREDICT --model ""|names nothing
PREDICT --model nonsense|'nonsense'
calibrate --model ~nobody-here/model|no such user
PREDICT --run ""|names nothing
PREDICT --run /dev/null|missing
PREDICT --run nowhere|missing
PREDICT --run s3://|names no folder
PREDICT --run nonsense://a/b|cannot be opened
PREDICT --config ""|names nothing
PREDICT --config nowhere.yaml|nowhere.yaml is missing
PREDICT --config /|Is a directory
PREDICT --config /bin/sh|not YAML
PREDICT --set x|'x'
PREDICT --set =|'='
PREDICT --set nonsense=1|no such setting
PREDICT --set search=5|search
PREDICT --set search.nonsense.x=5|search.nonsense
PREDICT --set model=5|model
PREDICT --set model=null|model
PREDICT --set model=[a|not a YAML value
PREDICT --set seed=-1|seed
PREDICT --set seed=2024-01-01|not a number
PREDICT --set threads=0|threads
PREDICT --set threads=1000000|threads
PREDICT --set search.exploration=.nan|finite
PREDICT --set train.learning_rates=[.inf]|finite
PREDICT --set search.targets.step=1.0e-7|1000 targets
PREDICT --set search.targets.last=0.01|must not be below
PREDICT --set search.targets=[]|search.targets
PREDICT --set compare.targets=[]|it is empty
PREDICT --set compare.recovery_targets=[]|it is empty
PREDICT --set tables.targets=[]|it is empty
PREDICT --set tables.baselines=[]|it is empty
PREDICT --set train.architectures=[]|it is empty
PREDICT --set train.learning_rates=[]|it is empty
PREDICT --set compare.targets=[0.2,0.2]|twice
PREDICT --set search.roots=[flap,flap]|twice
calibrate --model a/b/c|model folder a/b/c is missing
calibrate --model .|no config.json
calibrate --set granularity=7|granularity 7
calibrate --set samples=nowhere|samples folder nowhere
calibrate --set device=gpu|'gpu'
calibrate --set device=cuda:99|'cuda:99'
calibrate --set device=meta|'meta'
calibrate --set dtype=int4|dtype
search --workers -1|workers
search --workers x|invalid int
search --set search.targets.last=0.99|outside
search|lop calibrate
train|lop search
rivals --seeds 0|tables.seeds
rivals|lop calibrate
compare --seeds x|invalid int
compare|lop search
compare --against nonsense|'nonsense'
compare --set tables.baselines=[nonsense]|'nonsense'
compare --set tables.rivals=[nonsense]|'nonsense'
prune --target 0.3|--out
prune --target 0.3 --out ""|names nothing
PRUNE --format nonsense|'nonsense'
PRUNE --recovery nonsense|'nonsense'
PRUNE --recovery bias --format padded|no place for a bias
PRUNE --set device=gpu|'gpu'
PRUNE --set samples=nowhere|samples folder nowhere
prune --target 0.3 --out /bin/sh|there already
prune --target 0.3 --out /|there already
prune --target 0.3 --out nonsense://a|cannot be opened
inspect|required: MODEL
inspect nonsense|'nonsense'
inspect .|no config.json
inspect ~nobody-here|no such user
ledger|required: RUN
ledger nowhere|missing
ledger ""|names nothing
ledger s3://|names no folder
watch nowhere|no search has begun
watch /dev/null|/dev/null
evaluate|--model
evaluate --model tiny --batch-size 0|--batch-size 0
evaluate --model tiny --limit 0|--limit 0
evaluate --model tiny --data x|TASK=FOLDER
evaluate --model tiny --data lop_mme=nowhere|TASK=FOLDER
evaluate --model tiny --dtype int8|'int8'
serve --port 0|port 0
serve --port 99999|port 99999
serve --host 0.0.0.0|without API keys
serve --run nowhere|nowhere/config.yaml
serve --keys nowhere|nowhere
serve --set x|'x'
serve --set nonsense=1|nonsense
serve --set queue=-1|queue
demo --workers -1|workers
demo --set compare.targets=[]|it is empty
demo --set search.targets.step=0.5|2 targets are too few
pipeline --run new --set search.targets.step=0.5|2 targets are too few
"""


@pytest.mark.parametrize("case", WRONG.strip().splitlines())
def test_a_wrong_command_line_is_refused_in_one_line(case: str, refused: Refused) -> None:
    import shlex

    line, _, said = case.rpartition("|")
    arguments = shlex.split(line.replace("PREDICT", PREDICT).replace("PRUNE", PRUNE))
    assert said in refused(*arguments)


@pytest.mark.parametrize("name", MODEL_FILES)
def test_an_lfs_pointer_is_told_from_the_file(name: str, model: Path, refused: Refused, tmp_path: Path) -> None:
    (model / name).write_text(POINTER)
    for command in (("calibrate", "--model"), ("inspect",), (*PRUNE.split(), "--run", tmp_path / "run", "--model")):
        if command[0] == "prune":
            shutil.copytree(assets() / "run", tmp_path / "run")
        line = refused(*command, model)
        assert name in line
        assert "git lfs pull" in line


def test_an_lfs_pointer_is_told_from_samples(refused: Refused, tmp_path: Path) -> None:
    folder = shutil.copytree(assets() / "samples", tmp_path / "samples")
    (folder / "reward.parquet").write_text(POINTER)
    line = refused("calibrate", "--set", f"samples={folder}")
    assert "reward.parquet" in line
    assert "git lfs pull" in line


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
        (("tokenizer.json",), "tokenizer"),
        (("chat_template.jinja",), "chat template"),
        (("processor_config.json",), ""),
    ],
)
def test_a_missing_tokenizer_or_template_is_named(
    files: tuple[str, ...], said: str, model: Path, refused: Refused, tmp_path: Path
) -> None:
    for name in files:
        (model / name).unlink()
    line = refused("calibrate", "--config", "tiny", "--model", model)
    assert str(model) in line
    assert said in line


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[]"),
        ("config.json", '{"text_config": null}'),
        ("config.json", '{"text_config": {"intermediate_size": "wide"}}'),
        ("config.json", "{"),
        ("config.json", "[" * 100_000),
        ("model.safetensors.index.json", "{}"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 5}}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../nowhere.safetensors"}}'),
        ("lop.json", "[]"),
        ("lop.json", '{"widths": 5, "sha256": {}}'),
        ("lop.json", '{"widths": ["x"], "sha256": {}}'),
        ("lop.json", '{"widths": [5], "sha256": {}, "neurons": "many"}'),
        ("lop.json", '{"widths": [5], "sha256": {}, "target": "half"}'),
        ("model.safetensors", ""),
        ("model.safetensors", "nonsense"),
    ],
)
def test_files_that_hold_something_else_are_refused(name: str, content: str, model: Path, refused: Refused) -> None:
    (model / name).write_text(content)
    assert refused("inspect", model)


@pytest.mark.parametrize("content", ["[]", "{}", "5", "nothing", '{"fingerprints": {}, "targets": [5]}'])
def test_a_runs_files_that_hold_something_else_are_refused(content: str, refused: Refused, tmp_path: Path) -> None:
    run = shutil.copytree(assets() / "run", tmp_path / "run")
    (run / "search.json").write_text(content)
    assert "search.json" in refused("train", "--run", run)


def test_the_embedded_model_is_inspected_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "dense"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"metrics": 5}', '{"metrics": {"accuracy": "high"}}', "\0"])
def test_a_damaged_result_of_an_evaluation_is_measured_again(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def run(adapter: object, task: object, manager: object, name: str, options: object) -> dict[str, float]:
        measured.append(name)
        return {"accuracy": 0.5}

    monkeypatch.setitem(sys.modules, "lmms_eval", ModuleType("lmms_eval"))
    monkeypatch.setattr(evaluation, "_load_task", lambda name, options: (None, None))
    monkeypatch.setattr(evaluation, "_task_fingerprint", lambda name, task, options: "task")
    monkeypatch.setattr(evaluation, "_adapter", lambda folder, options: None)
    monkeypatch.setattr(evaluation, "_run", run)
    settings = evaluation.Evaluate(cache=tmp_path)
    expected = {"lop_mme": {"accuracy": 0.5}}
    assert evaluation.evaluate("tiny", ["lop_mme"], settings) == expected
    assert evaluation.evaluate("tiny", ["lop_mme"], settings) == expected
    assert len(measured) == 1
    (kept,) = tmp_path.iterdir()
    kept.write_text(content)
    assert evaluation.evaluate("tiny", ["lop_mme"], settings) == expected
    assert len(measured) == 2
    assert evaluation.evaluate("tiny", ["lop_mme"], settings) == expected
    assert len(measured) == 2
    assert os.listdir(tmp_path) == [kept.name]


def test_another_models_tokenizer_is_refused(model: Path, refused: Refused) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "image_token_id": 99}))
    assert "image token is 6, the model's 99" in refused("calibrate", "--config", "tiny", "--model", model)
