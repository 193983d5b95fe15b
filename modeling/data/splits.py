"""Names of splits: a role, and where there are several sources the one that it is of.

train    validation    train/web    validation/web
"""

ROLES = TRAIN, VALIDATION = "train", "validation"


def split_name(held_out: bool, source_name: str) -> str:
    """Returns the split of documents of a source; an only source has no name."""
    role = VALIDATION if held_out else TRAIN
    return f"{role}/{source_name}" if source_name else role


def role_of(split: str) -> str:
    """Returns what a split is for."""
    return split.partition("/")[0]


def source_of(split: str) -> str:
    """Returns the source that a split is of; an only one has no name."""
    return split.partition("/")[2]


def file_stem(split: str) -> str:
    """Returns what the names of a split's files begin with."""
    return split.replace("/", "-")
