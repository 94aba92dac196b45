"""The steps of a prompt before it is encoded: its weights, its windows, its plan."""
