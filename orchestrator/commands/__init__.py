"""What people type. A command is a short process, most of whose work is importing."""

import gc

# What imports make stays until the end: looking through it for garbage again and again costs a command a tenth of its
# time. Commands that stay (`--watch`) make garbage slowly enough.
gc.set_threshold(100_000, 50, 1000)
