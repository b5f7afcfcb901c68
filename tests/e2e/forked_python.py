"""Stand in for python: have a fork of tests.e2e.forks do what `python *words` does, and end as it ends.

`python -I -S forked_python.py SOCKET *words`, which takes hundredths of a second to start, hands over its arguments,
folder, environment and standard streams, and the signals that it gets.
"""

import json
import os
import signal
import socket
import sys


def main() -> None:
    """Ask the process at SOCKET, and wait for the exit code; a signal that ended the fork ends this process too."""
    path, *words = sys.argv[1:]
    request = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        socket.send_fds(server, [len(request).to_bytes(4, "little")], [0, 1, 2])
        server.sendall(request)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, frame: server.sendall(bytes([number])))
        code = int.from_bytes(server.recv(4), "little", signed=True)
    if code < 0:
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main()
