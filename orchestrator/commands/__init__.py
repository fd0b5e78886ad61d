"""What people type. A command is a short process, most of whose work is importing."""

import gc

# The 100,000 objects that imports make stay until the end: looking through them for garbage again and again takes 15 %
# of a command. One that stays (`--watch`) still collects, after a million objects more.
gc.set_threshold(1_000_000)
