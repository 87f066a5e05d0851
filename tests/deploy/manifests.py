"""Reading and checking manifests: against the published schemas, and what no schema says."""

import os
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "deploy/kubernetes"
CHART = ROOT / "deploy/helm/headway-epp"

#: The oldest and the newest Kubernetes that a manifest must be right for.
VERSIONS = ("1.29", "1.35")

#: Kinds that are not Kubernetes' own, by the file of their schema. None: nobody gave us one.
CUSTOM = {
    ("inference.networking.k8s.io/v1", "InferencePool"): "inferencepools.crd.yaml",
    ("llm-d.ai/v1alpha2", "InferenceObjective"): "inferenceobjectives.crd.yaml",
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): None,
    ("kustomize.config.k8s.io/v1beta1", "Kustomization"): None,
}


def read(text):
    """Return the documents of a file of YAML."""
    return [each for each in yaml.safe_load_all(text) if each is not None]


def schemas():
    """Return the folder of the CRDs; skips where it is not beside the repository."""
    folder = Path(os.environ.get("HEADWAY_KUBERNETES_SCHEMAS", ROOT.parent / "shared/kubernetes"))
    if not folder.is_dir():
        pytest.skip("no schemas of CRDs: neither HEADWAY_KUBERNETES_SCHEMAS nor ../shared/kubernetes")
    return folder


def check_schema(document):
    """Check a document against the schema of its kind."""
    kind = (document["apiVersion"], document["kind"])
    if kind not in CUSTOM:
        for version in VERSIONS:
            kubernetes_validate.validate(document, version, strict=True)
    elif CUSTOM[kind] is not None:
        check_custom(document, schemas() / CUSTOM[kind])


def check_custom(document, crd):
    """Check a document against a CustomResourceDefinition: no field more than it has."""
    (definition,) = read(crd.read_text())
    spec = definition["spec"]
    group, version = document["apiVersion"].split("/")
    assert (group, document["kind"]) == (spec["group"], spec["names"]["kind"])
    (schema,) = [each for each in spec["versions"] if each["name"] == version and each["served"]]
    jsonschema.validate(document, _closed(schema["schema"]["openAPIV3Schema"]))


def _closed(schema):
    """Return a schema that refuses what it does not name: the API server drops it without a word."""
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items() if key != "properties"}
    if "properties" in schema:
        closed["properties"] = {key: _closed(value) for key, value in schema["properties"].items()}
        closed.setdefault("additionalProperties", False)
    return closed


def of(documents, kind):
    """Return the one document of a kind."""
    (found,) = [each for each in documents if each["kind"] == kind]
    return found


def allowed(documents, account):
    """Return what a service account may do: triples of group, resource and verb, with the names it is bound
    to; None is any.
    """
    roles = {each["metadata"]["name"]: each for each in documents if each["kind"] == "Role"}
    granted = {}
    for binding in (each for each in documents if each["kind"] == "RoleBinding"):
        if account in [subject["name"] for subject in binding["subjects"]]:
            for rule in roles[binding["roleRef"]["name"]]["rules"]:
                for group in rule["apiGroups"]:
                    for resource in rule["resources"]:
                        for verb in rule["verbs"]:
                            granted[group, resource, verb] = rule.get("resourceNames")
    return granted
