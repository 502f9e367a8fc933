"""docs/kubernetes/: manifests whose parts fit each other, and the command that they start.

The rules of Kubernetes' own schemas that concern them are checked here; the files were also
validated against the published schemas.
"""

import math
from pathlib import Path

import pytest
import yaml

from neo_jax.cli import parse
from neo_jax.cli.serve import Options
from neo_jax.serving.metrics import Metrics

FOLDER = Path(__file__).parents[1] / "docs" / "kubernetes"
FILES = {path.name: [*yaml.safe_load_all(path.read_text())] for path in FOLDER.glob("*.yaml")}
GROUPS = {
    "Service": "v1",
    "Deployment": "apps/v1",
    "LeaderWorkerSet": "leaderworkerset.x-k8s.io/v1",
    "HorizontalPodAutoscaler": "autoscaling/v2",
    "PodDisruptionBudget": "policy/v1",
}
LWS = {"LWS_LEADER_ADDRESS": "leader.example", "LWS_GROUP_SIZE": "4", "LWS_WORKER_INDEX": "0"}


def workload(name):
    """The object of a file that starts pods, and the templates of these."""
    (found,) = (each for each in FILES[name] if each["kind"] in ("Deployment", "LeaderWorkerSet"))
    spec = found["spec"]
    if found["kind"] == "Deployment":
        return found, [spec["template"]]
    inner = spec["leaderWorkerTemplate"]
    return found, [inner["leaderTemplate"], inner["workerTemplate"]]


def options(container):
    """What the command of a container means."""
    words = [*container["command"], *container["args"]]
    assert words[:2] == ["neo-jax", "serve"]
    for name, value in LWS.items():
        words = [word.replace(f"$({name})", value) for word in words]
    assert not any("$(" in word for word in words)
    return parse(Options, "serve", words[2:])


def test_both_are_there():
    assert set(FILES) == {"serve.yaml", "serve_slice.yaml"}


@pytest.mark.parametrize("name", FILES)
def test_objects_are_of_known_kinds_and_name_each_other(name):
    found, templates = workload(name)
    for each in FILES[name]:
        assert each["apiVersion"] == GROUPS[each["kind"]]
        assert each["metadata"]["name"] == found["metadata"]["name"]
        assert each.keys() <= {"apiVersion", "kind", "metadata", "spec"}
        if each["kind"] == "HorizontalPodAutoscaler":
            target = each["spec"]["scaleTargetRef"]
            assert target == {
                "apiVersion": found["apiVersion"],
                "kind": found["kind"],
                "name": found["metadata"]["name"],
            }
            (metric,) = each["spec"]["metrics"]
            counted = metric["pods"]["metric"]["name"].removeprefix("neo_jax_")
            assert f"\nvllm:{counted}{{".encode() in Metrics("neo").text()
        if each["kind"] in ("Service", "PodDisruptionBudget"):
            selector = each["spec"]["selector"]
            wanted = selector.get("matchLabels", selector)
            given = {**templates[0]["metadata"]["labels"]}
            given["leaderworkerset.sigs.k8s.io/worker-index"] = "0"  # its controller adds it
            assert wanted.items() <= given.items()
    if found["kind"] == "Deployment":
        labels = templates[0]["metadata"]["labels"]
        assert found["spec"]["selector"]["matchLabels"].items() <= labels.items()


@pytest.mark.parametrize("name", FILES)
def test_pods(name):
    found, templates = workload(name)
    size = found["spec"].get("leaderWorkerTemplate", {}).get("size", 1)
    for index, template in enumerate(templates):
        spec = template["spec"]
        (container,) = spec["containers"]
        taken = options(container)
        assert (taken.host, taken.model.model.partition("/")[0]) == ("0.0.0.0", "EleutherAI")
        # What runs when a pod is to end, one after another.
        before = container.get("lifecycle", {}).get("preStop", {}).get("exec", {})
        wait = int(before.get("command", ["sleep", "0"])[1])
        assert spec["terminationGracePeriodSeconds"] > wait + taken.shutdown_timeout + 10
        chips = int(container["resources"]["limits"]["google.com/tpu"])
        assert chips == int(container["resources"]["requests"]["google.com/tpu"])
        shape = spec["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        assert chips * size == math.prod(map(int, shape.split("x")))
        if size > 1:
            axes = [part.partition("=")[2] for part in taken.model.mesh.split(",")]
            assert math.prod(map(int, axes)) == chips * size
            assert (taken.cluster.num_processes, taken.cluster.process_id) == (size, 0)
            assert taken.cluster.coordinator == "leader.example:8476"
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in spec["volumes"]}
        if index == 0:
            (port,) = container["ports"]
            assert port["containerPort"] == taken.port
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                assert container[probe]["httpGet"]["port"] == port["name"]
            assert template["metadata"]["annotations"]["prometheus.io/port"] == str(taken.port)
        else:
            assert not any("Probe" in key for key in container)  # it answers nothing


def test_processes_of_a_slice_run_one_command():
    _, (leader, worker) = workload("serve_slice.yaml")
    (first,), (second,) = (each["spec"]["containers"] for each in (leader, worker))
    for key in ("image", "command", "args", "env", "resources"):
        assert first[key] == second[key]
    assert workload("serve_slice.yaml")[0]["spec"]["leaderWorkerTemplate"]["restartPolicy"] == (
        "RecreateGroupOnPodRestart"
    )
