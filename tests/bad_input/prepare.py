"""What rows need beside text: models, tokenizers, archives, servers.

A plain function writes files into the folder it is given; it runs once, and every row that names it gets
a copy. A generator function runs for each row, yields once (the row has what it yields as `prepared`),
and goes on when the row is over.
"""

from pathlib import Path


def binary_profile(folder: Path) -> None:
    (folder / "mine.yaml").write_bytes(bytes(range(256)) * 4)
