"""Which task is next: pure functions, use and waiting tasks are handed in."""
