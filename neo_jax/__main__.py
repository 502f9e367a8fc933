"""`python -m neo_jax` is `neo-jax`."""

import sys

from neo_jax.cli import main

sys.exit(main())
