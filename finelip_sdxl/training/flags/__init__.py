"""The flags of each recipe, and their checks. Nothing heavy is imported: wrong flags are refused at once."""
