"""The mathematics of the subspace. Nothing is read or written here."""
