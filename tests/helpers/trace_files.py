"""Files of traces for the tests of their readers."""

import json


def written(tmp_path, content, name="t.csv"):
    """A file with this content, text or bytes."""
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*rows):
    """JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)
