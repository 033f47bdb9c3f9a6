"""Package data: the default targets, and the demo's base model with the script that trained it."""
