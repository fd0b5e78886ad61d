"""A task's record, its life, its table in SQL, and the way in."""
