"""Memory of a run: it grows with all that it depends on, and is at least what must be held."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lop.errors import LopError
from lop.space.memory import Load, Shape, Tower, working_bytes

TOWER = Tower(1280, 3420, 80, 3, patch=14, patch_numbers=1176, merge=2, least=3136, most=12_845_056)
SHAPE = Shape(36, 2048, 151_936, queries=2048, keys=256, head=128, item=2, tower=TOWER)
loads = st.builds(
    Load,
    context=st.integers(20_000, 100_000),
    images=st.integers(0, 8),
    batch=st.integers(1, 8),
    pixels=st.integers(1, 2**20),
)


@given(load=loads, width=st.integers(1, 11_008), name=st.sampled_from(["context", "images", "batch"]))
def test_more_work_and_wider_layers_never_take_less(load: Load, width: int, name: str) -> None:
    more = replace(load, **{name: getattr(load, name) + 1})
    taken = working_bytes(SHAPE, load, width)
    assert taken < working_bytes(SHAPE, more, width)
    assert taken <= working_bytes(SHAPE, load, width + 128)


@given(load=loads, width=st.integers(1, 11_008))
def test_what_must_be_there_fits(load: Load, width: int) -> None:
    tokens = load.context * load.batch
    cache = 2 * 36 * tokens * 256 * 2
    products = 3 * tokens * width * 2
    patches = load.image_tokens(TOWER) * 4 * load.images * load.batch
    assert working_bytes(SHAPE, load, width) > cache + products + 4 * 1176 * patches


def test_images_are_as_large_as_the_processor_makes_them() -> None:
    assert Load(10**5, 1, pixels=1036 * 1036).image_tokens(TOWER) == 37 * 37
    assert Load(10**5, 1, pixels=10**9).image_tokens(TOWER) == TOWER.most // 784
    assert Load(10**5, 1, pixels=1).image_tokens(TOWER) == 4


def test_images_without_room_are_refused() -> None:
    with pytest.raises(LopError, match=r"4 images of 1337 tokens each are more than the context of 4096"):
        working_bytes(SHAPE, Load(4096, 4), 128)


@pytest.mark.parametrize("wrong", [{"context": 0}, {"images": -1}, {"batch": 0}, {"pixels": 0}])
def test_loads_that_are_none_are_named(wrong: dict[str, int]) -> None:
    with pytest.raises(LopError, match=next(iter(wrong))):
        Load(**{"context": 100, **wrong})
