"""`python -m convert SRC DST` from a checkout: what `neo-jax convert` does from a package."""

import sys

from neo_jax.cli import main

sys.exit(main(["convert", *sys.argv[1:]]))
