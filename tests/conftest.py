import os
import signal

# before torch and SAPIEN start their threads: the tests run beside environment workers on few cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("LP_NUM_THREADS", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests send it, and a background job begins with it ignored
