"""A model whose attention is pruned, too: answers, checkpoints, and the picture of both parts on the page."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lop
from lop.run.run import Run
from lop.space.latency import Profile, Times
from serve.catalogue import ServedModel, load_catalogue
from serve.settings import ModelSettings, ServiceSettings
from tests.groups import GROUPS
from tests.lop.stages.test_axes import LAYERS, NEURONS, base, both, ffns  # noqa: F401
from tests.serve.conftest import Service, Start
from tests.serve.test_page import browser, page, picture, settle  # noqa: F401

TIMES = Times(3e-3, 2e-3, 1e-3, (0, NEURONS), (0.0, 20e-3), (0, GROUPS), (0.0, 3e-3))


def offers(run: Run, path: Path, times: Times) -> ServiceSettings:
    phases = {"decode": times, "prefill": times}
    profile = Profile(run.model_fingerprint, LAYERS, NEURONS, "a made-up laptop", {}, phases, {})
    path.write_text(json.dumps(profile.as_dict()))
    return ServiceSettings(models={"grouped": ModelSettings(run=run.folder, profiles={"laptop": path})})


@pytest.fixture
def service(both: Run, start: Start, tmp_path: Path) -> Service:  # noqa: F811
    settings = offers(both, tmp_path / "profile.json", TIMES)
    models: dict[str, ServedModel] = load_catalogue(settings)
    return start(models=models, offered=settings.models)


def allocate(service: Service, target: dict[str, Any], **changes: Any) -> Any:
    return service.ask("POST", "/v1/allocations", {"model": "grouped", "target": target, **changes}).json


def test_both_parts_are_answered_as_the_command_line_does(service: Service, both: Run) -> None:  # noqa: F811
    (model,) = service.ask("GET", "/v1/models").json["models"]
    assert (model["groups"], model["layers"]) == (GROUPS, LAYERS)
    answer = allocate(service, {"ratio": 0.35})
    ours = lop.predict(ratio=0.35, run=both.folder)
    assert (answer["widths"], answer["groups"]) == (ours["widths"], ours["groups"])
    assert len(answer["widths"]) == len(answer["groups"]) == len(answer["ratios"]) == LAYERS
    for kind, ends in model["targets"].items():
        for value in ends.values():
            assert "widths" in allocate(service, {kind: value})
    least, most = (model["devices"][0]["decode"][end] for end in ("least", "largest"))
    for format in ("hf", "padded"):
        middle = (least + most) / 2 if format == "hf" else 0.9 * most
        found = allocate(service, {"latency": middle, "device": "laptop"}, format=format)
        assert 0.9 * middle < found["latency"] <= middle
    for each in model["quantised"]:
        asked = sum(each["bytes"].values()) // 2
        assert allocate(service, {"bytes": asked}, bits=each["bits"])["bytes"] <= asked


def test_checkpoints_of_both_parts_are_made_and_told_apart(service: Service, tmp_path: Path) -> None:
    options = {"recovery": "none", "bits": 8}
    folder = lop.Client(service.url).get("grouped", ratio=0.35, out=tmp_path / "out", **options)
    answer, found = allocate(service, {"ratio": 0.35}, **options), lop.inspect(folder)
    assert (list(found.widths), list(found.groups or (GROUPS,) * LAYERS)) == (answer["widths"], answer["groups"])
    assert (found.bytes, found.bits) == (answer["bytes"], 8)
    jobs = [service.make({"ratio": ratio}, model="grouped", **options).json for ratio in (0.35, 0.35, 0.36)]
    assert jobs[0]["id"] == jobs[1]["id"] != jobs[2]["id"]


def test_a_profile_of_ffns_alone_is_not_served(both: Run, tmp_path: Path) -> None:  # noqa: F811
    alone = replace(TIMES, groups=(), of_groups=())
    with pytest.raises(lop.LopError, match="times FFNs alone, and here attention is pruned, too"):
        load_catalogue(offers(both, tmp_path / "profile.json", alone))


def test_the_page_shows_both_parts(page: Any, service: Service) -> None:  # noqa: F811
    page.goto(service.url)
    settle(page)
    page.fill("#slider", "700")
    settle(page)
    shown = page.locator("#rows td:nth-child(4)").all_text_contents()
    largest = service.ask("GET", "/v1/models").json["models"][0]["targets"]["ratio"]["largest"]
    expected = allocate(service, {"ratio": round(0.7 * largest, 4)})
    assert [int(text) for text in shown] == expected["groups"]
    heights = [float(bar.get_attribute("height")) for bar in page.locator("#heads .kept").all()]
    assert [round(height / max(heights), 3) for height in heights] == [
        round(kept / max(expected["groups"]), 3) for kept in expected["groups"]
    ]
    assert "groups of attention heads" in page.text_content("#chart-text")
    picture(page, "page-both.png")
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    picture(page, "page-both-phone.png")
