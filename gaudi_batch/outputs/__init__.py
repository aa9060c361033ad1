"""How images are kept: one module a format."""
