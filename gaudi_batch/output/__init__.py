"""What lies in an output, a file a kind of record."""
