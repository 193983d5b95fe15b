"""What the catalog shows of an asset before anything of it was made."""

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import dagster as dg

from modeling import canonical, recipes
from resources.materializations import CONFIG
from resources.provenance import code_url
from resources.secrets import Scrubbing, scrub, scrub_tree, without_secrets_in_errors

if TYPE_CHECKING:
    from modeling.data.config import DatasetConfig
    from modeling.experiment import ExperimentConfig


Body = TypeVar("Body", bound=Callable[..., Any])
_SCRUBBING = Scrubbing()


def stage(
    kind: str,
    params: Any,
    key: Sequence[str],
    *,
    of: "DatasetConfig | ExperimentConfig",
    kinds: set[str],
    ins: Mapping[str, Sequence[str]] | None = None,
    pool: str | None = None,
    description: str | None = None,
    places: Any = None,
) -> Callable[[Callable[..., dg.MaterializeResult[Any]]], dg.AssetsDefinition]:
    """Makes an asset of a body, with all that a stranger wants to know of it.

    Args:
        kind: of the artifact.
        params: the slice of the YAML that the stage reads; the code version is a digest of it, and
            the catalog shows it with its defaults filled in.
        key: of the asset; its first part, a dataset or an experiment, is also the group.
        of: the file that it is made of, which says what that is and who answers for it.
        kinds: the signs of the UI.
        ins: the keys of the parents, by parameter.
        pool: see `dagster.yaml`.
        description: if the body's docstring cannot say it.
        places: where its files lie, if it is read from files: to look at, for no comparison.
    """

    def asset(body: Callable[..., dg.MaterializeResult[Any]]) -> dg.AssetsDefinition:
        told = description or inspect.cleandoc(body.__doc__ or "")
        about = scrub(of.description)
        where = {} if places is None else {"places": dg.MetadataValue.json(scrub_tree(places))}
        return dg.asset(
            key=[*key],
            ins={name: dg.AssetIn([*parent]) for name, parent in (ins or {}).items()},
            group_name=key[0],
            kinds=kinds,
            pool=pool,
            owners=[*of.owners],
            description=f"{told}\n\n`{key[0]}`: {about}" if about else told,
            code_version=recipes.code_version(kind, params),
            metadata={
                CONFIG: dg.MetadataValue.json(scrub_tree(canonical.plain(params))),
                "dagster/code_references": _code_references(body),
                **where,
            },
        )(guarded(body, dg.AssetExecutionContext))

    return asset


def guarded(
    body: Body, context: type[dg.AssetExecutionContext] | type[dg.AssetCheckExecutionContext]
) -> Body:
    """Returns the body of a stage or check, of whose errors and messages no secret is kept.

    Args:
        body: what Dagster calls.
        context: the kind that it is called with.
    """

    @functools.wraps(body)
    def guarded_body(*args: Any, **kwargs: Any) -> Any:
        context.get().log.addFilter(_SCRUBBING)
        with without_secrets_in_errors(dg.Failure, dg.RetryRequested):
            return body(*args, **kwargs)

    return guarded_body  # pyright: ignore[reportReturnType]


def _code_references(body: Callable[..., Any]) -> dg.CodeReferencesMetadataValue:
    """Returns where a body is written: here, and in the repository if its host is known.

    Only definitions have it, which are read anew on each machine: no artifact's record and no event
    holds a path of a checkout.
    """
    path, line = inspect.getfile(body), inspect.getsourcelines(body)[1]
    url = code_url(path, line)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)
        here = dg.LocalFileCodeReference(file_path=path, line_number=line, label="this checkout")
        there = [] if url is None else [dg.UrlCodeReference(url=url, label="repository")]
        return dg.CodeReferencesMetadataValue(code_references=[here, *there])
