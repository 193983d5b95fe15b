"""Pages for people: HTML files, each made from a template of the package that shows it.

What stands in a page is a corpus, a model's words, a path: all of it is escaped by the template
engine, so that text is shown and never run. A value that a template names and nobody gives is an
error, not an empty place. Templates load nothing from elsewhere, so a page can be kept and mailed.
"""

import jinja2


def templates(package: str) -> jinja2.Environment:
    """Returns what finds the templates of a package, such as `modeling.data`, and fills them in.

    The caller adds the filters and globals that its templates use.
    """
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
