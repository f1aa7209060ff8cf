import sys

from dfm_fast.cli import main

sys.exit(main())
