"""Immutable tensors in files, part by part, and what versions say is in them."""
