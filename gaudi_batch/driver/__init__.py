"""The one process that drives a run."""
