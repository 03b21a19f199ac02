"""Images' tokens dropped on the way: which, by hand; what comes of it; and the operations that it saves."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lop.methods.fastv import after_two_layers, best, last_token
from lop.methods.registry import DROPPINGS
from lop.methods.sparsevlm import clustered, in_three_stages, kept_and_merged, recycle, relevant
from lop.model.adapter import QwenVL
from lop.model.beyond.dropping import Plan, Stage, dropped_tails, read
from lop.model.beyond.flops import flops
from lop.model.encoding import encode
from lop.model.samples import SampleSets
from lop.search.dropping import DroppingScoring
from lop.search.scoring import Scoring
from lop.space.allocation import Allocation
from tests.lop.model.test_model import inputs_of
from tests.lop.model.test_taylor import in_dense_order, prose

STATES = torch.tensor([[0.0, 0.0], [1.0, 0.0], [8.0, 8.0], [9.0, 8.0], [4.0, 4.0]])


def test_fastv_keeps_what_the_last_token_looks_at() -> None:
    plan = after_two_layers(32, 0.75)
    assert plan.stages == (Stage(2, 0.25),)
    assert last_token(STATES, STATES[:3]).tolist() == [False, False, True]
    chosen, states = best(torch.tensor([0.1, 0.4, 0.0, 0.3, 0.2]), STATES, 3)
    assert chosen.tolist() == [1, 3, 4]
    assert states.tolist() == STATES[[1, 3, 4]].tolist()


def test_sparsevlms_raters_have_to_do_with_the_image() -> None:
    # Two visual tokens along the first axis: of three text tokens the first looks like them.
    images, text = torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert relevant(images, text).tolist() == [True, False, False]
    assert relevant(images, text[1:2].repeat(3, 1)).tolist() == [True] * 3


def test_sparsevlm_merges_the_best_of_those_it_drops() -> None:
    assert [kept_and_merged(dropped) for dropped in (0, 1, 30, 40, 66)] == [0, 1, 2, 2, 3]
    # Two places for five tokens: the best, and the mean of the next two (⌊0.3·4⌋ + 1) at the place of the denser one.
    chosen, states = recycle(torch.tensor([0.1, 0.2, 0.9, 0.3, 0.0]), STATES, 2)
    assert chosen.tolist() in ([1, 2], [2, 3])
    assert {tuple(row) for row in states.tolist()} == {(8.0, 8.0), (5.0, 4.0)}
    # All are left, or one: nothing to merge.
    assert recycle(torch.arange(5.0), STATES, 5)[0].tolist() == [0, 1, 2, 3, 4]
    assert recycle(torch.arange(5.0), STATES, 1)[0].tolist() == [4]
    centres, means = clustered(STATES[:4], 2)
    assert {tuple(row) for row in means.tolist()} == {(0.5, 0.0), (8.5, 8.0)}
    assert len(set(centres.tolist())) == 2


@pytest.mark.parametrize("layers", [12, 30, 32])
@pytest.mark.parametrize("dropped", [1 / 3, 0.5, 0.75])
def test_both_take_equally_many_tokens_through_layers(layers: int, dropped: float) -> None:
    def through(stages: tuple[Stage, ...]) -> float:
        ends = [*(stage.layers for stage in stages[1:]), layers]
        return stages[0].layers + sum(stage.kept * (end - stage.layers) for stage, end in zip(stages, ends))

    plans = [plan(layers, dropped) for plan in (after_two_layers, in_three_stages)]
    assert through(plans[0].stages) == pytest.approx(through(plans[1].stages))
    # As published, of 32 layers and 192 tokens of 576, a third, on average.
    if layers == 32:
        assert [stage.layers for stage in in_three_stages(layers, dropped).stages] == [2, 6, 15]


def test_the_weights_are_those_of_transformers_own_attention(tiny: QwenVL, samples: SampleSets) -> None:
    sample = samples.reward[0]
    tiny.model.set_attn_implementation("eager")
    with torch.inference_mode():
        found = tiny.model(**inputs_of(tiny, sample), output_attentions=True, output_hidden_states=True)
    backbone = in_dense_order(tiny).backbone
    (batch,) = encode(tiny, [sample], batch_tokens=100).batches
    length = found.attentions[1].shape[-1]
    with torch.inference_mode():
        weights = backbone.weights(backbone.layers[1], found.hidden_states[1][0], batch.rotation[:length])
    torch.testing.assert_close(weights, found.attentions[1][0], rtol=0, atol=1e-5)


def test_dropping_nothing_changes_nothing(tiny: QwenVL, samples: SampleSets) -> None:
    backbone = in_dense_order(tiny).backbone
    encoded = encode(tiny, samples.reward[:12], batch_tokens=150)
    for batch in encoded.batches:
        found, lengths = dropped_tails(backbone, batch, after_two_layers(12, 0.0))
        expected = Scoring(backbone, encoded).tails(batch)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
        assert all(sum(each) == len(batch) for each in lengths)


@torch.inference_mode()
def test_dropped_tokens_are_neither_seen_nor_computed(tiny: QwenVL, samples: SampleSets) -> None:
    """Against one sequence whose tokens are taken out by hand."""
    backbone = in_dense_order(tiny).backbone
    asked = [*samples.reward[:7], prose("a red circle.", " is there a red shape? yes")]
    together = DroppingScoring(
        backbone, encode(tiny, asked, batch_tokens=300), partial(read, plan=after_two_layers(12, 0.5))
    )
    scores = together.scores()
    for index, sample in enumerate(asked[:3]):
        encoded = encode(tiny, [sample], batch_tokens=100)
        (batch,) = encoded.batches
        before, x = list(backbone.hidden(batch.embeddings, batch.rotation, batch.groups, last=2))
        last = len(batch) - len(batch.tokens)
        images = batch.is_image.nonzero()[:, 0]
        looked = backbone.weights(backbone.layers[1], before, batch.rotation).mean(0)[last, images]
        gone = images[looked.argsort()[:2]]
        stays = torch.ones(len(batch), dtype=torch.bool)
        stays[gone] = False
        groups = (replace(batch.groups[0], length=len(batch) - 2),)
        tails = backbone.answers(x[stays], batch.rotation[stays], groups, batch.tails - 2, first=2)
        log = backbone.logits(tails).log_softmax(1).gather(1, batch.tokens[:, None]).sum()
        assert scores.log_probability[index] == pytest.approx(float(log), abs=1e-4)
    assert scores.log_probability[7] == pytest.approx(
        Scoring(backbone, encode(tiny, asked[7:], batch_tokens=100)).scores().log_probability[0], abs=1e-5
    )


@pytest.mark.parametrize("name", DROPPINGS)
def test_less_is_computed_the_more_is_dropped(name: str, tiny: QwenVL, samples: SampleSets) -> None:
    elastic = in_dense_order(tiny)
    encoded = encode(tiny, samples.reward[:8], batch_tokens=300)
    spent = []
    for dropped in (None, 0.25, 0.5, 0.75):
        opened = None if dropped is None else DROPPINGS[name].open(elastic.backbone, lambda: encoded, dropped)
        scoring = DroppingScoring(elastic.backbone, encoded, opened)
        assert np.isfinite(scoring.scores().log_probability).all()
        spent.append(scoring.flops)
    assert spent == sorted(spent, reverse=True)
    assert len(set(spent)) == 4


def test_operations_are_those_that_torch_counts(tiny: QwenVL) -> None:
    ids = torch.randint(10, 3000, (1, 23), generator=torch.manual_seed(0))
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), counter:
        tiny.model(input_ids=ids, logits_to_keep=3)
    elastic = in_dense_order(tiny)
    lengths = [[23]] * 12
    whole = flops(elastic.backbone, lengths, 3)
    assert whole == counter.get_total_flops()
    elastic.prune(Allocation((80,) * 12))
    assert whole - flops(elastic.backbone, lengths, 3) == 12 * 80 * 3 * 72 * 2 * 23


def test_a_plan_may_drop_all_but_one(tiny: QwenVL, samples: SampleSets) -> None:
    backbone = in_dense_order(tiny).backbone
    encoded = encode(tiny, samples.reward[:2], batch_tokens=100)
    _, lengths = dropped_tails(backbone, encoded.batches[0], Plan((Stage(1, 0.0),), last_token, best))
    assert [whole - left for whole, left in zip(lengths[0], lengths[-1])] == [3, 3]
