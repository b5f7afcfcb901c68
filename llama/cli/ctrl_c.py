"""Importing this lets Ctrl-C end the process at once and without a word, unless whoever started it ignores Ctrl-C.

Programs import it first, because torch takes seconds to import: see D48. There an exception is a page of traceback, is
lost, or aborts the process. Where one is wanted, `llama.cli.signals` makes it one again.
"""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
