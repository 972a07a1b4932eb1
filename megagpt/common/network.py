"""Whether a server can be reached, asked before a library that would try for minutes."""

import os
import socket

CONNECT_TIMEOUT_S = 3.0
PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")


def reachable(host: str, port: int) -> bool:
    """Return whether `host` accepts a connection; behind a proxy only the library can find out."""
    if any(os.environ.get(name) for name in PROXIES):
        return True
    try:
        socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True
