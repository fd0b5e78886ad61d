"""Ways for an adapter to come about, one file each, with the same three names in each.

* `TRAINS`: whether there are optimisation steps between the two.
* `prepare(base, spec, frozen)`: what is trained, or what was brought.
* `finish(prepared, base, spec)`: the adapter in canonical form.
"""
