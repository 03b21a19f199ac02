"""The teacher's likeliest tokens and a bucket for all others: what they say of the distance to it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lop.distil import loss
from lop.distil.loss import Likeliest, distance, likeliest


def divergence(teacher: Likeliest, logits: Tensor) -> Tensor:
    """Of logits themselves."""
    return loss.divergence(teacher, logits, torch.eye(logits.shape[1]))


def whole(teacher: Tensor, student: Tensor) -> Tensor:
    """KL over the whole vocabulary, by the book, in double precision."""
    p, q = (logits.double().softmax(1) for logits in (teacher, student))
    return (p * (p / q).log()).sum(1)


@given(seed=st.integers(0, 99), vocabulary=st.integers(2, 40), spread=st.sampled_from([0.1, 1.0, 5.0]))
def test_with_all_tokens_it_is_the_kl(seed: int, vocabulary: int, spread: float) -> None:
    torch.manual_seed(seed)
    teacher, student = spread * torch.randn(2, 5, vocabulary)
    found = divergence(likeliest(teacher, vocabulary), student)
    torch.testing.assert_close(found.double(), whole(teacher, student), rtol=1e-4, atol=1e-5)


@given(seed=st.integers(0, 99), vocabulary=st.integers(3, 40))
def test_with_a_bucket_it_is_the_kl_of_what_is_told_apart(seed: int, vocabulary: int) -> None:
    torch.manual_seed(seed)
    teacher, student = 3 * torch.randn(2, 5, vocabulary)
    exact = whole(teacher, student)
    before = torch.zeros_like(exact)
    for k in range(1, vocabulary):
        noted = likeliest(teacher, k)
        mine, theirs = (logits.double().softmax(1) for logits in (teacher, student))
        joined = []
        for p in (mine, theirs):
            known = p.gather(1, noted.tokens)
            joined.append(torch.cat([known, 1 - known.sum(1, keepdim=True)], 1).clamp(1e-30))
        found = divergence(noted, student).double()
        torch.testing.assert_close(found, whole(*(p.log() for p in joined)), rtol=1e-3, atol=1e-4)
        # The more is told apart, the more differs.
        assert (found >= before - 1e-4).all()
        assert (found <= exact + 1e-4).all()
        before = found


@pytest.mark.parametrize("k", [1, 7, 8])
def test_a_student_that_follows_it_comes_to_say_what_the_teacher_says(k: int) -> None:
    torch.manual_seed(0)
    noted = likeliest(2 * torch.randn(3, 8), k)
    student = torch.zeros(3, 8, requires_grad=True)
    optimizer = torch.optim.Adam([student], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        divergence(noted, student).sum().backward()
        optimizer.step()
    reached = student.detach().log_softmax(1).gather(1, noted.tokens)
    torch.testing.assert_close(reached.exp(), noted.log_probabilities.exp(), rtol=0, atol=2e-3)


@given(seed=st.integers(0, 99), k=st.integers(1, 9), rows=st.sampled_from([1, 3, 1500]))
def test_its_gradient_is_that_of_the_formula(seed: int, k: int, rows: int) -> None:
    torch.manual_seed(seed)
    noted, head, weights = likeliest(2 * torch.randn(rows, 9), k), torch.randn(9, 4), torch.rand(rows)
    states = torch.randn(rows, 4, requires_grad=True)
    values = loss.divergence(noted, states, head)
    (found,) = torch.autograd.grad((weights * values).sum(), states)
    log_q = (states @ head.T).log_softmax(1)
    expected = (noted.log_probabilities.exp() * (noted.log_probabilities - log_q.gather(1, noted.tokens))).sum(1)
    if k < 9:
        expected = expected + noted.rest.exp() * (noted.rest - log_q.scatter(1, noted.tokens, -torch.inf).logsumexp(1))
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    (wanted,) = torch.autograd.grad((weights * expected).sum(), states)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_what_is_all_but_impossible_has_a_gradient() -> None:
    teacher, student = torch.tensor([[100.0, 0, 0]]), torch.tensor([[90.0, 0, 0]], requires_grad=True)
    divergence(likeliest(teacher, 1), student).sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_the_distance_of_states_does_not_depend_on_how_large_they_are() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 4, 6)
    torch.testing.assert_close(distance(teacher, student), distance(1000 * teacher, 1000 * student))
    assert (distance(teacher, teacher) == 0).all()
    torch.testing.assert_close(distance(teacher, torch.zeros_like(teacher)), torch.ones(4))
