"""Settings of these tests."""

import torch

# The matrices here are small: threads cost more than they save, most of all on a shared machine.
torch.set_num_threads(1)
