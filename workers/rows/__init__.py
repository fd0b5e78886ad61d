"""Files of examples, checked and frozen. No torch here: the control plane imports it."""
