"""The parts that the training recipes are made of."""
