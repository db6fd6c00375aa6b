"""`python -m fleet_train ...` is `fleet ...`."""

import os
import sys

program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bin", "fleet")
os.execv(program, ["fleet", *sys.argv[1:]])
