"""Scores and what follows from them: pure functions of the log's numbers."""
