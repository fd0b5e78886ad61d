"""The commands `onebasis store …`, also `python -m subspace_store …`: a store is looked at and tended.

Which command is where: look.py reads, change.py writes, trials.py tries out in memory; what they share is in place.py.
Imported in the order in which `--help` lists them.
"""

from subspace_store.commands import look, change, trials  # isort: skip  # noqa: F401
from subspace_store.commands.place import SERVICE, app

__all__ = ["SERVICE", "app"]
