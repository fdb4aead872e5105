"""`python -m fieldmark`, also for `accelerate launch -m fieldmark train ...`."""

from __future__ import annotations

import sys

from fieldmark.cli import main

sys.exit(main())
