"""Ask the Kubernetes API which pods a node has, and wait for changes; with the standard library.

Only the pods' metadata is asked for: neither their environment nor anything else that may be secret
is ever here. Source: Kubernetes API Concepts, "Efficient detection of changes" and "Resource
versions"; the files of a service account by "Accessing the Kubernetes API from a Pod".
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import ssl
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Iterator, Mapping, NamedTuple, Optional
from urllib.parse import urlencode, urlsplit

from pybpfthrottle.errors import SettingsError
from pybpfthrottle.pods.annotated import Pod, pod

_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
# After this the server ends the wait, and all pods are asked for once more.
_WAIT_S = 50
# So a server that is gone without a word is noticed.
_PATIENCE_S = 60.0
_LARGEST_LIST = 64 << 20
_LARGEST_EVENT = 4 << 20


class Listed(NamedTuple):
    """The pods of a node by UID, and the version of that list."""

    pods: dict[str, Pod]
    version: str


class Event(NamedTuple):
    """A pod that is new or changed, or is gone."""

    pod: Pod
    uid: str
    gone: bool


@dataclass(frozen=True)
class Cluster:
    """Where the API is, and the files of the account to ask it with."""

    url: str
    account: str = _ACCOUNT

    @classmethod
    def around(cls, environment: Mapping[str, str]) -> Cluster:
        """Return the cluster that this process runs in. Raises SettingsError outside of one."""
        host = environment.get("KUBERNETES_SERVICE_HOST")
        port = environment.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            raise SettingsError(
                "KUBERNETES_SERVICE_HOST is not set: this runs in a pod; elsewhere give --api URL"
            )
        return cls(f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}")

    def pods(self, node: str) -> Listed:
        """Return the pods of a node. Raises OSError."""
        with self._get("PartialObjectMetadataList", _of(node, resourceVersion=0)) as response:
            listed = _json(response.read(_LARGEST_LIST + 1), _LARGEST_LIST)
        found = [_metadata(item) for item in _field(listed, "items", list)]
        version = str(_metadata(listed).get("resourceVersion", ""))
        return Listed({str(one.get("uid")): pod(one) for one in found}, version)

    def changes(self, node: str, version: str) -> Iterator[Event]:
        """Yield what changes after a version, for a minute or less. Raises OSError."""
        query = _of(node, watch=1, resourceVersion=version, timeoutSeconds=_WAIT_S)
        with self._get("PartialObjectMetadata", query) as response:
            while line := response.readline(_LARGEST_EVENT + 1):
                told = _json(line, _LARGEST_EVENT)
                kind = _field(told, "type", str)
                if kind == "ERROR":  # such as that the version is too old
                    return
                if kind in ("ADDED", "MODIFIED", "DELETED"):
                    metadata = _metadata(_field(told, "object", dict))
                    yield Event(pod(metadata), str(metadata.get("uid")), kind == "DELETED")

    @contextmanager
    def _get(self, what: str, query: str) -> Iterator[http.client.HTTPResponse]:
        """Get the pods of a query, as a kind of object of the API."""
        connection = self._connection()
        try:
            accepted = f"application/json;as={what};g=meta.k8s.io;v=v1"
            headers = {"Accept": accepted, **self._authorization()}
            connection.request("GET", f"/api/v1/pods?{query}", headers=headers)
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise OSError(errno.EPROTO, _refusal(response.status))
            yield response
        except http.client.HTTPException as error:
            raise OSError(errno.EPROTO, f"no HTTP: {type(error).__name__}") from error
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        at = urlsplit(self.url)
        if at.scheme == "http":
            return http.client.HTTPConnection(at.hostname or "", at.port, timeout=_PATIENCE_S)
        authorities = os.path.join(self.account, "ca.crt")
        context = ssl.create_default_context(cafile=authorities)
        return http.client.HTTPSConnection(
            at.hostname or "", at.port, timeout=_PATIENCE_S, context=context
        )

    def _authorization(self) -> dict[str, str]:
        """Return the header with the account's token, which is renewed now and then."""
        with open(os.path.join(self.account, "token")) as file:
            return {"Authorization": f"Bearer {file.read().strip()}"}


def _of(node: str, **more: object) -> str:
    return urlencode({"fieldSelector": f"spec.nodeName={node}", **more})


def _refusal(status: int) -> str:
    if status in (http.client.UNAUTHORIZED, http.client.FORBIDDEN):
        return f"the API refuses (HTTP {status}): may the service account list and watch pods?"
    return f"the API answers HTTP {status}"


def _json(data: bytes, most: int) -> Any:
    if len(data) > most:
        raise OSError(errno.EMSGSIZE, "the API's answer is too long")
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise OSError(errno.EPROTO, "the API's answer is no JSON") from None


def _field(value: Any, name: str, kind: type) -> Any:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind):
        raise OSError(errno.EPROTO, f"the API's answer has no {name}")
    return found


def _metadata(value: Any) -> dict[str, Any]:
    found: Optional[dict[str, Any]] = _field(value, "metadata", dict)
    return found or {}
