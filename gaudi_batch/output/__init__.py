"""The files of an output, a module for each kind."""
