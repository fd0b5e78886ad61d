"""Answers over HTTP, by Ray Serve: beside the control plane, and without it."""
