"""The forking process of `Checker` with files that are slow or deadly to read: the name of a task says which.

`python -m tests.orchestrator.api.slow_checking`
"""

from __future__ import annotations

import os
import re
import signal
import time

from configs.settings import Settings
from configs.task_spec import TaskSpec
from orchestrator.tasks import checking
from orchestrator.tasks.admission import Draft, check_submission
from workers.orders import BaseLayout

SLOW_SECONDS = 20.0


def check(spec: TaskSpec, settings: Settings, layout: BaseLayout) -> Draft:
    if spec.name.startswith("slow"):
        until = time.monotonic() + SLOW_SECONDS
        while time.monotonic() < until:  # in C, holding the interpreter: no other thread of this process runs
            re.match("(a|a)*b", "a" * 20)
    if spec.name == "deadly":
        os.kill(os.getpid(), signal.SIGSEGV)
    if spec.name == "broken":
        raise ZeroDivisionError("ours")
    return check_submission(spec, settings, layout)


if __name__ == "__main__":
    checking.check_submission = check  # type: ignore[attr-defined]
    checking.main()
