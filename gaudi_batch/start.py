"""What a submitted job runs: a copy of this file travels with it, to say so where gaudi_batch is missing."""

import socket
import sys

EXIT_CODE = 2
"""Of a job that can't be run as it is."""

if __name__ == "__main__":
    try:
        import gaudi_batch.driver.runner  # noqa: F401  what it needs is missed here and not later
        from gaudi_batch.cli.main import entry
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "gaudi_batch":
            ways_out = (
                "install it there, start Ray from the environment that has it, or send yours with"
                " gaudi-batch submit --ship-code"
            )
        else:
            ways_out = "gaudi_batch needs it: install what gaudi-batch depends on there"
        print(
            f"gaudi-batch: the Python of this job, {sys.executable} on node {socket.gethostname()}, has no {missing};"
            f" {ways_out}",
            file=sys.stderr,
        )
        sys.exit(EXIT_CODE)
    entry()
