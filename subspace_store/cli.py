"""The commands `onebasis store …`, also `python -m subspace_store …`: a store is looked at and tended.

Which command is where: cli_look.py reads, cli_change.py writes, cli_trials.py tries out in memory; what they share is
in cli_place.py. Imported in the order in which `--help` lists them.
"""

from subspace_store import cli_look, cli_change, cli_trials  # isort: skip  # noqa: F401
from subspace_store.cli_place import SERVICE, app

__all__ = ["SERVICE", "app"]
