"""Mirrors and pictures of what the log and the database say. Nothing here is a truth."""
