"""What a refit is said to take, against what it does."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lop.checkpoint import forecast
from lop.checkpoint.forecast import Load, Rates, refit_seconds, sample_load, tell_refit
from lop.checkpoint.recovery import refit
from lop.errors import LopError
from lop.model.adapter import QwenVL, load_model
from lop.model.elastic import ElasticModel
from lop.model.encoding import encode
from lop.model.find import assets
from lop.model.samples import SampleSets
from lop.run.config import find_config, load_config
from lop.run.run import Run
from lop.stages import calibrate


def test_the_load_of_all_samples_is_told_from_a_few(shared_tiny: QwenVL, samples: SampleSets) -> None:
    chosen = samples.calibration[::4]
    load = sample_load(shared_tiny, chosen)
    encoded = encode(shared_tiny, chosen, batch_tokens=2048)
    assert load.tokens == pytest.approx(sum(len(batch) for batch in encoded.batches), rel=0.1)
    images = {sample.image_key for sample in chosen}
    assert load.patches == len(images) * 64  # 64 × 64 pixels in patches of 8 × 8.
    assert load.longest == 64


@pytest.mark.parametrize("whole_before", [0, 5])
def test_the_operations_counted_are_those_of_a_refit(whole_before: int, samples: SampleSets) -> None:
    model = load_model(assets() / "model", device="cpu", dtype="float32")
    encoded = encode(model, samples.calibration[::10], batch_tokens=2048)
    neurons, layers = model.model.config.text_config.intermediate_size, len(model.layers)
    widths = [neurons] * whole_before + [neurons // 2] * (layers - whole_before)
    load = Load(patches=0, longest=0, tokens=sum(len(batch) for batch in encoded.batches))
    free = Rates(own=1.0, single=1.0, double=float("inf"))  # FlopCounterMode does not count a solve.
    expected = refit_seconds(model, load, widths, free)
    elastic = ElasticModel(model, np.tile(np.arange(neurons), (layers, 1)))
    with FlopCounterMode(display=False) as counter:
        for _ in refit(elastic.backbone, elastic.backbone.layers, encoded, widths):
            pass
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_more_of_anything_takes_longer(shared_tiny: QwenVL) -> None:
    load, rates, widths = Load(1000, 64, 1000), Rates(1e9, 1e9, 1e9), [80] * 12
    base = refit_seconds(shared_tiny, load, widths, rates)
    assert refit_seconds(shared_tiny, replace(load, tokens=2000), widths, rates) > base
    assert refit_seconds(shared_tiny, replace(load, patches=2000), widths, rates) > base
    assert refit_seconds(shared_tiny, load, [120] * 12, rates) > base
    for name in ("own", "single", "double"):
        assert refit_seconds(shared_tiny, load, widths, replace(rates, **{name: 1e8})) > base


@pytest.mark.parametrize(("count", "seconds", "said"), [(600, 10**6, ""), (600, 0, "about"), (4, 10**6, "are few")])
def test_what_is_worth_telling_is_told(
    shared_tiny: QwenVL,
    samples: SampleSets,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    seconds: int,
    said: str,
) -> None:
    monkeypatch.setattr(forecast, "_SECONDS_WORTH_TELLING", seconds)
    with caplog.at_level(logging.INFO):
        tell_refit(shared_tiny, samples.calibration[:count], [80] * 12)
    assert said in caplog.text
    assert bool(said) == bool(caplog.records)


def test_rates_are_measured_in_each_precision() -> None:
    rates = forecast.measured_rates(torch.device("cpu"), torch.float32)
    assert 1e8 < min(rates.own, rates.single, rates.double) < max(rates.own, rates.single, rates.double) < 1e14


@pytest.mark.parametrize(("model", "warned"), [("tiny", False), ("{copy}", True)])
def test_the_embedded_samples_are_said_to_be_no_other_models(
    model: str, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(assets() / "model", tmp_path / "model")
    config = load_config(find_config("tiny"), model=model.format(copy=copy))

    def stop(*_: object, **__: object) -> None:
        raise LopError("far enough")

    monkeypatch.setattr(calibrate, "load_model", stop)
    with pytest.raises(LopError, match="far enough"), caplog.at_level(logging.WARNING):
        calibrate.calibrate_stage(Run(config, tmp_path / "run"))
    assert ("your own" in caplog.text) == warned
