"""What the browser's tests share: the feature and the text they know, and a server in a thread."""

import threading
import time
from typing import Any, NamedTuple

FEATURE = 3586  # of demo-sae: fires on curse words
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


class Site(NamedTuple):
    url: str
    index: Any
    notes: Any
    lm: Any = None
    dictionary: Any = None
    steering: Any = None
    ranges: Any = None


class served:
    """The app on a free port of this machine, in a thread."""

    def __init__(self, app: Any):
        from sae.features.browser.serve import listening, server_of

        self.listener, self.server = listening(0), server_of(app)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def __exit__(self, *_: Any) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.listener.close()
