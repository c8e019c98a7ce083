import subprocess
import sys

SCRIPT = """
from torch.utils.data import DataLoader
from linvis.engine import interrupt

loader = DataLoader([1, 2, 3, 4], num_workers=2, persistent_workers=True)
interrupt._guard_workers(loader)
iterator = iter(loader)
next(iterator)
# What is still referenced at the end, as by the traceback of an error, keeps its workers.
import sys
sys.modules['kept'] = (loader, iterator)
print('end', flush=True)
"""


def test_process_ends_though_persistent_workers_are_alive():
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT], timeout=60, capture_output=True, text=True, check=False
    )
    assert done.stdout == 'end\n'
    assert done.returncode == 0, done.stderr
