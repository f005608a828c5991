"""`python -m jaxpeft` is the `jaxpeft` command."""

import sys

from jaxpeft.cli import main

sys.exit(main())
