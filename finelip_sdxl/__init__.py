"""Long prompts for SDXL: FineLIP text encoders of 248 positions in a Diffusers pipeline."""
