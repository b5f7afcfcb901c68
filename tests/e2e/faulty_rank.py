"""A user's command on several ranks of which one fails: `faulty_rank.py CKPT_DIR FAULT`, without torchrun's help.

In the middle of a text the last rank is killed or stopped, or makes a call that the others do not make.
"""

import os
import signal
import sys

from llama import Llama
from llama.cli.runner import supervise
from llama.distributed.job import from_all_ranks

SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}


def main() -> None:
    ckpt_dir, fault = sys.argv[1:]
    llm = Llama.build(ckpt_dir, max_seq_len=64, timeout=1.5)
    llm.tokenizer.stop_tokens = frozenset()
    for i, _ in enumerate(llm.stream([[65, 66, 67]], 32, temperature=0)):
        if i == 3 and os.environ["RANK"] == "1":
            if fault in SIGNALS:
                os.kill(os.getpid(), SIGNALS[fault])
            from_all_ranks(None)


if __name__ == "__main__":
    supervise(main)
