"""Two processes: the doctor, where the second rank's clock is ahead by so many seconds.

accelerate launch --config_file launch_configs/two_cpu_processes.yaml tests/workers/doctor_worker.py SECONDS WORDS...
"""

import os
import sys
import time

from mtl_dist import cli, interconnect

ahead = float(sys.argv[1]) if os.environ["RANK"] == "1" else 0.0
interconnect.clock_skew.__defaults__ = (lambda: time.time() + ahead,)
cli.main(["doctor", *sys.argv[2:]])
