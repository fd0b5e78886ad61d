"""Immutable tensors in files, part by part, and how the tensors of a version are found in them."""
