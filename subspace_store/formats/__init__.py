"""Adapters as other programs write and read them. No store here."""
