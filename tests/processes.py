"""What tests with several processes share."""

import socket


def free_port() -> int:
    """A port of this machine that nobody listened on a moment ago, for ``MASTER_PORT``."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
