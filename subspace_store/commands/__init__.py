"""The commands `onebasis store …`, also `python -m subspace_store …`."""
