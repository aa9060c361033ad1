"""The tiny text-to-image model that ships with the package: its pictures, its judge and its training."""
