"""Memory and latency as targets of the service."""

import json
from pathlib import Path
from typing import Any

import pytest

import lop
from lop.model.find import assets, fingerprint_model
from lop.space.latency import Profile, Times
from serve.catalogue import ServedModel, load_catalogue
from serve.settings import ModelSettings, ServiceSettings
from tests.serve.conftest import Service, Start


def settings(path: Path, model: str) -> ServiceSettings:
    """With a profile of some model on a device called `laptop`."""
    times = Times(1e-3, 2e-3, 1e-3, (8, 160), (1e-3, 20e-3))
    profile = Profile(model, 12, 160, "a made-up laptop", {}, {"decode": times, "prefill": times}, {})
    path.write_text(json.dumps(profile.as_dict()))
    return ServiceSettings(models={"tiny": ModelSettings(config="tiny", profiles={"laptop": path})})


@pytest.fixture
def profiled(tmp_path: Path) -> dict[str, ServedModel]:
    return load_catalogue(settings(tmp_path / "profile.json", fingerprint_model(assets() / "model")))


def allocate(service: Service, target: dict[str, Any], **changes: Any) -> Any:
    return service.ask("POST", "/v1/allocations", {"model": "tiny", "target": target, **changes})


def test_a_card_gets_the_largest_model_that_fits_it(service: Service) -> None:
    load = {"context": 400, "images": 2}
    answer = allocate(service, {"memory": 5_200_000, **load}).json
    assert answer["memory"] <= 5_200_000
    ours = lop.predict("tiny", memory=5_200_000, **load)
    assert (answer["widths"], answer["memory"]) == (ours["widths"], ours["memory"])
    assert allocate(service, {"memory": 24 * 2**30, **load}).json["ratio"] == 0
    padded = allocate(service, {"memory": 5_200_000, **load}, format="padded").json
    assert padded["memory"] <= 5_200_000
    assert len(set(padded["widths"])) == 1


def test_a_latency_is_kept_on_the_device_it_is_of(start: Start, profiled: dict[str, ServedModel]) -> None:
    service = start(models=profiled)
    (offered,) = service.ask("GET", "/v1/models").json["models"]
    (device,) = offered["devices"]
    assert (device["name"], device["description"]) == ("laptop", "a made-up laptop")
    least, largest = device["decode"]["least"], device["decode"]["largest"]
    middle = (least + largest) / 2
    for phase in ("decode", "prefill"):
        answer = allocate(service, {"latency": middle, "device": "laptop", "phase": phase}).json
        assert 0.95 * middle < answer["latency"] <= middle
    assert allocate(service, {"latency": least, "device": "laptop"}).status == 200
    made = lop.Client(service.url).make("tiny", latency=middle, device="laptop", recovery="none")
    assert made["target"] == {"latency": middle, "device": "laptop", "phase": "decode"}
    assert service.finish(made["id"])["state"] == "complete"


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"memory": 1000, "context": 400}, "at least"),
        ({"memory": 10**7}, "context"),
        ({"memory": 10**7, "context": 4, "images": 9}, "more than the context of 4"),
        ({"memory": 10**7, "context": 0}, "context"),
        ({"memory": 10**7, "context": 4, "ratio": 0.5}, "exactly one target"),
        ({"context": 4}, "exactly one target"),
        ({"latency": 0.04, "device": "phone"}, "no profile of device 'phone'"),
        ({"latency": 0.04}, "device"),
        ({"latency": -1, "device": "laptop"}, "latency"),
        ({"latency": 1e-9, "device": "laptop"}, "at least"),
        ({"latency": 0.04, "device": "laptop", "phase": "thought"}, "phase"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    start: Start, profiled: dict[str, ServedModel], target: dict[str, Any], said: str
) -> None:
    answer = allocate(start(models=profiled), target)
    assert answer.status == 422
    assert said in answer.json["detail"]
    assert "\n" not in answer.json["detail"]


def test_a_profile_of_another_model_is_not_served(tmp_path: Path) -> None:
    with pytest.raises(lop.LopError, match="another model"):
        load_catalogue(settings(tmp_path / "profile.json", "0" * 16))
