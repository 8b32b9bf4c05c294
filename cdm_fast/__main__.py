"""`python -m cdm_fast`: the command line."""

import sys

from cdm_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
