"""Files and the disk that they lie on: digests, and the errors that only a write gives.

Standard library only.
"""

import errno
import hashlib
from pathlib import Path

# No space, quota used up, file too large, and a file system that has become read-only (as it does
# after an error of its disk). What is read never answers so.
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
