"""What the stand-in is made of; programs import `habana_frameworks.torch` and never this."""
