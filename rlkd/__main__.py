"""`python -m rlkd VERB ...`, which torchrun starts, too."""

import sys

from rlkd.cli.main import main

sys.exit(main())
