"""Does to a file what disks, interrupted copies and people do."""

from pathlib import Path


def harm(damage: str, path: Path, *, sibling: Path, older: Path, elsewhere: Path) -> None:
    """Does `damage`, one of `FILE_DAMAGES`, to the file at `path`; a link leads `elsewhere`."""
    data = path.read_bytes()
    match damage:
        case "truncated":
            path.write_bytes(data[:-1])
        case "deleted":
            path.unlink()
        case "one bit flipped":
            middle = len(data) // 2
            path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        case "exchanged with a sibling":
            path.write_bytes(sibling.read_bytes())
            sibling.write_bytes(data)
        case "replaced by an older version":
            path.write_bytes(older.read_bytes())
        case "replaced by a link to a copy":
            elsewhere.write_bytes(data)
            path.unlink()
            path.symlink_to(elsewhere)
            return
        case _:
            raise ValueError(damage)
    assert not path.exists() or path.read_bytes() != data, f"{path}: nothing was harmed"


def likest(path: Path, others: list[Path]) -> Path:
    """Returns of the other files the one that is most easily taken for `path`: of its size."""
    size, data = path.stat().st_size, path.read_bytes()
    candidates = [other for other in others if other != path and other.read_bytes() != data]
    return min(candidates, key=lambda other: (abs(other.stat().st_size - size), str(other)))
