#!/usr/bin/env python3
"The best checkpoint of a run so far: `topoqa monitor` with its options."

import sys

from find_topoqa import run_topoqa

run_topoqa("monitor", sys.argv[1:])
