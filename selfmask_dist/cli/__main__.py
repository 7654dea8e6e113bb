"""`python -m selfmask_dist.cli` is `selfmask`."""

import sys

from selfmask_dist.cli import main

sys.exit(main())
