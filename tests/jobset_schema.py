"""The fields of a JobSet (v1alpha2) that we write, with their types; nothing else is allowed.

Kubernetes' own definition is used instead if JOBSET_CRD names its file,
config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml of kubernetes-sigs/jobset.
"""

import os
from pathlib import Path

import yaml

WORD, TEXT, COUNT, FLAG = (
    {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "maxLength": 63},
    {"type": "string"},
    {"type": "integer", "minimum": 0},
    {"type": "boolean"},
)
MAP = {"type": "object", "additionalProperties": TEXT}


def fields(required, **optional):
    names = {**required, **optional}
    return {
        "type": "object", "properties": names, "required": list(required),
        "additionalProperties": False,
    }  # fmt: skip


def many(item):
    return {"type": "array", "items": item, "minItems": 1}


def one_of(*values):
    return {"enum": list(values)}


CONTAINER = fields(
    {"name": WORD, "image": TEXT},
    command=many(TEXT),
    resources=fields({"limits": {"type": "object", "additionalProperties": COUNT}}),
    volumeMounts=many(fields({"name": WORD, "mountPath": {"type": "string", "pattern": "^/"}})),
)
VOLUME = fields(
    {"name": WORD},
    emptyDir=fields({}, medium=one_of("Memory")),
    persistentVolumeClaim=fields({"claimName": TEXT}),
)
POD = fields(
    {"containers": many(CONTAINER)},
    restartPolicy=one_of("Never", "OnFailure"),
    terminationGracePeriodSeconds=COUNT,
    hostNetwork=FLAG,
    dnsPolicy=one_of("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
    nodeSelector=MAP,
    tolerations=many(fields({"key": TEXT, "operator": one_of("Exists", "Equal")})),
    volumes=many(VOLUME),
)
FAILURE = fields(
    {"action": one_of("FailJob", "Ignore", "Count", "FailIndex")},
    onPodConditions=many(fields({"type": TEXT, "status": one_of("True", "False", "Unknown")})),
    onExitCodes=fields({"operator": one_of("In", "NotIn"), "values": many(COUNT)}),
)
JOB = fields(
    {"template": fields({"spec": POD})},
    parallelism=COUNT,
    completions=COUNT,
    completionMode=one_of("Indexed", "NonIndexed"),
    backoffLimit=COUNT,
    podFailurePolicy=fields({"rules": many(FAILURE)}),
)
RULE = fields(
    {
        "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
        "action": one_of("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
    },
    onJobFailureReasons=many(TEXT),
)
OURS = fields(
    {
        "apiVersion": one_of("jobset.x-k8s.io/v1alpha2"),
        "kind": one_of("JobSet"),
        "metadata": fields({"name": WORD}, annotations=MAP),
        "spec": fields(
            {
                "replicatedJobs": many(
                    fields({"name": WORD, "template": fields({"spec": JOB})}, replicas=COUNT)
                )
            },
            suspend=FLAG,
            failurePolicy=fields({}, maxRestarts=COUNT, rules=many(RULE)),
        ),
    }
)


def closed(schema):
    """The same, unknown fields forbidden, as an API server does when it validates strictly."""
    if isinstance(schema, list):
        return [closed(x) for x in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(x) for key, x in schema.items()}
    if "properties" in schema and "additionalProperties" not in schema:
        found["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        found = {"type": ["integer", "string"]}
    return found


def schemas():
    """Ours, and the real one if it is there."""
    found = {"ours": OURS}
    if os.environ.get("JOBSET_CRD"):
        crd = yaml.safe_load(Path(os.environ["JOBSET_CRD"]).read_text())
        version = next(v for v in crd["spec"]["versions"] if v["name"] == "v1alpha2")
        real = closed(version["schema"]["openAPIV3Schema"])
        real["properties"]["metadata"] = {"type": "object"}
        found["the definition"] = real
    return found
