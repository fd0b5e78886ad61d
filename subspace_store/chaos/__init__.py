"""A fault simulation of the store. Imported by the command and the tests alone."""
