"""The files of tasks that are needed no more: rows, staged adapters, checkpoints, results of single rows."""

from __future__ import annotations

from orchestrator.tasks.task_lifecycle import needs_training_rows
from orchestrator.tasks.task_queue import TaskQueue
from orchestrator.tasks.task_record import TaskRecord, TaskState
from subspace_store import Storage


class UnusedFiles:
    """Deletes them: of one task when it has just been trained, of all when tasks may have ended unseen."""

    def __init__(self, queue: TaskQueue, storage: Storage) -> None:
        self._queue = queue
        self._storage = storage
        self.due = True
        """Some task ended, or control plane or storage were away."""

    def delete_due(self) -> None:
        if self.due:
            self.delete()
            self.due = False

    def delete(self, task_id: str = "") -> None:
        """Of one task, or of all."""
        of = f"{task_id}/" if task_id else ""
        files = [key for place in ("data", "staging", "results") for key in self._storage.keys(f"{place}/{of}")]
        records = {record.task_id: record for record in self._queue.tasks()}
        unjudged = any(record.state in (TaskState.REFINING, TaskState.EVALUATING) for record in records.values())
        for key in files:
            record = records.get(key.split("/")[1])  # those of tasks that nobody knows stay
            if record is None or (unjudged and record.spec.method.share_full):
                continue  # it may be in work, to be refined again
            if _is_done_with(record, key):
                self._storage.delete(key)


def _is_done_with(record: TaskRecord, key: str) -> bool:
    """Whether a task will never need one of its files again."""
    trained = not needs_training_rows(record)
    if key == record.train_key:
        return trained
    given_up = record.state in (TaskState.REJECTED, TaskState.CANCELLED)
    parked = record.state is TaskState.PARKED
    if trained and key.startswith(f"results/{record.task_id}/local-") and key != record.local_results_key:
        return True  # of an attempt that did not count
    if key == record.eval_key or key.startswith("results/"):  # needed while a version may be scored that holds the task
        return given_up or (parked and not record.version)
    # In staging: checkpoints until it is trained, the adapter until no group can fail that has to be merged again.
    return (
        given_up
        or parked
        or record.state is TaskState.PUBLISHED
        or (trained and key not in (record.staging_key, record.refined_key))
    )
