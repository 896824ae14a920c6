"""Checks Kubernetes manifests against the published OpenAPI models: Kubernetes' in the package `kubernetes`, Kubeflow's in `kubeflow-training`.

Both packages are generated from the schemas that the servers publish (github.com/kubernetes-client/python, kubeflow/training-operator; Apache 2.0).
"""

from __future__ import annotations

import re
from typing import Any

from kubeflow.training import models

KINDS = {("batch/v1", "Job"): "V1Job", ("kubeflow.org/v1", "PyTorchJob"): "KubeflowOrgV1PyTorchJob"}
_PLAIN = {"str": str, "int": int, "bool": bool, "float": (int, float)}


def check_manifest(document: dict[str, Any]) -> None:
    """Raises ValueError, naming the place, for a field that the manifest's model lacks, a value of another type, or a required field left out."""
    _checked(document, KINDS[document["apiVersion"], document["kind"]], document["kind"])


def _checked(value: Any, kind: str, where: str) -> Any:
    if inner := re.fullmatch(r"dict\(str, (.+)\)|list\[(.+)\]", kind):
        if not isinstance(value, dict if inner[1] else list):
            raise ValueError(f"{where}: {value!r} is no {kind}")
        if inner[1]:
            return {name: _checked(each, inner[1], f"{where}.{name}") for name, each in value.items()}
        return [_checked(each, inner[2], f"{where}[{number}]") for number, each in enumerate(value)]
    if kind == "object":  # such as an integer or a text
        return value
    if kind in _PLAIN:
        if not isinstance(value, _PLAIN[kind]) or (isinstance(value, bool) and kind != "bool"):
            raise ValueError(f"{where}: {value!r} is no {kind}")
        return value
    model = getattr(models, kind)
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {value!r} is no {kind}")
    fields = {theirs: ours for ours, theirs in model.attribute_map.items()}
    if unknown := value.keys() - fields.keys():
        raise ValueError(f"{where}: {kind} has no field {', '.join(sorted(unknown))}")
    arguments = {fields[name]: _checked(each, model.openapi_types[fields[name]], f"{where}.{name}") for name, each in value.items()}
    try:
        return model(**arguments)  # which looks at required fields and allowed values
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
