"""MLflow made anew from the task database and the logs, while no service runs that writes to it as well."""

from __future__ import annotations

from pathlib import Path

from configs.document import without_password
from configs.errors import Conflict, OnebasisError, Unavailable
from configs.settings import Settings
from orchestrator.reports.mlflow_mirror import Mirror
from orchestrator.tasks.task_queue import NOBODY, TaskQueue
from subspace_store.commands.state_folder import running_server


def rebuild_mirror(settings: Settings, state_dir: Path) -> str:
    """Put aside what MLflow shows, and make it again.

    Returns:
        Name of the experiment, deleted in MLflow's sense, that has what was shown before.

    Raises:
        Conflict: The service runs, and mirrors by itself.
        Unavailable: MLflow does not answer.
    """
    if running_server(state_dir) is not None:
        raise Conflict("the service runs, and writes to MLflow itself", str(state_dir), "`onebasis down` first")
    queue = TaskQueue(settings.database_url, settings.failures, NOBODY)
    mirror = Mirror(settings, queue)
    try:
        before = mirror.begin_anew()
        mirror.sync()
        return before
    except OnebasisError:
        raise
    except Exception as error:  # whatever MLflow or its database raises
        todo = "check mlflow.tracking_uri; repeat it, or `onebasis up`, which mirrors what is missing"
        what = without_password(f"MLflow failed: {type(error).__name__}: {error}")
        raise Unavailable(what, "mlflow", todo) from error
    finally:
        queue.close()
