"""cluster.yaml, the KubeRay manifests, and what travels with a job."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from packaging.requirements import Requirement
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config

from lop.storage.location import Location

ROOT = Path(__file__).parents[2]

# The fields of ray.io/v1 by kind, from KubeRay's API reference, that a manifest of ours may use; "!" marks what must
# be there.
_FIELDS = {
    "RayJob": {"entrypoint!", "submissionMode", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished",
               "rayClusterSpec!", "runtimeEnvYAML", "activeDeadlineSeconds", "suspend", "entrypointNumCpus"},
    "RayService": {"serveConfigV2!", "rayClusterConfig!", "upgradeStrategy", "excludeHeadPodFromServeSvc",
                   "serveService"},
    "cluster": {"rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec!", "workerGroupSpecs",
                "gcsFaultToleranceOptions"},
    "autoscaler": {"version", "idleTimeoutSeconds", "upscalingMode", "resources", "env"},
    "head": {"rayStartParams", "template!", "serviceType"},
    "worker": {"groupName!", "replicas", "minReplicas!", "maxReplicas!", "rayStartParams", "template!",
               "idleTimeoutSeconds", "numOfHosts"},
}  # fmt: skip


def check_fields(kind: str, found: dict[str, Any]) -> None:
    known = {name.rstrip("!") for name in _FIELDS[kind]}
    assert set(found) <= known, f"{kind}: {set(found) - known}"
    required = {name[:-1] for name in _FIELDS[kind] if name.endswith("!")}
    assert required <= set(found), f"{kind}: {required - set(found)} missing"


def check_pod(template: dict[str, Any], volumes: set[str]) -> None:
    spec = template["spec"]
    assert {claim["persistentVolumeClaim"]["claimName"] for claim in spec["volumes"]} <= volumes
    for container in spec["containers"]:
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", container["name"])
        assert container["image"]
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert requests.keys() == limits.keys()
        assert all(isinstance(amount, str) for amount in (*requests.values(), *limits.values()))
        # Kubernetes gives GPUs whole, and only if the limit says as many.
        assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu")
        assert {mount["name"] for mount in container["volumeMounts"]} <= {volume["name"] for volume in spec["volumes"]}


@pytest.mark.parametrize(("name", "kind"), [("search", "RayJob"), ("serve", "RayService")])
def test_kuberay_manifests_hold_what_its_api_asks_for(name: str, kind: str) -> None:
    resource, *others = yaml.safe_load_all((ROOT / "kuberay" / f"{name}.yaml").read_text())
    assert (resource["apiVersion"], resource["kind"]) == ("ray.io/v1", kind)
    assert resource["metadata"]["name"]
    volumes = {other["metadata"]["name"] for other in others if other["kind"] == "PersistentVolumeClaim"}
    spec = resource["spec"]
    check_fields(kind, spec)
    cluster = spec["rayClusterSpec" if kind == "RayJob" else "rayClusterConfig"]
    check_fields("cluster", cluster)
    check_fields("autoscaler", cluster.get("autoscalerOptions", {}))
    groups = [("head", cluster["headGroupSpec"]), *(("worker", group) for group in cluster["workerGroupSpecs"])]
    for group_kind, group in groups:
        check_fields(group_kind, group)
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        check_pod(group["template"], volumes)
    for _, group in groups[1:]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_kuberay_serves_an_application_of_serve() -> None:
    from ray.serve.schema import ServeDeploySchema

    service = next(yaml.safe_load_all((ROOT / "kuberay" / "serve.yaml").read_text()))
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    assert [application.name for application in config.applications] == ["lop"]


def cluster() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "cluster.yaml").read_text()))


def test_the_cluster_passes_rays_own_check() -> None:
    validate_config(prepare_config(cluster()))
    broken = cluster() | {"idle_timeout_minuets": 5}
    with pytest.raises(Exception, match="idle_timeout_minuets"):
        validate_config(prepare_config(broken))


def test_the_cluster_has_a_cpu_head_and_gpu_workers_on_spot_before_on_demand() -> None:
    config = cluster()
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0, "GPU": 0}
    spot, on_demand = types["gpu_spot"], types["gpu_on_demand"]
    assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in on_demand["node_config"]
    assert spot["resources"] == on_demand["resources"] == {"CPU": 8, "GPU": 1}
    assert spot["min_workers"] == on_demand["min_workers"] == 0
    assert max(("gpu_spot", "gpu_on_demand")) == "gpu_spot"  # Ray takes the later name of equals.
    assert "ami-" in types["head"]["node_config"]["ImageId"]


def test_the_cluster_makes_its_bucket_once_with_nothing_but_keys(bucket: str, tmp_path: Path) -> None:
    server = parse_qs(urlsplit(bucket).query)["endpoint_override"][0]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # On the node, `python` is the cluster's.
    environment = {**os.environ, "AWS_ENDPOINT_URL": server, "HOME": str(tmp_path), "PATH": path}
    (command,) = [command for command in cluster()["head_setup_commands"] if "create_bucket" in command]
    for _ in range(2):
        subprocess.run(["bash", "-c", command], env=environment, check=True, timeout=60)
    made = (tmp_path / "lop_runs").read_text()
    assert re.fullmatch(r"s3://lop-\d{12}-us-west-2", made)
    Location.parse(bucket.replace("s3://bucket/{}", made)).write("file", b"written")
    assert any("LOP_RUNS=$(cat ~/lop_runs)" in command for command in cluster()["head_start_ray_commands"])
    assert "BUCKET" not in (ROOT / "cluster.yaml").read_text()


def test_the_cluster_installs_what_lop_depends_on() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    installed = re.findall(r'"([^"]+)"', " ".join(cluster()["setup_commands"]))
    # On a cluster Ray's version must be that of its image.
    assert [name for name in installed if not name.startswith("ray[")] == [
        name for name in wanted if not name.startswith("ray[")
    ]
    (ray,) = (name for name in installed if name.startswith("ray["))
    assert ray.partition("==")[2] in cluster()["docker"]["worker_image"]


def test_all_clusters_run_one_ray_that_lop_allows() -> None:
    version = cluster()["docker"]["worker_image"].partition(":")[2].partition("-")[0]
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (wanted,) = (Requirement(name) for name in dependencies if name.startswith("ray["))
    assert version in wanted.specifier
    for manifest in ("search", "serve"):
        text = (ROOT / "kuberay" / f"{manifest}.yaml").read_text()
        assert set(re.findall(r"rayVersion: (\S+)|rayproject/ray:([0-9.]+)", text)) <= {(version, ""), ("", version)}
        assert f"rayVersion: {version}" in text


def test_what_travels_with_a_job_is_the_code_whatever_else_lies_in_the_checkout(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(".*cache", ".git", ".venv*", ".hypothesis", "runs")
    shutil.copytree(ROOT, checkout, ignore=ignored)
    own = {
        name: checkout / name for name in ("model.safetensors", "samples/reward.parquet", "lop.bak/cli.py", "a/lop/b")
    }
    for path in own.values():
        path.parent.mkdir(exist_ok=True, parents=True)
        with path.open("w") as file:
            file.truncate(700 << 20)
    package = tmp_path / "package.zip"
    create_package(str(checkout), package, include_gitignore=True)
    assert package.stat().st_size < 30 << 20
    travels = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    rooms = ("lop", "ray_jobs", "serve", "configs")
    wanted = {path for room in rooms for path in (checkout / room).rglob("*") if path.is_file()}
    assert travels == {str(path.relative_to(checkout)) for path in wanted if path.suffix != ".pyc"}
