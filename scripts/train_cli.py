"The command line under its earlier name: `python -m train_cli run ...` is `topoqa run ...`."

import sys

from topoqa_nb.cli import main

if __name__ == "__main__":
    sys.exit(main())
