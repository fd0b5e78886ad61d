"""Answers from the basis: rows of many tasks go through one base model in one batch."""

from workers.serving.mixed_batch import Answer, Asked, MixedBatch

__all__ = ["Answer", "Asked", "MixedBatch"]
