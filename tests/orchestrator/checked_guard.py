"""A guard that holds every answer against what /openapi.json says of it: no field is missing, and none is unnamed."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import jsonschema_rs

from configs.document import Request
from orchestrator.api.guard import Guard
from orchestrator.api.shapes import schema_of


class CheckedGuard(Guard):
    """See the module."""

    def answer(self, request: Request, *others: Any, **further: Any) -> Any:
        answer = super().answer(request, *others, **further)
        if isinstance(answer, (dict, list)):
            hold(type(request), json.loads(json.dumps(answer)))
        return answer


def hold(record: type[Request], answer: Any) -> None:
    """Raise AssertionError where an answer is not what its schema says."""
    problems = [f"{list(error.instance_path)}: {error.message}" for error in _validator(record).iter_errors(answer)]
    assert not problems, f"{record.__name__} is answered otherwise than shapes.py says: {problems[:3]}"


@cache
def _validator(record: type[Request]) -> Any:
    schema, named = schema_of(record)
    for one in (schema, *named.values()):
        if "properties" in one:
            one.setdefault("additionalProperties", False)
    return jsonschema_rs.validator_for({**schema, "components": {"schemas": named}})
