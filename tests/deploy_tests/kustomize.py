"""As much of `kubectl kustomize` as deploy/kuberay uses: resources, namespace, images, patches.

Anything else in a kustomization is an error here, so that this file and the real one cannot drift
apart in silence; where kubectl is installed, a test compares both.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
KNOWN = {"apiVersion", "kind", "namespace", "resources", "images", "patches"}
CLUSTER_WIDE = ("Namespace",)


def build(folder: Path) -> list[Manifest]:
    """All manifests of an overlay or a base."""
    described = yaml.safe_load((folder / "kustomization.yaml").read_text())
    unknown = set(described) - KNOWN
    if unknown:
        raise ValueError(f"{folder}: {sorted(unknown)} is not understood here; teach it")
    manifests: list[Manifest] = []
    for name in described.get("resources", []):
        path = folder / name
        manifests += build(path) if path.is_dir() else read(path)
    for patch in described.get("patches", []):
        text = patch.get("patch") or (folder / patch["path"]).read_text()
        targets = [each for each in manifests if _matches(each, patch["target"])]
        if not targets:
            raise ValueError(f"{folder}: no manifest matches {patch['target']}")
        for manifest in targets:
            for operation in yaml.safe_load(text):
                _apply(manifest, operation)
    for manifest in manifests:
        if manifest["kind"] not in CLUSTER_WIDE:
            manifest["metadata"]["namespace"] = described["namespace"]
        for image in described.get("images", []):
            _retag(manifest, image)
    return manifests


def read(path: Path) -> list[Manifest]:
    """The documents of one file; aliases become copies."""
    documents = yaml.safe_load_all(path.read_text())
    return [_copy(document) for document in documents]


def containers(node: Any) -> list[dict[str, Any]]:
    """Every container below a node, those that start first included."""
    if isinstance(node, dict):
        own = [*node.get("containers", []), *node.get("initContainers", [])]
        return own + [each for value in node.values() for each in containers(value)]
    if isinstance(node, list):
        return [each for value in node for each in containers(value)]
    return []


def _copy(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _copy(value) for key, value in node.items()}
    return [_copy(value) for value in node] if isinstance(node, list) else node


def _matches(manifest: Manifest, target: dict[str, str]) -> bool:
    group, _, version = manifest["apiVersion"].rpartition("/")
    return (
        target.get("group", "") == group
        and target.get("version", version) == version
        and target["kind"] == manifest["kind"]
        and re.fullmatch(target["name"], manifest["metadata"]["name"]) is not None
    )


def _apply(manifest: Manifest, operation: dict[str, Any]) -> None:
    """One step of RFC 6902; only what exists may be replaced."""
    *way, last = operation["path"].strip("/").split("/")
    node: Any = manifest
    for step in way:
        node = node[int(step)] if isinstance(node, list) else node[step]
    value = _copy(operation["value"])
    if isinstance(node, list):
        if last == "-":
            node.append(value)
        else:
            node[int(last)] = value
    elif operation["op"] == "replace" and last not in node:
        raise ValueError(f"{operation['path']}: nothing there to replace")
    else:
        node[last] = value


def _retag(manifest: Manifest, image: dict[str, str]) -> None:
    for container in containers(manifest):
        name, _, tag = container["image"].rpartition(":")
        if name == image["name"]:
            container["image"] = f"{image.get('newName', name)}:{image.get('newTag', tag)}"
