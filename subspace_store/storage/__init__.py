"""The seam to object storage: one protocol, three kinds."""
