"""A run's images as a dataset of their own: chosen, named, packed and described for others."""
