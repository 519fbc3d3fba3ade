"""`python -m rlhf_jax` is the console script."""

import sys

from rlhf_jax.cli import main

sys.exit(main())
