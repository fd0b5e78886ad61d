"""Answers from the basis: rows of many tasks go through one base model in one batch."""
