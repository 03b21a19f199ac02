"""Questions without an image, prose, and photographs: each against transformers or against the plain way."""

from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

import lop.model.encoding
from lop.checkpoint.recovery import recover_elastic
from lop.errors import LopError
from lop.model.adapter import QwenVL, load_model
from lop.model.backbone import Backbone
from lop.model.elastic import ElasticModel
from lop.model.encoding import Encoded, encode
from lop.model.find import assets
from lop.model.generation import answers
from lop.model.image_settings import ImageSettings
from lop.model.importance import importance, order
from lop.model.samples import Sample, SampleSets, check_answers, prompt_text
from lop.model.statistics import NeuronStatistics, calibrate
from lop.search.evaluator import Evaluator, Scores
from lop.search.racing import Candidate, Opponent, Racing, sample_rounds
from lop.space.allocation import Allocation

TEXTS = (
    Sample(b"", "word/1", "made", "capital", "word", "What is the capital of France?", (), "Paris"),
    Sample(b"", "word/2", "made", "capital", "choice", "What is the capital?", ("Paris", "Rome"), "A"),
    Sample(b"", "word/3", "made", "shape", "yes_no", "Is a circle a shape?", (), "yes"),
)
PROSE = (
    Sample(b"", "book/1", "made", "prose", "text", "Is this the flag of", (), " France? It is not, said the people."),
    Sample(b"", "book/2", "made", "prose", "text", "", (), "What is the capital of this country?"),
)


@pytest.fixture(scope="module")
def elastic() -> ElasticModel:
    model = load_model(assets() / "model")
    neurons = model.ffns[0].down_proj.weight.shape[1]
    return ElasticModel(model, np.tile(np.arange(neurons), (len(model.layers), 1)))


def scores(elastic: ElasticModel, encoded: Encoded) -> Scores:
    return Evaluator(elastic, encoded).scores()


def log_probabilities(model: QwenVL, prompt: list[int], answer: list[int]) -> np.ndarray:
    """Of each token of an answer to a prompt of text alone, as transformers has them."""
    with torch.inference_mode():
        logits = model.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(answer)), answer].double().numpy()


def test_text_alone_goes_through_the_chat_template(shared_tiny: QwenVL, elastic: ElasticModel) -> None:
    tokenizer = shared_tiny.processor.tokenizer
    found = scores(elastic, encode(shared_tiny, TEXTS, batch_tokens=500))
    for index, sample in enumerate(TEXTS):
        turn = [{"role": "user", "content": prompt_text(sample)}]
        prompt = shared_tiny.processor.apply_chat_template(
            turn, tokenize=True, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        prompt = prompt[0] if isinstance(prompt[0], list) else prompt
        answer = [*tokenizer(sample.answer)["input_ids"], tokenizer.eos_token_id]
        expected = log_probabilities(shared_tiny, prompt, answer)
        np.testing.assert_allclose(found.log_probability[index], expected.sum(), atol=1e-4)
    written = answers(shared_tiny, TEXTS)
    assert found.correct.tolist() == [text == sample.answer for text, sample in zip(written, TEXTS)]


def test_with_and_without_an_image_go_together(shared_tiny: QwenVL, elastic: ElasticModel, samples: SampleSets) -> None:
    some = samples.reward[:5]
    mixed = [some[0], TEXTS[0], *some[1:3], PROSE[0], *TEXTS[1:], *some[3:], PROSE[1]]
    together = scores(elastic, encode(shared_tiny, mixed, batch_tokens=200))
    for part in (some, TEXTS, PROSE):
        alone = scores(elastic, encode(shared_tiny, part, batch_tokens=500))
        places = [mixed.index(sample) for sample in part]
        np.testing.assert_allclose(together.log_probability[places], alone.log_probability, atol=1e-4)
        assert together.correct[places].tolist() == alone.correct.tolist()
    encoded = encode(shared_tiny, mixed, batch_tokens=200)
    assert calibrate(shared_tiny, encoded).count == sum(map(len, encoded.batches))


def test_prose_is_scored_by_every_token(shared_tiny: QwenVL, elastic: ElasticModel) -> None:
    tokenizer = shared_tiny.processor.tokenizer
    encoded = encode(shared_tiny, PROSE, batch_tokens=500)
    found = scores(elastic, encoded)
    for index, sample in enumerate(PROSE):
        # Without a context something must stand before the first token: what stands between documents.
        prompt = tokenizer(sample.question)["input_ids"] or [tokenizer.pad_token_id]
        expected = log_probabilities(shared_tiny, prompt, tokenizer(sample.answer)["input_ids"])
        assert len(expected) > 3
        np.testing.assert_allclose(found.log_probability[index], expected.mean(), atol=1e-4)
        written = torch.cat([batch.tokens[batch.samples == index] for batch in encoded.batches])
        assert tokenizer.decode(written) == sample.answer  # And no end of turn.


def test_prose_is_neither_right_nor_wrong(shared_tiny: QwenVL, elastic: ElasticModel, samples: SampleSets) -> None:
    some = samples.reward[:6]
    dense = Allocation(elastic.widths)
    without = Evaluator(elastic, encode(shared_tiny, some, batch_tokens=500)).evaluate(Candidate(dense))
    mixed = [PROSE[0], *some, PROSE[1]]
    found = Evaluator(elastic, encode(shared_tiny, mixed, batch_tokens=500), divergence=True).evaluate(Candidate(dense))
    assert found.accuracy == without.accuracy > 0
    assert found.margin == pytest.approx(without.margin, abs=1e-4)
    assert found.log_probability < without.log_probability
    assert found.divergence == pytest.approx(0, abs=1e-5)

    rounds = sample_rounds(len(mixed), 2, seed=0)
    evaluator = Evaluator(elastic, encode(shared_tiny, mixed, batch_tokens=500, rounds=rounds), racing=Racing(2, 0.9))
    first = evaluator.evaluate(Candidate(dense))
    assert first.hits is not None
    assert evaluator.evaluate(Candidate(dense, Opponent(dense, first.hits))).accuracy == without.accuracy

    alone = Evaluator(elastic, encode(shared_tiny, PROSE, batch_tokens=500)).evaluate(Candidate(dense))
    assert (alone.accuracy, alone.margin) == (0, None)
    with pytest.raises(LopError, match="all of them are prose"):
        check_answers(PROSE, "accuracy of the reward samples")
    check_answers(mixed, "accuracy")


def test_many_answer_tokens_are_scored_part_by_part(
    shared_tiny: QwenVL, elastic: ElasticModel, samples: SampleSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = encode(shared_tiny, [*PROSE, *samples.reward[:8]], batch_tokens=500)
    dense = Allocation(elastic.widths)
    whole = Evaluator(elastic, encoded, divergence=True)
    expected, evaluation = whole.scores(), whole.evaluate(Candidate(dense))
    seen: list[int] = []
    plain = Backbone.logits
    monkeypatch.setattr("lop.search.scoring._LOGITS", 3)
    monkeypatch.setattr(Backbone, "logits", lambda self, x: seen.append(len(x)) or plain(self, x))
    parts = Evaluator(elastic, encoded, divergence=True)
    found = parts.scores()
    np.testing.assert_allclose(found.log_probability, expected.log_probability, atol=1e-5)
    np.testing.assert_array_equal(found.correct, expected.correct)
    assert parts.evaluate(Candidate(dense)).divergence == pytest.approx(evaluation.divergence, abs=1e-5)
    assert max(seen) == 3


def picture(seed: int, width: int, height: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def large(samples: SampleSets) -> list[Sample]:
    """Nine questions about three pictures that come again and again."""
    pictures = [picture(seed, 64 + 32 * seed, 64) for seed in range(3)]
    asked = samples.reward[:9]
    return [replace(s, image=pictures[n % 3], image_id=f"p/{n % 3}") for n, s in enumerate(asked)]


@pytest.fixture
def free_pixels(shared_tiny: QwenVL) -> Iterator[QwenVL]:
    """The embedded model with a processor that leaves pictures their size."""
    size = shared_tiny.processor.image_processor.size
    shared_tiny.processor.image_processor.size = {"shortest_edge": 1024, "longest_edge": 65536}
    yield shared_tiny
    shared_tiny.processor.image_processor.size = size


@pytest.mark.parametrize("most", [40, 96, 200, 10_000])
def test_the_tower_sees_a_bounded_number_of_patches(
    free_pixels: QwenVL, large: list[Sample], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    expected = encode(free_pixels, large, batch_tokens=500)
    together: list[int] = []
    mlp: list[int] = []
    plain = lop.model.encoding.image_tower

    def watched(model: QwenVL, images: list[Image.Image], settings: ImageSettings):  # type: ignore[no-untyped-def]
        found = plain(model, images, settings)
        together.append(sum(int(grid.prod()) for grid, _ in found))
        return found

    monkeypatch.setattr(lop.model.encoding, "image_tower", watched)
    hook = free_pixels.tower.blocks[0].mlp.register_forward_pre_hook(lambda _, x: mlp.append(len(x[0])))
    found = encode(free_pixels, large, batch_tokens=500, images=ImageSettings(batch_patches=most))
    hook.remove()
    sizes = [64, 96, 128]  # Patches of 8×8 in pictures of 64×64, 96×64 and 128×64.
    assert sum(together) == sum(sizes)  # Each picture once, however often it is asked about.
    assert max(together) <= max(most, max(sizes))
    assert max(mlp) <= most
    for ours, theirs in zip(found.batches, expected.batches, strict=True):
        torch.testing.assert_close(ours.embeddings, theirs.embeddings, atol=1e-5, rtol=1e-5)


def test_max_pixels_bounds_a_photograph(free_pixels: QwenVL, large: list[Sample]) -> None:
    whole, small = (
        encode(free_pixels, large, batch_tokens=500, images=ImageSettings(max_pixels=pixels)) for pixels in (None, 4096)
    )
    tokens = [sum(map(len, encoded.batches)) for encoded in (whole, small)]
    # 64×64, 96×64 and 128×64 pixels, three questions each, are 4, 6 and 8 tokens. Of at most 4,096 pixels the sides,
    # in whole tokens of 32×32, are 2×2, 2×1 and 2×1.
    assert tokens[0] - tokens[1] == 3 * ((6 - 2) + (8 - 2))
    with pytest.raises(LopError, match=r"images\.max_pixels 100 is too few: the processor makes at least 1024"):
        encode(free_pixels, large, batch_tokens=500, images=ImageSettings(max_pixels=100))


def test_long_sequences_go_through_ffns_in_rows(
    tiny: QwenVL, samples: SampleSets, tiny_statistics: NeuronStatistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = encode(tiny, samples.calibration[:40], batch_tokens=700)
    expected = calibrate(tiny, calibration)
    rows = order(importance("activation", tiny_statistics))
    allocation = Allocation(tuple(rows.shape[1] // 2 for _ in rows))

    def refitted(model: QwenVL) -> list[torch.Tensor]:
        elastic = ElasticModel(model, rows)
        recover_elastic(elastic, allocation, "refit", means=tiny_statistics.mean, calibration=calibration)
        return [layer.ffn.refitted for layer in elastic.backbone.layers]  # type: ignore[misc]

    whole = refitted(load_model(assets() / "model"))
    monkeypatch.setattr("lop.model.backbone.ROWS", 50)
    monkeypatch.setattr("lop.model.normal.ROWS", 50)
    monkeypatch.setattr("lop.model.statistics._COLUMNS", 1000)
    seen: list[int] = []
    for ffn in tiny.ffns:
        ffn.down_proj.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))  # type: ignore[union-attr]
    found = calibrate(tiny, calibration)
    assert max(seen) == 50
    assert found.count == expected.count
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.moment, expected.moment, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(refitted(load_model(assets() / "model")), whole, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
