"""What of a URL may be shown: not the user and password, nor what signs it."""

import re

_PARTS = re.compile(r"(?:[^/]*@)?([^?#]*)([?#]?)(.*)", re.DOTALL)


def public_url(url: str, *, instead: str = "") -> str:
    """Returns a URL without user and password, query and fragment; a local path as it is.

    Elsewhere than on the web `?` stands for any one character, unless it begins fields, and `#L7`
    leads to a line of a page.

    Args:
        url: or a path.
        instead: shown in place of query or fragment.
    """
    scheme, mark, rest = url.partition("://")
    if not mark:
        return url
    # A password may hold `?`, `#` and `@` where somebody forgot to quote them.
    parts = _PARTS.fullmatch(rest)
    assert parts is not None
    place, begins, behind = parts.groups()
    if "=" in behind or (begins == "?" and scheme.lower() in ("http", "https")):
        return f"{scheme}://{place}{begins if instead else ''}{instead}"
    return f"{scheme}://{place}{begins}{behind}"
