"""Files that are either whole or not there."""
import os
from pathlib import Path

ROOT = Path(__file__).parents[1]


def write_file(path, content: bytes | memoryview | str):
    "Write `content` beside `path`, in a folder that is there, then rename it: `path` is never half written."
    path = Path(path)
    tmp = path.with_name(f"{path.name}.tmp")
    try:
        with open(tmp, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
