"""`python -m subspace_store`: the commands of a store without the rest of onebasis."""

from subspace_store.commands.app import app

app(prog_name="python -m subspace_store")
