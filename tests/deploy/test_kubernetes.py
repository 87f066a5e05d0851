"""The manifests and the chart: right by the schemas, whole in themselves, and what the code needs."""

import tomllib

import jsonschema
import kubernetes_validate
import pytest
from manifests import CHART, CUSTOM, MANIFESTS, ROOT, allowed, check_custom, check_schema, of, read, schemas

from headway.front.discovery.kubernetes import PODS, POOLS
from headway.front.lease.kubernetes import LEASES
from headway.hosts.envoy.config import EppConfig

helm_python = pytest.importorskip("helm_python", reason="no Helm: pip install helm-python-sdk")

FILES = sorted(MANIFESTS.glob("*.yaml"))
PICKER = ("rbac.yaml", "epp.yaml", "inferencepool.yaml")

#: What an installation says at least, and one that says a lot.
LEAST = {"pool": {"matchLabels": {"app": "vllm-llama"}}}
MOST = {
    "replicas": 3,
    "pool": {
        "name": "qwen",
        "matchLabels": {"app": "x"},
        "targetPorts": [8000, 8001],
        "failureMode": "FailOpen",
    },
    "config": {
        "disaggregated": True,
        "policy": {"cluster": "staggered:max_hold_s=2.5+iqr-lexicographic"},
        "discovery": {"decode": {"ranks": 32, "kv_blocks": 20000}, "pool": "not-this-one"},
        "objectives": {"interactive": {"priority": 10, "ttft_s": 0.5}},
    },
    "env": [{"name": "HEADWAY_KEY", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "engines"}}}],
    "imagePullSecrets": [{"name": "registry"}],
    "podLabels": {"team": "serving"},
    "nodeSelector": {"pool": "cpu"},
    "tolerations": [{"key": "cpu", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {}},
}


def rendered(values, name="demo"):
    """Return the documents that Helm makes of the chart."""
    with helm_python.Chart.load(CHART) as chart:
        files = chart.render(values=values, name=name, namespace="inference")
    return [each for file, text in files.items() if file.endswith(".yaml") for each in read(text)]


def picker():
    return [each for name in PICKER for each in read((MANIFESTS / name).read_text())]


INSTALLATIONS = [
    pytest.param(picker, id="manifests"),
    pytest.param(lambda: rendered(LEAST), id="chart"),
    pytest.param(lambda: rendered(LEAST | {"replicas": 1}), id="chart, one replica"),
    pytest.param(lambda: rendered(MOST), id="chart, much said"),
]


# By the schemas


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_manifest_is_right_by_the_schemas(file):
    documents = read(file.read_text())
    assert documents
    for document in documents:
        check_schema(document)


@pytest.mark.parametrize("values", [LEAST, MOST], ids=["least", "much"])
def test_the_chart_renders_what_is_right_by_the_schemas(values):
    documents = rendered(values)
    assert len(documents) == 8
    for document in documents:
        check_schema(document)


def test_the_checks_see_a_wrong_manifest():
    """Each by one letter: else the tests above would show nothing."""
    deployment, pool = of(picker(), "Deployment"), of(picker(), "InferencePool")
    deployment["spec"]["template"]["spec"]["container"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        check_schema(deployment)
    pool["spec"]["targetPort"] = [{"number": 8000}]
    with pytest.raises(jsonschema.ValidationError):
        check_custom(pool, schemas() / CUSTOM[pool["apiVersion"], "InferencePool"])
    del pool["spec"]["targetPort"]
    pool["spec"]["targetPorts"] *= 3
    with pytest.raises(jsonschema.ValidationError, match="too long"):
        check_custom(pool, schemas() / CUSTOM[pool["apiVersion"], "InferencePool"])


def test_the_chart_has_nothing_that_helm_would_mind():
    found = helm_python.lint(CHART, LEAST, strict=True)
    assert not [each for each in found["messages"] if each["severity"] not in ("INFO", "info", 1)], found


def test_the_chart_asks_for_what_only_its_user_knows():
    with pytest.raises(helm_python.HelmError, match=r"pool\.matchLabels: which pods are the engines\?"):
        rendered({})


def test_replicas_need_a_lease_and_the_chart_sees_to_it():
    assert _config(rendered(LEAST)).leader.backend == "kubernetes-lease"
    assert _config(rendered(LEAST | {"replicas": 1})).leader.backend == "memory"
    with pytest.raises(helm_python.HelmError, match=r"leader\.backend: with 'memory' a picker is alone"):
        rendered(LEAST | {"config": {"leader": {"backend": "memory"}}})


def test_a_pool_that_is_there_already_is_not_made():
    kinds = [each["kind"] for each in rendered({"pool": {"create": False, "name": "theirs"}})]
    assert "InferencePool" not in kinds and "Deployment" in kinds


# Whole in themselves


@pytest.mark.parametrize("installation", INSTALLATIONS)
def test_names_selectors_and_ports_meet(installation):
    documents = installation()
    deployment, service = of(documents, "Deployment"), of(documents, "Service")
    template = deployment["spec"]["template"]
    (container,) = template["spec"]["containers"]
    labels = template["metadata"]["labels"].items()
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        of(documents, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
    ):
        assert selector and selector.items() <= labels
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports.keys()
    for probe in ("livenessProbe", "readinessProbe"):
        assert container[probe]["grpc"]["port"] == ports["health"]
    reference = of(documents, "InferencePool")["spec"]["endpointPickerRef"]
    assert reference["name"] == service["metadata"]["name"]
    assert reference["port"]["number"] in {port["port"] for port in service["spec"]["ports"]}
    assert template["spec"]["serviceAccountName"] == of(documents, "ServiceAccount")["metadata"]["name"]
    (volume,) = template["spec"]["volumes"]
    assert volume["configMap"]["name"] == of(documents, "ConfigMap")["metadata"]["name"]
    assert len({each["metadata"]["namespace"] for each in documents}) == 1


@pytest.mark.parametrize("installation", INSTALLATIONS)
def test_the_file_is_one_that_the_picker_takes(installation):
    documents = installation()
    container = of(documents, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    command, flag, path = container["args"]
    folder = container["volumeMounts"][0]["mountPath"]
    assert (command, flag, path.rpartition("/")[0]) == ("epp", "--config", folder)
    assert path.rpartition("/")[2] in of(documents, "ConfigMap")["data"]
    config = _config(documents)
    pool = of(documents, "InferencePool")
    assert config.discovery.pool == pool["metadata"]["name"]
    assert config.discovery.namespace in (None, pool["metadata"]["namespace"])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert (config.server.grpc_port, config.server.grpc_health_port, config.metrics.port) == (
        ports["grpc"],
        ports["health"],
        ports["metrics"],
    )
    grace_s = of(documents, "Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace_s > config.server.drain_timeout_s


def test_what_the_chart_is_told_stands_in_the_file():
    config = _config(rendered(MOST))
    assert config.disaggregated and config.policy.cluster == "staggered:max_hold_s=2.5+iqr-lexicographic"
    assert (config.discovery.decode.ranks, config.discovery.decode.kv_blocks) == (32, 20000)
    assert config.discovery.engine.chunk_tokens == 8192  # of the chart's own values
    assert config.objectives["interactive"].ttft_s == 0.5


def test_a_changed_file_makes_a_new_pod():
    def checksum(values):
        template = of(rendered(values), "Deployment")["spec"]["template"]
        return template["metadata"]["annotations"]["checksum/config"]

    assert checksum(LEAST) == checksum(LEAST) != checksum(LEAST | {"config": {"policy": {"seed": 1}}})


def test_objectives_have_the_priorities_of_the_pickers_file():
    objectives = read((MANIFESTS / "inferenceobjectives.yaml").read_text())
    config = _config(picker())
    assert {each["metadata"]["name"]: each["spec"]["priority"] for each in objectives} == {
        name: objective.priority for name, objective in config.objectives.items()
    }
    pool = of(picker(), "InferencePool")["metadata"]["name"]
    assert {each["spec"]["poolRef"]["name"] for each in objectives} == {pool}


def test_the_route_goes_to_the_pool():
    route = of(read((MANIFESTS / "httproute.yaml").read_text()), "HTTPRoute")
    pool = of(picker(), "InferencePool")
    ((backend,),) = [rule["backendRefs"] for rule in route["spec"]["rules"]]
    assert (backend["group"], backend["kind"], backend["name"]) == (
        pool["apiVersion"].split("/")[0],
        pool["kind"],
        pool["metadata"]["name"],
    )


PICKS = "envoy.service.ext_proc.v3.ExternalProcessor"


def test_the_envoy_is_that_of_deploy_envoy_before_the_service_of_the_picker():
    documents = read((MANIFESTS / "envoy.yaml").read_text())
    (config,) = read(of(documents, "ConfigMap")["data"]["envoy.yaml"])
    (original,) = read((ROOT / "deploy/envoy/original-dst.yaml").read_text())
    service = of(picker(), "Service")
    (cluster,) = [each for each in original["static_resources"]["clusters"] if each["name"] == "picker"]
    address = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]
    assert address["socket_address"]["port_value"] in {port["port"] for port in service["spec"]["ports"]}
    address["socket_address"]["address"] = service["metadata"]["name"]
    # Of several replicas one leads: Envoy asks for the one that picks, not for one that lives.
    cluster["health_checks"][0]["grpc_health_check"]["service_name"] = PICKS
    assert config == original
    template = of(documents, "Deployment")["spec"]["template"]
    (container,) = template["spec"]["containers"]
    listener = config["static_resources"]["listeners"][0]["address"]["socket_address"]
    assert listener["port_value"] == container["ports"][0]["containerPort"]
    for kind in ("Service", "PodDisruptionBudget"):
        selector = of(documents, kind)["spec"]["selector"]
        assert selector.get("matchLabels", selector) == template["metadata"]["labels"]


def envoys():
    """Return every Envoy configuration that is shipped, by its file."""
    files = {file.name: file.read_text() for file in sorted((ROOT / "deploy/envoy").glob("*.yaml"))}
    manifest = read((MANIFESTS / "envoy.yaml").read_text())
    return files | {"kubernetes/envoy.yaml": of(manifest, "ConfigMap")["data"]["envoy.yaml"]}


@pytest.mark.parametrize("file", envoys())
def test_no_guard_against_floods_watches_envoys_connection_to_the_picker(file):
    """All clients share that connection: a guard that cuts it for one client's frames fails all others."""
    (config,) = read(envoys()[file])
    (cluster,) = [each for each in config["static_resources"]["clusters"] if each["name"] == "picker"]
    (options,) = cluster["typed_extension_protocol_options"].values()
    http2 = options["explicit_http_config"]["http2_protocol_options"]
    for key in ("max_outbound_frames", "max_outbound_control_frames"):
        assert http2[key] >= 1_000_000_000


# What the code needs


@pytest.mark.parametrize("installation", INSTALLATIONS)
def test_the_role_allows_what_the_code_asks_for_and_no_more(installation):
    documents = installation()
    pool = of(documents, "InferencePool")["metadata"]["name"]
    granted = allowed(documents, of(documents, "ServiceAccount")["metadata"]["name"])
    asked = {(*_resource(path), verb) for path in (PODS, POOLS) for verb in ("list", "watch")}
    if _config(documents).leader.backend == "kubernetes-lease":
        asked |= {(*_resource(LEASES), verb) for verb in ("create", "get", "update")}
    assert granted.keys() == asked
    assert granted["inference.networking.k8s.io", "inferencepools", "list"] == [pool]
    if (*_resource(LEASES), "get") in asked:
        assert granted[*_resource(LEASES), "get"] == [f"headway-{_config(documents).pool_name}"]


def _config(documents):
    """Return what the picker of an installation reads."""
    return EppConfig.parse(tomllib.loads(of(documents, "ConfigMap")["data"]["epp.toml"]))


def _resource(path):
    """Return group and resource of an API path."""
    parts = path.strip("/").split("/")
    return ("" if parts[0] == "api" else parts[1]), parts[-1]
