"""The lean pass against transformers' own, finer rewards, races and kept states, on the embedded model."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from lop.model.adapter import QwenVL, load_model
from lop.model.backbone import Backbone
from lop.model.elastic import ElasticModel, fused_gated
from lop.model.encoding import Encoded, encode
from lop.model.find import assets
from lop.model.samples import SampleSets
from lop.model.tensors import model_size
from lop.search.evaluation import Evaluation
from lop.search.evaluator import Evaluator
from lop.search.racing import Candidate, Opponent, Racing, sample_rounds, unpack, unpack_values
from lop.space.allocation import Allocation, Space, dense, project
from lop.storage.headers import read_tensors
from tests.lop.model.test_model import inputs_of

SIZE = model_size(read_tensors(assets() / "model"))
SPACE = Space(SIZE.layers, SIZE.neurons, 8, 0.95)
RACING = Racing(rounds=4, confidence=0.9)
COUNT = 48


@pytest.fixture(scope="module")
def elastic() -> ElasticModel:
    random = np.random.default_rng(0)
    order = random.permuted(np.tile(np.arange(SPACE.neurons), (SPACE.layers, 1)), axis=1)
    return ElasticModel(load_model(assets() / "model"), order)


@pytest.fixture(scope="module")
def whole(shared_tiny: QwenVL, samples: SampleSets) -> Encoded:
    return encode(shared_tiny, samples.reward[:COUNT], batch_tokens=600)


@pytest.fixture(scope="module")
def raced(shared_tiny: QwenVL, samples: SampleSets) -> Encoded:
    rounds = sample_rounds(COUNT, RACING.rounds, seed=1)
    return encode(shared_tiny, samples.reward[:COUNT], batch_tokens=600, rounds=rounds)


def pruned(ratio: float, *, first: int = 0) -> Allocation:
    """A mean ratio of pruning, the first layers left dense."""
    ratios = np.where(np.arange(SPACE.layers) < first, -9, ratio * SPACE.layers / (SPACE.layers - first))
    return project(ratios, SPACE, SPACE.budget(ratio))


@torch.inference_mode()
def naive(model: QwenVL, encoded: Encoded, samples: SampleSets) -> dict[int, torch.Tensor]:
    """By sample: log-probabilities [answer tokens, V] from transformers' own pass over one sequence."""
    tokenizer = model.processor.tokenizer
    found = {}
    for index, sample in enumerate(samples.reward[: encoded.count]):
        inputs = inputs_of(model, sample)
        answer = torch.tensor([tokenizer(sample.answer, add_special_tokens=False)["input_ids"]])
        prompt = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, answer.shape[1]))
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        found[index] = model.model(**inputs).logits[0, prompt - 1 :].log_softmax(-1)
    return found


def right_tokens(encoded: Encoded) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for batch in encoded.batches:
        for owner, token in zip(batch.samples.tolist(), batch.tokens.tolist()):
            found.setdefault(owner, []).append(token)
    return found


def test_scores_agree_with_transformers(
    elastic: ElasticModel, shared_tiny: QwenVL, whole: Encoded, samples: SampleSets
) -> None:
    scores = Evaluator(elastic, whole).scores()
    expected = naive(shared_tiny, whole, samples)
    for index, tokens in right_tokens(whole).items():
        logs = expected[index]
        places = torch.arange(len(tokens))
        right = logs[places, tokens]
        others = logs.clone()
        others[places, tokens] = -torch.inf
        assert scores.log_probability[index] == pytest.approx(float(right.sum()), abs=1e-3)
        assert scores.margin[index] == pytest.approx(float((right - others.amax(1)).min()), abs=1e-3)
        assert scores.correct[index] == (logs.argmax(1).tolist() == tokens)


def test_divergence_is_zero_for_dense_and_agrees_with_a_naive_sum(
    elastic: ElasticModel, whole: Encoded, shared_tiny: QwenVL, samples: SampleSets
) -> None:
    evaluator = Evaluator(elastic, whole, divergence=True)
    untouched = evaluator.evaluate(Candidate(dense(SPACE))).divergence
    assert untouched == pytest.approx(0, abs=1e-5)
    found = evaluator.evaluate(Candidate(pruned(0.4))).divergence
    reference = naive(shared_tiny, whole, samples)
    total = 0.0
    with elastic.pruned(pruned(0.4)), torch.inference_mode():
        for batch in whole.batches:
            states = elastic.backbone.answers(batch.embeddings, batch.rotation, batch.groups, batch.tails)
            logs = elastic.backbone.logits(states[batch.places]).log_softmax(1)
            before = torch.cat([reference[owner] for owner in batch.samples.unique_consecutive().tolist()])
            total += float((before.exp() * (before - logs)).sum())
    assert found == pytest.approx(total / whole.count, rel=1e-3)


@pytest.mark.parametrize("first", [1, 5, SPACE.layers - 1])
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_kept_states_change_no_bit(elastic: ElasticModel, whole: Encoded, first: int, share: float) -> None:
    size = sum(batch.embeddings.nbytes for batch in whole.batches)
    kept = Evaluator(elastic, whole, cache_bytes=int(size * SPACE.layers * share))
    plain = Evaluator(elastic, whole)
    for allocation in (pruned(0.02, first=first), pruned(0.3), dense(SPACE)):
        assert kept.evaluate(Candidate(allocation)) == plain.evaluate(Candidate(allocation))


def test_a_race_is_the_start_of_the_full_evaluation(elastic: ElasticModel, raced: Encoded) -> None:
    evaluator = Evaluator(elastic, raced, racing=RACING)
    best, worse = evaluator.evaluate(Candidate(dense(SPACE))), evaluator.evaluate(Candidate(pruned(0.6)))
    assert best.hits
    assert worse.hits
    opponent = Opponent(dense(SPACE), best.hits)
    given_up = evaluator.evaluate(Candidate(pruned(0.6), opponent))
    assert evaluator.evaluate(Candidate(pruned(0.6), opponent)) == given_up
    assert given_up.scored is not None
    assert given_up.scored < COUNT
    assert given_up.opponent == dense(SPACE).widths
    seen = np.concatenate(sample_rounds(COUNT, RACING.rounds, seed=1))[: given_up.scored]
    hits, full = (unpack(text, COUNT) for text in (given_up.hits or "", worse.hits))
    assert (hits[seen] == full[seen]).all()
    assert not np.delete(hits, seen).any()
    dense_hits = unpack(best.hits, COUNT)
    expected = dense_hits.mean() + full[seen].mean() - dense_hits[seen].mean()
    assert given_up.accuracy == pytest.approx(max(expected, 0))


def test_who_is_not_beaten_is_scored_in_full(elastic: ElasticModel, raced: Encoded) -> None:
    evaluator = Evaluator(elastic, raced, racing=RACING)
    alone = evaluator.evaluate(Candidate(pruned(0.05)))
    nobody = Opponent(pruned(0.7), evaluator.evaluate(Candidate(pruned(0.7))).hits or "")
    against = evaluator.evaluate(Candidate(pruned(0.05), nobody))
    assert against.is_complete
    assert against.as_dict() == {**alone.as_dict(), "opponent": nobody.allocation.widths}


@pytest.mark.parametrize("reward", ["divergence", "log_probability", "margin"])
def test_a_race_for_a_real_reward_estimates_what_is_left(
    elastic: ElasticModel, shared_tiny: QwenVL, samples: SampleSets, reward: str
) -> None:
    racing = Racing(8, 0.9, reward)
    rounds = racing.parts(COUNT, seed=1)
    encoded = encode(shared_tiny, samples.reward[:COUNT], batch_tokens=600, rounds=rounds)
    evaluator = Evaluator(elastic, encoded, racing=racing, divergence=True)
    best, worse = evaluator.evaluate(Candidate(pruned(0.1))), evaluator.evaluate(Candidate(pruned(0.7)))
    assert best.record
    assert worse.record
    given_up = evaluator.evaluate(Candidate(pruned(0.7), Opponent(pruned(0.1), best.record)))
    assert given_up.scored is not None
    assert given_up.record is None
    seen = np.concatenate(rounds)[: given_up.scored]
    theirs, ours = unpack_values(best.record), unpack_values(worse.record)
    assert given_up.worth(reward) == pytest.approx(theirs.mean() + (ours - theirs)[seen].mean(), rel=2e-3)
    again = evaluator.evaluate(Candidate(pruned(0.1), Opponent(pruned(0.7), worse.record)))
    assert again.is_complete  # Who is ahead is scored in full.
    assert again.worth(reward) == best.worth(reward)


def test_what_each_sample_is_worth_is_told_where_it_is_asked_for(elastic: ElasticModel, whole: Encoded) -> None:
    evaluator = Evaluator(elastic, whole, divergence=True)
    plain = evaluator.evaluate(Candidate(pruned(0.5)))
    itemised = evaluator.evaluate(Candidate(pruned(0.5), itemised=True))
    assert plain.values is None
    assert itemised.values
    assert replace(itemised, values=None) == plain
    np.testing.assert_allclose(
        unpack_values(itemised.values), -evaluator.compared(pruned(0.5)).divergence, rtol=1e-3, atol=1e-6
    )


def test_an_evaluator_survives_pickling(elastic: ElasticModel, raced: Encoded) -> None:
    evaluator = Evaluator(elastic, raced, racing=RACING, divergence=True)
    again: Evaluator = pickle.loads(pickle.dumps(evaluator))
    assert again.evaluate(Candidate(pruned(0.3))) == evaluator.evaluate(Candidate(pruned(0.3)))


def test_widths_and_lengths_compile_once(
    elastic: ElasticModel, whole: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = CompileCounter()
    monkeypatch.setattr("lop.model.elastic._BACKEND", counter)
    fused_gated.cache_clear()
    compiled = copy.deepcopy(elastic)
    compiled.compile()
    evaluator = Evaluator(compiled, whole)
    plain = Evaluator(elastic, whole)
    for ratio in np.linspace(0, 0.8, 9):
        found, expected = evaluator.evaluate(Candidate(pruned(ratio))), plain.evaluate(Candidate(pruned(ratio)))
        assert found.log_probability == pytest.approx(expected.log_probability, abs=1e-4)
    fused_gated.cache_clear()
    assert 1 <= counter.frame_count <= 2


def test_an_evaluation_writes_to_no_weight_and_no_batch(elastic: ElasticModel, whole: Encoded) -> None:
    tensors = [tensor for batch in whole.batches for tensor in batch.tensors().values()]
    tensors += _weights(elastic.backbone)
    before = [tensor.clone() for tensor in tensors]
    Evaluator(elastic, whole, divergence=True, cache_bytes=1 << 30).evaluate(Candidate(pruned(0.3, first=2)))
    assert all(torch.equal(old, new) for old, new in zip(before, tensors, strict=True))


def _weights(backbone: Backbone) -> list[torch.Tensor]:
    layers = backbone.layers
    others = [value for layer in layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    ffns = [getattr(layer.ffn, name) for layer in layers for name in ("gate", "up", "down", "order")]
    return [backbone.norm, backbone.head, *others, *ffns]


def test_evaluations_of_older_ledgers_are_read() -> None:
    old = Evaluation.from_dict({"accuracy": 0.5, "log_probability": -1.0})
    assert old.is_complete
    assert old.as_dict() == {"accuracy": 0.5, "log_probability": -1.0}
    full = Evaluation(0.5, -1.0, margin=0.2, divergence=0.3, hits="AA==", opponent=(8, 16), scored=4)
    assert Evaluation.from_dict(full.as_dict()) == full
    assert full.worth("divergence") == -0.3


@torch.inference_mode()
def test_padding_is_masked_in_batches_of_transformers(shared_tiny: QwenVL, samples: SampleSets) -> None:
    chosen = sorted(samples.test[:12], key=lambda sample: len(sample.question) + 99 * len(sample.options))
    singles = short, long = [inputs_of(shared_tiny, sample) for sample in (chosen[0], chosen[-1])]
    padding = long["input_ids"].shape[1] - short["input_ids"].shape[1]
    assert padding > 0
    padded = {
        name: torch.cat([torch.nn.functional.pad(short[name], (padding, 0)), long[name]])
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    padded |= {name: torch.cat([short[name], long[name]]) for name in ("pixel_values", "image_grid_thw")}
    together = shared_tiny.model(**padded).logits[:, -1]
    alone = torch.cat([shared_tiny.model(**single).logits[:, -1] for single in singles])
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-3)


def test_bfloat16_says_nearly_the_same(samples: SampleSets) -> None:
    found = []
    for dtype in ("float32", "bfloat16"):
        model = load_model(assets() / "model", dtype=dtype)
        encoded = encode(model, samples.reward[:COUNT], batch_tokens=600)
        plain = np.tile(np.arange(SPACE.neurons), (SPACE.layers, 1))
        found.append(Evaluator(ElasticModel(model, plain), encoded).scores())
    exact, rounded = found
    assert (exact.correct == rounded.correct).mean() > 0.9
    assert np.median(np.abs(exact.log_probability - rounded.log_probability)) < 0.05
