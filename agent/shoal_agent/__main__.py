"""`python -m shoal_agent`."""

import sys

from shoal_agent.cli import main

if __name__ == "__main__":
    sys.exit(main())
