"""What the log says and how it is written. No tensor here."""
