"""lmms-eval's numbers are LOP's, to the last digit; and what it lacks is named."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from lop.checkpoint.export import export
from lop.errors import LopError
from lop.model.adapter import QwenVL, load_model
from lop.model.elastic import ElasticModel
from lop.model.encoding import encode
from lop.model.find import assets
from lop.model.importance import importance, order
from lop.model.statistics import NeuronStatistics
from lop.plugins.evaluate import EMBEDDED_TASKS, Evaluate, evaluate
from lop.report.benchmark import METRICS, load_benchmark, probes, respond
from lop.search.evaluator import Evaluator
from lop.space.allocation import Allocation

needs_lmms = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed: pip install -e '.[eval]'"
)
DOCS = 80


@needs_lmms
def test_lmms_eval_gives_our_numbers(tmp_path: Path, shared_tiny: QwenVL, tiny_statistics: NeuronStatistics) -> None:
    ranked = order(importance("activation", tiny_statistics))
    neurons = ranked.shape[1]
    widths = tuple(neurons // 2 if layer % 2 else neurons for layer in range(len(ranked)))
    export(assets() / "model", tmp_path / "pruned", Allocation(widths), ranked, about={})
    settings = Evaluate(device="cpu", dtype="float32", limit=DOCS, cache=tmp_path / "cache")
    theirs = evaluate(str(tmp_path / "pruned"), ["embedded"], settings)

    elastic = ElasticModel(load_model(assets() / "model", device="cpu", dtype="float32"), ranked)
    for task, every in load_benchmark(assets() / "samples").items():
        questions = every[:DOCS]
        asked = probes(questions)
        evaluator = Evaluator(elastic, encode(shared_tiny, asked, batch_tokens=2048))
        with elastic.pruned(Allocation(widths)):
            verdicts = respond(questions, asked, evaluator.scores().correct)
        ours = METRICS[task](verdicts)
        found = theirs[f"lop_{task}"]
        assert found
        assert found == {name: ours[name] for name in found}
    before = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    assert len(before) == len(EMBEDDED_TASKS)
    assert evaluate(str(tmp_path / "pruned"), ["embedded"], settings) == theirs
    assert before == {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}


@needs_lmms
def test_the_plugin_is_found_by_lmms_eval() -> None:
    from lmms_eval.models import MODEL_REGISTRY_V2

    from lop.plugins.evaluate import manifest
    from lop.plugins.lmms_lop import LopQwenVL

    for model in manifest():
        MODEL_REGISTRY_V2.register_manifest(model, overwrite=True)
    assert MODEL_REGISTRY_V2.get_model_class("lop") is LopQwenVL
    pytest.importorskip("decord", reason="lmms-eval's own qwen2_5_vl imports it, and does not bring it")
    own = MODEL_REGISTRY_V2.get_model_class("qwen2_5_vl")
    assert issubclass(MODEL_REGISTRY_V2.get_model_class("lop_qwen2_5_vl"), own)


@needs_lmms
def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(LopError, match="'lop_nothing' is none of lmms-eval's"):
        evaluate("tiny", ["lop_nothing"], Evaluate())
    with pytest.raises(LopError, match="task pope: its data is not to be had"):
        evaluate("tiny", ["pope"], Evaluate(data={"pope": tmp_path}))


def test_without_lmms_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(LopError, match=r"lop-vl\[eval\]"):
        evaluate("tiny", ["embedded"], Evaluate())


def test_verdicts_of_lmms_eval_are_those_of_the_tasks() -> None:
    from lop.plugins.tasks import doc_to_text, process_pope

    choice = {"question": "Q?", "options": ["a", "b"], "form": "choice", "answer": "A"}
    assert doc_to_text(choice) == "Q?\nA. a\nB. b"
    doc = {"question": "Q?", "options": [], "form": "yes_no", "group": "g", "part": "random", "answer": "yes"}
    (verdict,) = set(process_pope(doc, ["yes"]).values())
    assert json.dumps([verdict.group, verdict.is_right]) == '["g", true]'
