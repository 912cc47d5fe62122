import sys

from sdopt.cli import main

sys.exit(main())
