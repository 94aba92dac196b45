"""The parts of the training recipes."""
