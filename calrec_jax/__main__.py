"""`python -m calrec_jax`, the same as the command `calrec`."""

import sys

from calrec_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
