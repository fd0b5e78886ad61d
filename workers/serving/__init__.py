"""Answers from the basis: rows of many tasks go through one base model in one batch."""

from workers.serving.mixed_batch import Answer, Asked, MixedBatch
from workers.serving.replica import Question, Replica
from workers.serving.writing import Writing

__all__ = ["Answer", "Asked", "MixedBatch", "Question", "Replica", "Writing"]
