"""How images are kept."""
