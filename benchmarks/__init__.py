"""The benchmark of jax_fa3: `python -m benchmarks --help`."""

import sys
from pathlib import Path

# `python -m` puts the checkout first on the path, where jax_fa3/ lies without its compiled module:
# an installed jax_fa3 goes before it.
_root = str(Path(__file__).resolve().parent.parent)
sys.path[:] = [entry for entry in sys.path if entry not in ("", _root)] + [_root]
