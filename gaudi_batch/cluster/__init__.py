"""What Ray has, and how to reach it."""
