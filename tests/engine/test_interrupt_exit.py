import subprocess
import sys

import pytest

SCRIPT = """
import multiprocessing
import subprocess
import sys
from torch.utils.data import DataLoader
from linvis.engine import interrupt

loader = DataLoader([1, 2, 3, 4], num_workers=2, persistent_workers=True)
interrupt._guard_workers(loader)
iterator = iter(loader)
next(iterator), next(iterator)  # one of each worker: both have started
if 'signalled' in sys.argv:
    for worker in multiprocessing.active_children():
        # Not by os.kill: a worker leaves in silence when its parent asks for it.
        subprocess.run(['kill', '-TERM', str(worker.pid)], check=True)
        worker.join(0.3)
        assert worker.is_alive()
# What is still referenced at the end, as by the traceback of an error, keeps its workers.
sys.modules['kept'] = (loader, iterator)
print('end', flush=True)
"""


@pytest.mark.parametrize('history', ['undisturbed', 'signalled'])
def test_process_ends_in_silence_though_persistent_workers_are_alive(history):
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT, history],
        timeout=60,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == 'end\n'
    assert done.stderr == ''
    assert done.returncode == 0
