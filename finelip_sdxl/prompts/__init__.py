"""What happens to a prompt before it is encoded."""
