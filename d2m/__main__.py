"""`python -m d2m`: the command line, also for torchrun and accelerate launch."""

import sys

from d2m.cli import main

if __name__ == "__main__":
    sys.exit(main())
