"""What the product costs, measured: scripts, and what tests share with them."""

import sys
from pathlib import Path

# The tests' own Ray nodes, servers and proxy serve benchmarks, too.
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
