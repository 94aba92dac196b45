"""Heat maps of a prompt's parts: where in a picture each part acted, by the UNet's cross-attention."""
