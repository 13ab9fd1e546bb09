"""Whether another process of this machine has ended: known at once, never of one that is only slow."""

import json
import os
import signal
import subprocess
import sys

from sae.processes import has_ended

MARK = "import json, time; from sae.processes import mark; print(json.dumps(mark()), flush=True); time.sleep(600)"


def test_a_process_has_ended_when_it_was_killed_and_not_while_it_stands_still():
    child = subprocess.Popen([sys.executable, "-c", MARK], stdout=subprocess.PIPE, text=True)
    try:
        mark = json.loads(child.stdout.readline())
        assert mark[1] == str(child.pid)
        assert not has_ended(mark)
        os.kill(child.pid, signal.SIGSTOP)
        assert not has_ended(mark)
        assert has_ended([mark[0], mark[1], "1"])  # another process had the number
        assert not has_ended(["another machine", "1", "1"])
        assert not has_ended(None)
    finally:
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert has_ended(mark)  # though nobody has waited for it
    child.wait()
    assert has_ended(mark)
    child.stdout.close()
