"""A profile of `tiny` with times that are made up: what was put in comes out, and what is written is read."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lop.cli import main
from lop.model.adapter import open_model
from lop.model.find import assets
from lop.model.sources import family_of
from lop.run.prediction import read_profile
from lop.space.allocation import Attention, Space
from lop.stages import profile
from lop.stages.profile import HostClock, measure
from tests.groups import GROUPS, grouped_tiny

SPACE = Space(12, 160, 8, 0.95)


class MadeUp:
    """A clock that goes on as parts are computed: so much for a neuron, an attention or a group of it, and the head."""

    NEURON, ATTENTION, HEAD = 0.5, 100.0, 1000.0

    def __init__(self, network: Any, *, by_group: bool = False) -> None:
        self._now = 0.0
        backbone = network.get_submodule("model.language_model")
        group = backbone.layers[0].self_attn.o_proj.in_features // GROUPS if by_group else None
        for layer in backbone.layers:
            layer.mlp.down_proj.register_forward_hook(
                lambda module, given, _: self._go(self.NEURON * given[0].shape[-1] * given[0].shape[1])
            )
            layer.self_attn.o_proj.register_forward_hook(
                lambda module, given, _: self._go(
                    self.ATTENTION * given[0].shape[1] * (given[0].shape[-1] / group if group else 1)
                )
            )
        network.get_submodule("lm_head").register_forward_hook(lambda *_: self._go(self.HEAD))

    def _go(self, seconds: float) -> None:
        self._now += seconds

    def mark(self) -> float:
        return self._now

    def seconds(self, start: float, end: float) -> float:
        return end - start


@pytest.fixture
def network() -> Any:
    return open_model(assets() / "model", device="cpu", dtype="float32")


def test_the_parts_are_what_they_took(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "_ROUNDS", 1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    phases, checks = measure(network, family_of(assets() / "model"), SPACE, 16, clock=MadeUp(network))
    for phase, tokens in (("decode", 1), ("prefill", 16)):
        times = phases[phase]
        assert times.widths[-1] == SPACE.neurons
        assert times.ffn == pytest.approx([MadeUp.NEURON * width for width in times.widths])
        assert times.attention == pytest.approx(MadeUp.ATTENTION)
        assert times.head == pytest.approx(MadeUp.HEAD / tokens)
        assert times.other == pytest.approx(0)
        # Here parts do add up, whatever the widths: also between those that were measured.
        assert [row["ratio"] for row in checks[phase]] == [0.2, 0.3, 0.5]
        for row in checks[phase]:
            assert row["predicted"] == pytest.approx(row["measured"], rel=0.02)
    # The model is as it was.
    after = network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_groups_of_attention_are_timed_where_it_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "_ROUNDS", 1)
    source = grouped_tiny(tmp_path)
    network = open_model(source, device="cpu", dtype="float32")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    space = replace(SPACE, attention=Attention(GROUPS, 100, 216), vanishing=True)
    phases, checks = measure(network, family_of(source), space, 16, clock=MadeUp(network, by_group=True))
    for phase, times in phases.items():
        assert times.groups == (0, 1, 2, 3)
        assert times.of_groups == pytest.approx([MadeUp.ATTENTION * groups for groups in times.groups])
        assert (times.widths[0], times.ffn[0]) == (0, 0)  # What is skipped takes no time.
        assert times.ffn == pytest.approx([MadeUp.NEURON * width for width in times.widths])
        for row in checks[phase]:
            assert row["predicted"] == pytest.approx(row["measured"], rel=0.02)
    after = network.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


class SlowToAsk(MadeUp):
    """One that takes time itself to be looked at, as a GPU's is that waits for what it is told."""

    LOOK = 20.0

    def mark(self) -> float:
        self._go(self.LOOK)
        return super().mark()


def test_what_looking_at_parts_takes_is_not_counted(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "_ROUNDS", 1)
    phases, checks = measure(network, family_of(assets() / "model"), SPACE, 16, clock=SlowToAsk(network))
    for phase, times in phases.items():
        assert times.attention == pytest.approx(MadeUp.ATTENTION)
        for row in checks[phase]:
            assert row["predicted"] == pytest.approx(row["measured"], rel=0.03)


def test_a_wider_ffn_never_takes_less(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "_ROUNDS", 1)
    monkeypatch.setattr(MadeUp, "NEURON", -0.01)
    clock = MadeUp(network)
    phases, _ = measure(network, family_of(assets() / "model"), SPACE, 4, clock=clock)
    for times in phases.values():
        assert list(times.ffn) == sorted(times.ffn)
        assert min(times.ffn) >= 0


def test_the_command_writes_what_predict_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up: list[MadeUp] = []

    def open_with_clock(*args: Any, **options: Any) -> Any:
        network = open_model(*args, **options)
        made_up.append(MadeUp(network))
        return network

    monkeypatch.setattr(profile, "_ROUNDS", 1)
    monkeypatch.setattr(profile, "open_model", open_with_clock)
    monkeypatch.setattr(HostClock, "mark", lambda self: made_up[-1].mark())
    out = tmp_path / "device.json"
    assert main(["profile", "--out", str(out), "--context", "8"]) == 0
    assert read_profile(out).settings["context"] == 8
    # 12 layers of attention, the head, and at most so many neurons.
    whole = 12 * MadeUp.ATTENTION + MadeUp.HEAD + 1000 * MadeUp.NEURON
    capsys.readouterr()
    assert main(["predict", "--latency", f"{whole}s", "--device-profile", str(out), "--json"]) == 0
    kept = int(capsys.readouterr().out.partition('"kept_neurons": ')[2].partition(",")[0])
    assert kept == 1000


def test_what_cannot_be_measured_is_said_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, said in (
        (["--out", str(tmp_path)], "not a file"),
        (["--out", str(tmp_path / "no" / "file.json")], "not a file"),
        (["--out", str(tmp_path / "a.json"), "--context", "0"], "context 0"),
        (["--out", str(tmp_path / "a.json"), "--set", "device=warp"], "device 'warp'"),
    ):
        assert main(["profile", *options]) == 2
        assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
