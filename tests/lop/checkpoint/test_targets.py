"""Targets of memory and latency: upper bounds, and the largest allocation that keeps them."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lop
from lop.checkpoint.footprint import Footprint
from lop.checkpoint.formats import Format
from lop.cli import main
from lop.errors import LopError
from lop.model.find import assets, fingerprint_model
from lop.space.allocation import Space
from lop.space.latency import Profile, Times
from lop.space.memory import Load, Shape, Tower
from lop.space.size import ModelSize, Target
from tests.lop.checkpoint.test_footprint import predictor

SPACE = Space(5, 96, 8, 0.9)
SIZE = ModelSize(5, 96, 100_000, 200_000, 288, 576)
SHAPE = Shape(5, 96, 1000, queries=96, keys=32, head=32, item=2, tower=Tower(64, 192, 16, 3, 8, 384, 4, 4096, 4096))
LOAD = Load(400, 2)
TIMES = Times(0.001, 0.002, 0.003, (8, 24, 48, 96), (0.001, 0.0015, 0.004, 0.0045))
PROFILE = Profile("model", 5, 96, "a device", {}, {"decode": TIMES, "prefill": TIMES}, {})
forms = st.sampled_from(["hf", "padded"])
FULL = SPACE.layers * SPACE.neurons


def target(kind: str, asked: float) -> Target:
    if kind == "memory":
        return Target(memory=int(asked), load=LOAD)
    return Target(latency=asked, profile=PROFILE)


def cost(footprint: Footprint, kind: str, widths: tuple[int, ...]) -> float:
    if kind == "memory":
        return footprint.memory(widths, LOAD)
    return TIMES.of(widths if footprint.format == "hf" else [max(widths)] * len(widths))


@settings(max_examples=60, deadline=None)
@given(form=forms, kind=st.sampled_from(["memory", "latency"]), seed=st.integers(0, 9), share=st.floats(-0.1, 1.2))
def test_the_answer_is_the_largest_that_brute_force_finds(form: Format, kind: str, seed: int, share: float) -> None:
    footprint, predict = Footprint(SIZE, form, "none", SHAPE), predictor(SPACE, seed)
    least, whole = (cost(footprint, kind, (width,) * 5) for width in (SPACE.min_width, 96))
    asked = least + share * (whole - least)
    wanted = target(kind, asked)
    if cost(footprint, kind, (SPACE.min_width,) * 5) > (int(asked) if kind == "memory" else asked):
        with pytest.raises(LopError, match=rf"{kind} of .* is less than any size of this model takes .*: at least"):
            footprint.budgets(wanted, SPACE)
        return
    found = footprint.allocate(wanted, SPACE, predict)
    assert cost(footprint, kind, found.widths) <= asked
    step = SPACE.granularity * (5 if form == "padded" else 1)
    for budget in range(found.budget + step, FULL + 1, step):
        larger = (budget // 5,) * 5 if form == "padded" else predict(budget).widths
        assert cost(footprint, kind, larger) > asked


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(["memory", "latency"]), seed=st.integers(0, 9), share=st.floats(0, 1), more=st.floats(0, 1))
def test_a_larger_target_never_keeps_less(kind: str, seed: int, share: float, more: float) -> None:
    footprint, predict = Footprint(SIZE, "hf", "none", SHAPE), predictor(SPACE, seed)
    least, whole = (cost(footprint, kind, (width,) * 5) for width in (SPACE.min_width, 96))
    small, large = (
        footprint.allocate(target(kind, least + 1e-9 + part * (whole - least)), SPACE, predict).budget
        for part in (share, share + more)
    )
    assert small <= large


def test_more_than_the_dense_model_takes_is_the_dense_model() -> None:
    footprint = Footprint(SIZE, "hf", "none", SHAPE)
    for kind, asked in (("memory", 2**40), ("latency", 10.0)):
        assert footprint.allocate(target(kind, asked), SPACE, predictor(SPACE, 0)).budget == FULL


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"memory": 5}, "a memory needs a context"),
        ({"ratio": 0.5, "load": LOAD}, "are for a memory"),
        ({"latency": 0.1}, "needs the profile of a device"),
        ({"bytes": 5, "profile": PROFILE}, "is for a latency"),
        ({"latency": 0.1, "memory": 5}, "exactly one target"),
        ({"latency": float("nan"), "profile": PROFILE}, "latency nan"),
        ({"latency": 0.1, "profile": PROFILE, "phase": "thought"}, "decode, prefill"),
    ],
)
def test_targets_that_are_none_are_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(LopError, match=said):
        Target(**wrong)


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """Of `tiny`, with times that were made up."""
    made_up = Times(1e-3, 2e-3, 1e-3, (8, 160), (1e-3, 20e-3))
    model = fingerprint_model(assets() / "model")
    found = Profile(model, 12, 160, "a made-up device", {}, {"decode": made_up, "prefill": made_up}, {})
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(found.as_dict()))
    return path


def test_the_command_line_and_python_agree(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = {"context": 400, "images": 2}
    for options, named, what, most in (
        (["--memory", "5.2MB", "--context", "400", "--images", "2"], {"memory": "5.2MB", **load}, "memory", 5.2e6),
        (
            ["--latency", "100ms", "--device-profile", str(profile), "--latency-of", "prefill"],
            {"latency": 0.1, "device_profile": profile, "latency_of": "prefill"},
            "latency",
            0.1,
        ),
    ):
        assert main(["predict", *options, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer == lop.predict("tiny", **named)
        assert 0.9 * most < answer[what] <= most
        assert 0 < answer["ratio"] < 1
        assert main(["predict", *options]) == 0
        assert ("bytes of memory" if what == "memory" else "on a made-up device") in capsys.readouterr().out


def test_a_checkpoint_is_what_was_predicted(tmp_path: Path) -> None:
    options = {"memory": "5.2MB", "context": 400, "recovery": "none"}
    manifest = lop.prune("tiny", tmp_path / "out", **options)
    assert manifest["widths"] == lop.predict("tiny", **options)["widths"]


def test_what_cannot_be_is_one_line(profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, damaged = tmp_path / "other.json", tmp_path / "damaged.json"
    other.write_text(profile.read_text().replace(fingerprint_model(assets() / "model"), "0" * 16))
    damaged.write_text(profile.read_text().replace("version", "versions"))
    device = ["--device-profile", str(profile)]
    for options, said in (
        (["--memory", "1MiB", "--context", "400"], "at least 4."),
        (["--memory", "1MiB"], "a memory needs a context"),
        (["--memory", "1MiB", "--images", "2"], "go with --memory and its --context"),
        (["--memory", "8MiB", "--context", "10", "--images", "9"], "more than the context of 10"),
        (["--memory", "lots", "--context", "10"], "'lots' is not a number of bytes"),
        (["--memory", "8MiB", "--context", "0"], "context 0"),
        (["--target", "0.3", "--context", "10"], "are for a memory"),
        (["--latency", "40ms"], "needs the profile"),
        (["--latency", "40", *device], "'40' is not a time: write for instance 40ms"),
        (["--latency", "1ms", *device], "in decode on a made-up device: at least"),
        (["--latency", "40ms", "--device-profile", str(tmp_path / "none.json")], "none.json"),
        (["--latency", "40ms", "--device-profile", str(other)], "another model"),
        (["--latency", "40ms", "--device-profile", str(damaged)], "no device profile"),
        (["--target", "0.3", "--latency-of", "decode"], "--latency-of is for --latency"),
        (["--bytes", "4MB", *device], "is for a latency"),
    ):
        assert main(["predict", *options]) == 2, options
        error = capsys.readouterr().err
        assert said in error, options
        assert error.count("\n") == 1
