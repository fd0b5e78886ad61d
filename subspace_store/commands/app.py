"""The commands `onebasis store …`, also `python -m subspace_store …`: commands to read a store and to take care of it.

Commands that read are in look.py, commands that write in change.py, trials in memory in trials.py; place.py has what
they share. They are imported in the order in which `--help` lists them.
"""

from subspace_store.commands import look, change, trials  # isort: skip  # noqa: F401
from subspace_store.commands.place import SERVICE, app

__all__ = ["SERVICE", "app"]
