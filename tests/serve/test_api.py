"""The API as its users meet it."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lop
from lop.cli import main
from lop.model.find import assets, fingerprint_model
from lop.model.tensors import model_size
from lop.report.intervals import Interval
from lop.storage.fingerprint import fingerprint_file
from lop.storage.headers import read_tensors
from serve import schemas
from serve.catalogue import ServedModel, load_catalogue
from serve.job import Job
from serve.settings import ServiceSettings
from tests.serve.conftest import Service, Start


def test_models_are_described(service: Service) -> None:
    (model,) = service.ask("GET", "/v1/models").json["models"]
    size = model_size(read_tensors(assets() / "model"))
    assert (model["layers"], model["parameters"], model["bytes"]) == (size.layers, size.parameters, size.bytes)
    assert model["targets"]["parameters"]["largest"] == size.parameters
    assert model["accuracy"]
    assert all(curve["points"] for curve in model["accuracy"])


def test_an_allocation_is_what_the_command_line_predicts(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--target", "0.37", "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    answer = service.ask("POST", "/v1/allocations", {"model": "tiny", "target": {"ratio": 0.37}}).json
    expected_accuracy = answer.pop("expected_accuracy")
    # Attention is dense, and neither memory nor a latency was asked for.
    assert answer == {"model": "tiny", "groups": None, "memory": None, "latency": None, **expected}
    assert expected_accuracy["low"] <= expected_accuracy["value"] <= expected_accuracy["high"]
    for kind in ("parameters", "bytes"):
        asked = {"model": "tiny", "target": {kind: answer[kind]}}
        assert service.ask("POST", "/v1/allocations", asked).json["widths"] == answer["widths"]


def test_both_ends_of_each_range_can_be_asked_for(service: Service) -> None:
    (model,) = service.ask("GET", "/v1/models").json["models"]
    for kind, ends in model["targets"].items():
        for value in ends.values():
            answer = service.ask("POST", "/v1/allocations", {"model": "tiny", "target": {kind: value}})
            assert answer.status == 200, answer.json


def test_the_checkpoint_is_what_lop_prune_writes(service: Service, tmp_path: Path) -> None:
    folder = lop.Client(service.url).get("tiny", ratio=0.25, recovery="none", out=tmp_path / "served")
    assert main(["prune", "--target", "0.25", "--recovery", "none", "--out", str(tmp_path / "pruned")]) == 0
    names = sorted(file.name for file in folder.iterdir())
    assert names == sorted(file.name for file in (tmp_path / "pruned").iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "pruned" / name).read_bytes(), name
    assert isinstance(lop.load(folder), torch.nn.Module)


def test_listing_is_paged_and_deleting_removes(start: Start) -> None:
    service = start()
    made = [service.make({"ratio": ratio}).json["id"] for ratio in (0.1, 0.2, 0.3, 0.4, 0.5)]
    for id in made:
        service.finish(id)
    seen, after = [], ""
    while after is not None:
        page = service.ask("GET", f"/v1/checkpoints?limit=2{after and f'&after={after}'}").json
        seen += [each["id"] for each in page["checkpoints"]]
        after = page["next"]
    assert seen == made[::-1]
    assert service.ask("DELETE", f"/v1/checkpoints/{made[0]}").status == 204
    for method in ("GET", "DELETE"):
        assert service.ask(method, f"/v1/checkpoints/{made[0]}").status == 404
    assert {folder.name for folder in (service.settings.storage / "checkpoints").iterdir()} == set(made[1:])


def test_the_queue_is_bounded_and_a_waiting_export_can_be_cancelled(start: Start) -> None:
    service = start(workers=0, queue=2)
    first, second = (service.make({"ratio": ratio}) for ratio in (0.1, 0.2))
    refused = service.make({"ratio": 0.3})
    assert (refused.status, int(refused.headers["retry-after"]) > 0) == (429, True)
    assert service.make({"ratio": 0.1}).json["id"] == first.json["id"]
    assert service.ask("GET", f"/v1/checkpoints/{first.json['id']}/files/config.json").status == 409
    assert service.ask("DELETE", second.headers["location"]).status == 204
    assert service.make({"ratio": 0.3}).status == 202


def test_least_recently_used_checkpoints_make_room(start: Start, models: dict[str, ServedModel]) -> None:
    size = model_size(read_tensors(assets() / "model"))
    service = start(quota=int(2.2 * (size.bytes + models["tiny"].companions)))
    ids = [service.make({"ratio": ratio}).json["id"] for ratio in (0.0, 0.05)]
    states = [service.finish(id) for id in ids]
    assert [state["state"] for state in states] == ["complete", "complete"]
    # The older one is used, so the other one goes.
    assert service.ask("GET", states[0]["files"]["config.json"]["url"]).status == 200
    third = service.make({"ratio": 0.02}).json["id"]
    assert service.finish(third)["state"] == "complete"
    now = {id: service.ask("GET", f"/v1/checkpoints/{id}").json["state"] for id in (*ids, third)}
    assert now == {ids[0]: "complete", ids[1]: "evicted", third: "complete"}
    assert not (service.settings.storage / "checkpoints" / ids[1]).exists()
    assert service.make({"ratio": 0.05}).json["state"] in ("queued", "running")
    assert service.finish(ids[1])["state"] == "complete"
    assert service.store.bytes_taken() <= service.settings.quota


def test_a_format_takes_the_room_that_it_needs(start: Start) -> None:
    service = start()
    true, padded = (service.make({"ratio": 0.5}, format=format).json["id"] for format in ("hf", "padded"))
    assert true != padded
    states = [service.finish(id) for id in (true, padded)]
    for state in states:
        job = service.store.get(state["id"])
        assert job is not None
        assert job.bytes is not None
        assert 0 <= job.reserved - job.bytes < 2**21
    assert states[0]["bytes"] < states[1]["bytes"]
    refused = service.make({"ratio": 0.5}, format="padded", recovery="bias")
    assert (refused.status, "bias" in refused.json["detail"]) == (422, True)


def test_bits_are_asked_for_and_make_another_checkpoint(start: Start, tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5.24")
    service = start()
    (model,) = service.ask("GET", "/v1/models").json["models"]
    assert model["bits"] == [16, 8, 4]
    plain = service.make({"ratio": 0.4}).json
    folder = lop.Client(service.url).get("tiny", ratio=0.4, recovery="none", bits=8, out=tmp_path / "served")
    found = lop.inspect(folder)
    made = service.make({"ratio": 0.4}, bits=8).json
    assert made["id"] != plain["id"]
    assert (found.bits, found.bytes) == (8, made["allocation"]["bytes"])
    assert made["allocation"]["widths"] == plain["allocation"]["widths"]
    assert made["allocation"]["bytes"] < plain["allocation"]["bytes"]
    assert made["allocation"]["expected_accuracy"] is None
    assert service.make({"bytes": 3_900_000}, bits=8).json["allocation"]["bytes"] <= 3_900_000
    refused = service.make({"ratio": 0.4}, bits=5)
    assert (refused.status, "bits" in refused.json["detail"]) == (422, True)


def test_a_file_for_llama_cpp_is_a_format_like_any(service: Service) -> None:
    asked = 1_500_000
    made = service.make({"bytes": asked}, format="gguf-q8_0").json
    state = service.finish(made["id"])
    assert state["state"] == "complete"
    assert {"model-q8_0.gguf", "lop.json"} <= state["files"].keys()
    manifest = service.ask("GET", state["files"]["lop.json"]["url"]).json
    assert manifest["gguf"]["bytes"] == made["allocation"]["bytes"] <= asked
    refused = service.make({"ratio": 0.5}, format="gguf", recovery="bias")
    assert (refused.status, "bias" in refused.json["detail"]) == (422, True)


def test_a_size_is_never_exceeded_in_any_format(service: Service) -> None:
    asked = 4_321_000
    widths = []
    for form, recovery in (("hf", "none"), ("hf", "bias"), ("padded", "none")):
        request = {"model": "tiny", "target": {"bytes": asked}, "format": form, "recovery": recovery}
        answer = service.ask("POST", "/v1/allocations", request).json
        made = service.finish(service.ask("POST", "/v1/checkpoints", request).json["id"])
        assert made["allocation"] == answer
        tensors = read_tensors(Path(made["path"])).values()
        assert sum(info.bytes for info in tensors) == answer["bytes"] <= asked
        assert sum(info.parameters for info in tensors) == answer["parameters"]
        widths.append(answer["widths"])
    assert answer["expected_accuracy"] is None  # Nobody has measured these widths.
    assert len(set(map(tuple, widths))) >= 2
    # As many neurons, but as the predictor spreads them: another checkpoint.
    predicted = service.make({"ratio": answer["ratio"]}, format="padded").json
    assert predicted["allocation"]["kept_neurons"] == answer["kept_neurons"]
    assert predicted["id"] != made["id"]
    refused = service.make({"bytes": 1000}, format="padded")
    assert (refused.status, "outside what this model can have" in refused.json["detail"]) == (422, True)


def test_what_is_larger_than_the_quota_is_refused(start: Start) -> None:
    assert start(quota=1000).make({"ratio": 0.1}).status == 422


def test_an_export_that_takes_too_long_fails_and_leaves_nothing(start: Start) -> None:
    service = start(time_limit=1e-9)
    last = service.finish(service.make({"ratio": 0.1}).json["id"])
    assert last["state"] == "failed"
    assert "limit" in last["error"]
    assert list((service.settings.storage / "checkpoints").iterdir()) == []


def test_a_checkpoint_is_hashed_once_and_within_the_limit(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = 0

    def count(*_: object, **__: object) -> None:
        nonlocal hashed
        hashed += 1

    with monkeypatch.context() as patch:
        patch.setattr("lop.checkpoint.export.check_hashes", count)
        service = start()
        last = service.finish(service.make({"ratio": 0.1}).json["id"])
    assert hashed == 0
    for name, file in last["files"].items():
        assert file["sha256"] == hashlib.sha256((Path(last["path"]) / name).read_bytes()).hexdigest()
    # What a process left that died before it could record it is checked: that is within the limit, too.
    job = service.store.get(last["id"])
    assert job is not None
    for limit, state in ((60.0, "complete"), (1e-9, "failed")):
        storage = tmp_path / f"storage-{limit}"
        shutil.copytree(service.settings.storage, storage)
        (storage / "jobs" / f"{job.id}.json").write_text(json.dumps(replace(job, state="running").as_dict()))
        weights = storage / "checkpoints" / job.id / "model.safetensors"
        before = weights.stat().st_ino
        again = start(storage=storage, time_limit=limit).finish(job.id)
        assert again["state"] == state
        if state == "complete":
            assert again["files"] == last["files"]
            assert weights.stat().st_ino == before
        else:
            assert "longer than its limit" in again["error"]


def test_a_full_disk_fails_the_export_alone(start: Start, small_disk: Path) -> None:
    service = start(storage=small_disk / "s")
    last = service.finish(service.make({"ratio": 0.1}).json["id"])
    assert (last["state"], "space" in last["error"].lower()) == ("failed", True)
    assert service.ask("GET", "/healthz").status == 200
    assert list((service.settings.storage / "checkpoints").iterdir()) == []


def test_a_restart_goes_on_with_what_was_accepted(start: Start) -> None:
    accepted = [start(workers=0).make({"ratio": ratio}).json["id"] for ratio in (0.1, 0.2)]
    service = start()
    assert [service.finish(id)["state"] for id in accepted] == ["complete", "complete"]


def test_two_workers_share_the_work(start: Start) -> None:
    service = start(workers=2)
    ids = [service.make({"ratio": ratio}).json["id"] for ratio in (0.1, 0.15, 0.2, 0.25)]
    for id in ids:
        assert service.finish(id)["state"] == "complete"
    assert sorted(job.id for job in service.finished) == sorted(ids)
    assert {job.attempts for job in service.finished} == {1}


def test_expected_accuracy_comes_from_the_comparison_where_there_is_one(start: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(assets() / "run", run)
    made_from = {
        "predictor": fingerprint_file(run / "predictor" / "predictor.json"),
        "model": fingerprint_model(assets() / "model"),
    }

    def measured(method: str, target: float, value: float, **more: str) -> dict[str, object]:
        return {"method": method, "target": target, "accuracy": vars(Interval(value, value - 0.1, value + 0.1)), **more}

    results = {
        "fingerprints": made_from,
        "averages": [
            measured("dense", 0, 0.9),
            measured("lop-predictor", 0.2, 0.9),
            measured("lop-predictor", 0.5, 0.7),
            measured("flap", 0.5, 0.1),
        ],
        "rows": [{"method": "dense", "total": 40}],
        "recoveries": [
            measured("lop-predictor", 0.5, 0.7, recovery="none"),
            measured("lop-predictor", 0.5, 0.8, recovery="refit"),
            measured("flap", 0.5, 0.1, recovery="refit"),
        ],
    }

    def catalogue(results: dict[str, object]) -> dict[str, ServedModel]:
        (run / "results.json").write_text(json.dumps(results))
        return load_catalogue(ServiceSettings(storage=tmp_path, models={"tiny": {"run": run}}))

    service = start(models=catalogue(results))

    def expected(ratio: float, **asked: str) -> dict[str, object]:
        answer = service.ask("POST", "/v1/allocations", {"model": "tiny", "target": {"ratio": ratio}, **asked}).json
        return dict(answer["expected_accuracy"] or {})

    refitted = expected(0.25, recovery="refit")
    assert refitted.pop("recovery") == "refit"
    assert refitted == pytest.approx({"value": 0.85, "low": 0.75, "high": 0.95}, abs=1e-3)
    assert expected(0.25) == refitted | {"recovery": "refit"}
    assert expected(0.35, recovery="none")["value"] == pytest.approx(0.8, abs=1e-3)
    # What was not measured is not made up: neither a recovery nor a size.
    assert expected(0.25, recovery="bias")["recovery"] == "none"
    assert expected(0.6) == {}
    without = catalogue({name: value for name, value in results.items() if name != "recoveries"})["tiny"]
    assert without.curve("refit").at(0.5).value == pytest.approx(0.7)  # type: ignore[union-attr]
    # Of another predictor: not shown.
    other = catalogue(results | {"fingerprints": {**made_from, "predictor": "other"}})["tiny"].curve("refit")
    assert other is None or other.samples != 40


def test_every_body_in_the_api_document_has_a_valid_example(service: Service) -> None:
    document = service.ask("GET", "/openapi.json").json
    named = {
        body["schema"]["$ref"].rpartition("/")[2]
        for methods in document["paths"].values()
        for operation in methods.values()
        for part in (operation.get("requestBody", {}), *operation["responses"].values())
        for body in part.get("content", {}).values()
        if "$ref" in body.get("schema", {})
    }
    assert {"AllocationRequest", "CheckpointRequest", "Allocation", "Checkpoint", "Problem"} <= named
    for name in named:
        for example in document["components"]["schemas"][name]["examples"]:
            getattr(schemas, name).model_validate(example)


def test_the_client_says_what_is_wrong(service: Service, tmp_path: Path) -> None:
    with pytest.raises(lop.LopError, match="outside"):
        lop.Client(service.url).allocation("tiny", ratio=0.99)
    with pytest.raises(lop.LopError, match="not offered: tiny"):
        lop.Client(service.url).get("other", ratio=0.3, out=tmp_path / "out")
    with pytest.raises(lop.LopError, match="cannot be reached"):
        lop.Client("http://127.0.0.1:1").models()
    with pytest.raises(lop.LopError, match="http://"):
        lop.Client("file:///etc/passwd")


def test_jobs_survive_being_written_down(service: Service) -> None:
    id = service.make({"ratio": 0.35}).json["id"]
    service.finish(id)
    job = service.store.get(id)
    assert job is not None
    assert Job.from_dict(json.loads(json.dumps(job.as_dict()))) == job
