"""`python -m rlhf_jax` is the console script."""

import sys

from rlhf_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
