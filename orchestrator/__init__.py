"""Takes tasks, decides which runs next and where, watches scores, publishes or rolls back, and talks to people."""
