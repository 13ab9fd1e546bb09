"""An arm's side of `rounds.started`: settings as its argument, answers as lines of JSON, {"error"} when it cannot continue."""

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

Answer = Callable[..., None]


def answering(serve: Callable[[dict[str, Any], Answer], None]) -> None:
    """`serve` gets the settings and the function that answers with its keywords; exits with 1 when it raises."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=pipe, flush=True)

    try:
        serve(json.loads(sys.argv[1]), answer)
    except Exception as error:
        traceback.print_exc()
        answer(error=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}")
        sys.exit(1)
