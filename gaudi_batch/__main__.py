"""`python -m gaudi_batch` is `gaudi-batch`."""

from gaudi_batch.cli.main import entry

entry()
