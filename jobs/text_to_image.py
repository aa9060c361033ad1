"""What `gaudi-batch run` does, as a script to submit to a Ray cluster.

    ray job submit --address http://head:8265 --working-dir . -- \\
        python jobs/text_to_image.py --config jobs/configs/stable-diffusion-2-base.yaml --output s3://bucket/run

With the repository as the working directory its own code runs on every node; an installed package is not needed, what
it depends on is. `gaudi-batch submit` sends the same job with one command.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gaudi_batch.cli.main import entry


def main() -> None:
    """Runs the job that the command line names; ends with its exit code."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="Every other flag is one of `gaudi-batch run`.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="YAML file of the job")
    known, flags = parser.parse_known_args()
    sys.argv[1:] = ["run", known.config, *flags]
    entry()


if __name__ == "__main__":
    main()
