"""A stage that says its process id and never ends: `python -m tests.support.sleeping_stage JOB`."""

import os
import time

if __name__ == "__main__":
    print(os.getpid(), flush=True)
    time.sleep(600)
