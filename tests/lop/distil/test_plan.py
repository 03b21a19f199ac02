"""Which samples a step reads, and that each process reads."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from lop.distil.plan import steps_of

LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=40)


@given(lengths=LENGTHS, tokens=st.integers(1, 4000), batch=st.integers(1, 300), seed=st.integers(0, 9))
def test_all_samples_are_read_alike_until_there_were_enough_tokens(
    lengths: list[int], tokens: int, batch: int, seed: int
) -> None:
    steps = steps_of(lengths, tokens=tokens, batch_tokens=batch, seed=seed)
    sizes = [sum(lengths[index] for index in step) for step in steps]
    assert tokens <= sum(sizes) < tokens + max(lengths)
    assert all(batch <= size < batch + max(lengths) for size in sizes[:-1])
    times = Counter(index for step in steps for index in step)
    assert max(times.values()) - min(times[index] for index in range(len(lengths))) <= 1
    assert steps == steps_of(lengths, tokens=tokens, batch_tokens=batch, seed=seed)


def test_each_process_has_something_to_read() -> None:
    steps = steps_of([50] * 9, tokens=900, batch_tokens=10, seed=0, processes=4)
    assert all(len(step) == 4 for step in steps)
