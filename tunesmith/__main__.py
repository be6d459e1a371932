"""`python -m tunesmith` and `torchrun -m tunesmith` are the command line."""

import sys

from tunesmith.cli import main

sys.exit(main())
