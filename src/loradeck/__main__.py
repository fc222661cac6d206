"""`python -m loradeck` is `loradeck`."""

import sys

from loradeck.cli import main

sys.exit(main())
