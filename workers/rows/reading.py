"""How a task's rows are read, as its adapter carries it: a store alone can then answer for its tasks.

Without torch. A worker writes it into the facts of every adapter that it stages (`Adapter.info`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from configs.errors import InvalidInput
from configs.task_spec import BROUGHT_KINDS, DataSpec, TaskSpec

READING = "reading"
"""Name of the fact."""
PATHS = frozenset({"train_file", "eval_file", "eval_fraction", "eval_is_train"})
"""What of `data` is about files, and not about how a row is read."""


def reading_of(spec: TaskSpec) -> str:
    """The fact: kind, columns, labels and lengths, all of them written out, so that a later default changes none."""
    return json.dumps({"kind": spec.kind, "data": spec.data.model_dump(mode="json", exclude=set(PATHS))})


def read_as(info: Mapping[str, str], base_model: str, title: str) -> TaskSpec:
    """A spec that reads rows as the task does; what is about its training is at its defaults.

    Args:
        info: Facts of the task's adapter.
        title: `team/task`.

    Raises:
        InvalidInput: The adapter was published by a release that did not write the fact; or nothing answers by a task
            of its kind.
    """
    if READING not in info:
        raise InvalidInput(
            "was published by an earlier release, which did not note how its rows are read",
            title,
            "submit it again under this release; `onebasis export` still hands it out",
        )
    known: Mapping[str, Any] = json.loads(info[READING])
    if known["kind"] in BROUGHT_KINDS:
        raise InvalidInput(
            f"is a {known['kind']}, by which nothing is answered here",
            title,
            "`onebasis export` writes the LoRA that diffusers loads",
        )
    team, _, name = title.partition("/")
    data = DataSpec(**known["data"], train_file="-", eval_file="-")  # a spec needs both
    return TaskSpec(team=team, name=name, base_model=base_model, kind=known["kind"], data=data)


CANONICAL = {
    "text_column": "text",
    "text_pair_column": "text_pair",
    "prompt_column": "prompt",
    "messages_column": "messages",
    "image_column": "image",
}
"""Names of inputs for those who ask, whatever the columns of the rows were called that the task learnt from."""


def canonical(spec: TaskSpec) -> TaskSpec:
    """The same task with its inputs under their canonical names."""
    names = {key: name for key, name in CANONICAL.items() if getattr(spec.data, key) is not None}
    free = {"label_column": "\x00label", "completion_column": "\x00completion"}  # nobody's name for an input
    return spec.model_copy(update={"data": spec.data.model_copy(update=names | free)})
