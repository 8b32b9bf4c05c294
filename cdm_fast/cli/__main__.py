"""`python -m cdm_fast.cli`."""

import sys

from cdm_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
