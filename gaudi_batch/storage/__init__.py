"""Object stores and disks, through fsspec."""
