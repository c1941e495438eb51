#!/usr/bin/env python3
"One training: `topoqa run` with its options; without --config it takes config.yaml."

import sys

from find_topoqa import run_topoqa

given = any(argument.split("=")[0] in ("--config", "--help") for argument in sys.argv[1:])
run_topoqa("run", sys.argv[1:] if given else ["--config", "config.yaml", *sys.argv[1:]])
