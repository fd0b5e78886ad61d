"""The interface to object storage: one protocol, three kinds."""
