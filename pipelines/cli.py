"""The `levanter` command: reads the command line, and calls the module that does the work.

Imports are made by the command that needs them, so that `levanter --help` answers at once.
"""

import argparse
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

_OVERVIEW = """\
Make language models, every step an asset you can see.

  levanter run nano                        make what is missing or stale of an experiment
  levanter run nano --set dataset.tokenizer.vocab_size=8192
                                           change one thing: only what depends on it is made again
  levanter train --model gpt2-nano --dataset notes/
                                           an experiment on your own text, without writing a file
  levanter launch nano                     the same from CI, with an honest exit code
  levanter status                          what is fresh, stale or missing, and why
  levanter why nano/checkpoint             which field made it stale
  levanter lineage nano/hf_model           which bytes a model was made of
  levanter verify nano/checkpoint          make it again and compare the bytes
  levanter show pystdlib                   what a model reads, token by token
  levanter fsck                            whether every byte is still what was published
  levanter ui                              the same in the browser, on 127.0.0.1
"""
_RUN = """\
Makes what is missing or stale of EXPERIMENT, and nothing else, on the persistent Dagster instance
in DAGSTER_HOME (default: .dagster_home in the checkout). A stage whose recipe is on record is not
computed again, whatever was run before; an interrupted run goes on where it stopped.

EXPERIMENT is a file of pipelines/experiments or $DAGSTER_HOME/catalog/experiments. Its fields, and
with `dataset.` in front those of its dataset, can be changed for this run:

  levanter run nano --set trainer.num_train_steps=600 --set optimizer.learning_rate=1e-3
"""
_TRAIN = """\
Writes an experiment into $DAGSTER_HOME/catalog and runs it.

  levanter train --model gpt2-nano --dataset pystdlib
  levanter train --model gpt2-small --dataset 'books/*.jsonl.gz' --trainer.train_batch_size 32
  levanter train --config_path my.yaml --optimizer.learning_rate 1e-3
  levanter train --model gpt2-nano --dataset notes/ --tokenizer unigram:8192

DATASET is a name of the catalog, or a file, folder, glob or URL of text or JSON lines. TOKENIZER is
a directory or a `tokenizer.json`, a repository of the Hugging Face hub at a commit
(OWNER/NAME@COMMIT), or one to train on DATASET (bpe, wordpiece or unigram, and how many ids).
Any field of the experiment can be given as `--section.field value`.
"""
_LAUNCH = """\
Launches JOB through `dagster job launch`, streams its progress, prints a table of what was made
with a link to the run, and exits with the run's status: 0 it succeeded, 1 it failed or was
canceled, 2 it never started, 3 it was still going when the time was up. SIGINT or SIGTERM, as a
cancelled CI job sends, cancels the run: training saves a checkpoint first, and the next launch goes
on from there. Needs no daemon and no webserver.

JOB is an experiment, for everything; EXPERIMENT__tokenize, __pretrain, __evaluate or __export, for
that with what it is made of; EXPERIMENT__on_demand; or DATASET__data.

  levanter launch nano__pretrain
  levanter launch nano --set optimizer.learning_rate=1e-3 --tag commit=$(git rev-parse HEAD)
"""
_WHY = """\
Tells why an asset is not up to date, as differences of fields, files and content ids, through all
layers above it; and what its last materialization was for.

  levanter why nano/checkpoint
"""
_VERIFY = """\
Makes an artifact again, as its records say and from the inputs on them, in a store of its own, and
compares the content ids; names the first part that differs, and whether this is another numerics
class. Exits 1 if other bytes came out. An artifact is named by an asset that it is now, an alias,
or six or more digits of its content id; the catalog may have changed since, or never have had it.

  levanter verify pystdlib/tokenizer
  levanter verify nano/checkpoint          (trains again)
  levanter verify nano/checkpoint --steps 300..400
                                           (only these updates, from the checkpoint of step 300)

With --offline it checks a directory of an exported model against the digests in its own card, where
`sha256sum` gives the same, and its tokenizer against the lineage there; and tells the model's
content id, made anew of the files. That needs neither store, catalog, instance nor network.
"""
_FSCK = """\
Reads every object, record and alias of the artifact store and names each file that is missing,
changed, exchanged or not published, with what making it again would take. Changes nothing, unless
told to set damaged artifacts aside: the next run makes them anew. Exits 1 if anything is wrong.
"""
_GC = """\
Lists what no record, alias, lease or Dagster instance reaches: objects without a record, progress
of builds that are done, attempts of processes that are gone. Deletes it only with --delete, while
others build and publish: what is named by then is given back. Records,
and so the artifacts on record, last for ever unless --expire-records gives them an age.
"""
_CHECKPOINT = """\
Looks after what training has saved. CHECKPOINT is an experiment (what it has published, or the last
step that it has saved), one of its steps (nano@1200), an artifact's content id or alias, or a
directory or URL. Steps are looked for on this machine and in a remote store. Needs no accelerator,
and no model: every checkpoint tells what it is made of.

  levanter checkpoint ls nano                   steps in progress and published, size, age, state
  levanter checkpoint show nano@1200            every array, and what they add up to
  levanter checkpoint diff nano@1200 nano       exits 1 if they differ, and 2 if one is damaged
  levanter checkpoint export nano weights.safetensors
  levanter checkpoint verify nano               reads every byte; exits 1 and names what is damaged
  levanter checkpoint pin nano@1200             keeps a step that would be retired
"""
_SHOW = """\
Shows rows of a dataset's token cache, decoded token by token: where tokens end, which documents a
row holds, what the loss mask leaves out.

  levanter show pystdlib --seq-len 128 --example 7
  levanter show chats --packing documents --html examples.html
"""
_LINEAGE = """\
Prints what an artifact was made of, down to the corpus.

ARTIFACT is an asset (nano/hf_model), a content id or six or more of its first digits, or an alias.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0 on success, 1 on failure, 2 for a wrong command line."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if arguments.command == "train":
            arguments.overrides = dotted_overrides(rest)
        if not getattr(arguments, "offline", False):
            from pipelines.instance import ensure_home

            ensure_home()
        if getattr(arguments, "rehash", False):
            # In the environment, where the stages' own processes find it too.
            os.environ["LEVANTER_REHASH"] = "1"
        command: Callable[[argparse.Namespace], int] = arguments.call
        return command(arguments)
    except (ValueError, FileNotFoundError) as error:
        # What a user got wrong is told in a line; anything else keeps its traceback.
        from resources.secrets import scrub

        # An error may quote the command line, a log may keep it, and a URL may hold a password.
        sys.stderr.write(f"levanter {arguments.command}: {scrub(str(error))}\n")
        return 2
    except Exception:  # noqa: BLE001 (told as Python would, but without secrets)
        from resources.secrets import scrub

        sys.stderr.write(scrub(traceback.format_exc()))
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted. What was committed is kept; the same command resumes.\n")
        return 130


def dotted_overrides(words: Sequence[str]) -> list[str]:
    """Returns `--trainer.seed 3` and `--trainer.seed=3` as `trainer.seed=3`.

    Raises:
        ValueError: a word that is no such option, or an option without its value.
    """
    overrides = []
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        option = re.fullmatch(r"--([A-Za-z_][\w.]*)(?:=(.*))?", word, re.DOTALL)
        if option is None:
            raise ValueError(f"{word!r}: expected an option such as --trainer.num_train_steps 50.")
        name, value = option.groups()
        if value is None:
            if not remaining:
                raise ValueError(f"--{name}: this option needs a value.")
            value = remaining.pop(0)
        overrides.append(f"{name}={value}")
    return overrides


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="levanter",
        description=_OVERVIEW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help_line: str, text: str | None = None) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=help_line,
            description=text or help_line,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    run = add("run", "Make what is missing or stale of an experiment.", _RUN)
    run.add_argument("experiment", metavar="EXPERIMENT")
    run.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="SECTION.FIELD=VALUE",
        help="change a field for this run; may be given several times",
    )  # fmt: skip
    run.add_argument(
        "--profile-steps", metavar="FIRST..LAST",
        help="write a trace of these updates of training, for https://ui.perfetto.dev",
    )  # fmt: skip
    run.add_argument(
        "--check-reproducible", action="store_true",
        help="make all that was computed a second time, and fail where bytes differ",
    )  # fmt: skip
    run.add_argument(
        "--on-demand", action="store_true",
        help="begin to train while the corpus is still being tokenized; the results are the same",
    )  # fmt: skip
    run.set_defaults(call=_run)

    train = add("train", "Train a named model on a dataset, or from a file.", _TRAIN)
    train.add_argument("--model", metavar="NAME", help="a named size, such as gpt2-nano")
    train.add_argument("--dataset", metavar="NAME_OR_PATH", help="a dataset's name, or text")
    train.add_argument(
        "--tokenizer", metavar="TOKENIZER",
        help="a directory or tokenizer.json, OWNER/NAME@COMMIT, or bpe:8192 and the like",
    )  # fmt: skip
    train.add_argument("--config_path", type=Path, metavar="FILE.yaml", help="an experiment file")
    train.set_defaults(call=_train)

    launch = add("launch", "Launch a job, wait for it, exit with its status: for CI.", _LAUNCH)
    launch.add_argument("job", metavar="JOB")
    launch.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="SECTION.FIELD=VALUE",
        help="change a field of the experiment for this run; may be given several times",
    )  # fmt: skip
    launch.add_argument(
        "--tag", dest="tags", action="append", default=[], metavar="NAME=VALUE",
        help="tag the run; may be given several times",
    )  # fmt: skip
    launch.add_argument("--timeout", type=float, default=86400, metavar="SECONDS")
    launch.add_argument("--queue-timeout", type=float, default=300, metavar="SECONDS")
    launch.add_argument("--cancel-timeout", type=float, default=300, metavar="SECONDS")
    launch.set_defaults(call=_launch)

    status = add("status", "Show which assets are fresh, stale or missing, and why.")
    status.add_argument("experiment", nargs="?", metavar="EXPERIMENT")
    status.set_defaults(call=_status)

    why = add("why", "Tell why an asset is stale, field by field.", _WHY)
    why.add_argument("asset", metavar="ASSET")
    why.set_defaults(call=_why)

    lineage = add("lineage", "Show what an artifact was made of.", _LINEAGE)
    lineage.add_argument("artifact", metavar="ARTIFACT")
    form = lineage.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON")
    form.add_argument("--prov", action="store_true", help="as W3C PROV-JSON")
    form.add_argument("--html", type=Path, metavar="FILE", help="as a page with the graph")
    lineage.set_defaults(call=_lineage)

    verify = add("verify", "Make an artifact again and compare.", _VERIFY)
    verify.add_argument("artifact", metavar="ASSET_OR_DIRECTORY")
    verify.add_argument(
        "--steps", metavar="FIRST..LAST", help="of a checkpoint: replay the updates between these"
    )
    verify.add_argument("--offline", action="store_true", help="check an exported model's files")
    verify.set_defaults(call=_verify)

    fsck = add("fsck", "Verify every byte of the artifact store.", _FSCK)
    fsck.add_argument("--set-aside", action="store_true", help="move damaged artifacts away")
    fsck.set_defaults(call=_fsck)

    gc = add("gc", "Show, or delete, what nothing in the store needs.", _GC)
    gc.add_argument("--delete", action="store_true", help="delete what is listed")
    gc.add_argument(
        "--expire-records", type=float, metavar="DAYS",
        help="let go of older records that no alias and no Dagster instance reaches",
    )  # fmt: skip
    gc.set_defaults(call=_gc)

    alias = add("alias", "Give an artifact a name, which also keeps it.")
    alias.add_argument("name", metavar="NAME")
    alias.add_argument("artifact", metavar="ARTIFACT")
    alias.set_defaults(call=_alias)

    _add_checkpoint(add("checkpoint", "Look after what training has saved.", _CHECKPOINT))

    show = add("show", "Show examples of a dataset, token by token.", _SHOW)
    show.add_argument("dataset", metavar="DATASET")
    show.add_argument("--seq-len", type=int, metavar="L", help="tokens in a row")
    show.add_argument("--packing", choices=("concat", "documents"))
    show.add_argument("--split", metavar="NAME", help="train by default")
    show.add_argument(
        "--example", type=int, action="append", metavar="N",
        help="which row, counted from 0; may be given several times",
    )  # fmt: skip
    show.add_argument("--ids", action="store_true", help="with the id of each token")
    show.add_argument("--html", type=Path, metavar="FILE", help="write a page instead")
    show.set_defaults(call=_show)

    for command in (run, status, why):
        command.add_argument(
            "--rehash", action="store_true", help="read every source file, whatever its times say"
        )

    ui = add("ui", "Open the Dagster UI on 127.0.0.1 over the same instance.")
    ui.add_argument("--port", type=int, default=3000)
    ui.set_defaults(call=_ui)
    return parser


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, help_line: str, *operands: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=help_line, description=help_line, allow_abbrev=False)
        for operand in operands:
            action.add_argument(operand, metavar=operand.upper())
        action.set_defaults(call=_checkpoint)
        return action

    ls = add("ls", "List checkpoints in progress and published.")
    ls.add_argument("experiment", nargs="?", metavar="EXPERIMENT")
    ls.add_argument("--verify", action="store_true", help="read every byte of each")
    show = add("show", "Show every array, and what they add up to.", "checkpoint")
    for action in (ls, show):
        action.add_argument("--json", action="store_true", help="as JSON")
    add("diff", "Compare two checkpoints array by array.", "checkpoint", "other")
    export = add("export", "Write the weights to one safetensors file.", "checkpoint")
    export.add_argument("file", type=Path, metavar="FILE.safetensors")
    export.add_argument(
        "--weights", default="last", metavar="NAME",
        help="`last`, an average (`ema`, `tail_average`), or `state`: the optimizer's too",
    )  # fmt: skip
    add("verify", "Read every byte and name what is damaged.", "checkpoint")
    pin = add("pin", "Keep a saved step, whatever the run retires.", "checkpoint")
    pin.add_argument("--why", default="by hand", metavar="TEXT")
    add("unpin", "Let a saved step be retired again.", "checkpoint")


def _run(arguments: argparse.Namespace) -> int:
    from pipelines.run import run

    overrides = list(arguments.overrides)
    if arguments.profile_steps is not None:
        overrides.append(f"trainer.profile_steps={arguments.profile_steps}")
    return run(
        arguments.experiment,
        overrides,
        on_demand=arguments.on_demand,
        check_reproducible=arguments.check_reproducible,
    )


def _train(arguments: argparse.Namespace) -> int:
    from pipelines.build import catalog_from_environment
    from pipelines.quickstart import write_experiment
    from pipelines.run import run

    name = write_experiment(
        Path(os.environ["DAGSTER_HOME"]),
        catalog_from_environment(),
        model=arguments.model,
        dataset=arguments.dataset,
        config_path=arguments.config_path,
        overrides=arguments.overrides,
        tokenizer=arguments.tokenizer,
    )
    return run(name, [])


def _launch(arguments: argparse.Namespace) -> int:
    from pipelines.launch import launch
    from resources.secrets import scrub

    tags = {}
    for text in arguments.tags:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ValueError(f"--tag {text}: expected NAME=VALUE, e.g. commit=c0ffee.")
        # A commit may look like a key.
        tags[name] = value if re.fullmatch("[0-9a-f]+", value) else scrub(value)
    return launch(
        arguments.job,
        arguments.overrides,
        tags,
        timeout_s=arguments.timeout,
        queue_timeout_s=arguments.queue_timeout,
        cancel_timeout_s=arguments.cancel_timeout,
    )


def _status(arguments: argparse.Namespace) -> int:
    from pipelines.run import status

    return status(arguments.experiment)


def _why(arguments: argparse.Namespace) -> int:
    from pipelines.run import explain

    return explain(arguments.asset)


def _lineage(arguments: argparse.Namespace) -> int:
    from pipelines.lineage import as_json, lineage, lines
    from pipelines.lineage_exports import to_html, to_prov
    from pipelines.run import object_of
    from resources.store import open_store

    store = open_store()
    node = lineage(store, ":".join(object_of(store, arguments.artifact)))
    if arguments.html is not None:
        arguments.html.write_text(to_html(node), encoding="utf-8")
        sys.stdout.write(f"{arguments.html.absolute()}\n")
        return 0
    text = as_json(node) if arguments.json else to_prov(node) if arguments.prov else None
    sys.stdout.write(f"{text or chr(10).join(lines(node))}\n")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    if arguments.offline:
        from modeling.hf import offline

        directory = Path(arguments.artifact)
        if faults := offline.faults(directory):
            sys.stdout.write("".join(f"{fault}\n" for fault in faults))
            return 1
        sys.stdout.write(
            f"{directory}: every file is as its card says, and the tokenizer is that of its "
            f"lineage.\nThis is hf_model {offline.content_id(directory)}.\n"
        )
        return 0
    from pipelines.replay import parse_steps
    from pipelines.run import verify_asset

    steps = None if arguments.steps is None else parse_steps(arguments.steps)
    return verify_asset(arguments.artifact, steps)


def _fsck(arguments: argparse.Namespace) -> int:
    from pipelines.upkeep import fsck
    from resources.store import open_store

    return fsck(open_store(), set_aside=arguments.set_aside)


def _gc(arguments: argparse.Namespace) -> int:
    from pipelines.upkeep import gc
    from resources.store import open_store

    expire = arguments.expire_records
    return gc(open_store(), delete=arguments.delete, expire_records_after_days=expire)


def _alias(arguments: argparse.Namespace) -> int:
    from pipelines.run import object_of
    from pipelines.upkeep import alias
    from resources.store import open_store

    store = open_store()
    return alias(store, arguments.name, object_of(store, arguments.artifact)[1])


def _checkpoint(arguments: argparse.Namespace) -> int:
    from modeling.training.manifest import CheckpointError
    from pipelines import checkpoints
    from resources.store import open_store

    store = open_store()
    actions: dict[str, Callable[[], int]] = {
        "ls": lambda: checkpoints.ls(
            store, arguments.experiment, verify=arguments.verify, as_json=arguments.json
        ),
        "show": lambda: checkpoints.show(store, arguments.checkpoint, as_json=arguments.json),
        "diff": lambda: checkpoints.diff(store, arguments.checkpoint, arguments.other),
        "export": lambda: checkpoints.export(
            store, arguments.checkpoint, arguments.file, weights=arguments.weights
        ),
        "verify": lambda: checkpoints.verify(store, arguments.checkpoint),
        "pin": lambda: checkpoints.pin(store, arguments.checkpoint, arguments.why),
        "unpin": lambda: checkpoints.unpin(store, arguments.checkpoint),
    }
    try:
        return actions[arguments.action]()
    except (CheckpointError, FileExistsError) as error:
        raise ValueError(error) from error


def _show(arguments: argparse.Namespace) -> int:
    from pipelines.build import catalog_from_environment
    from pipelines.show import show

    return show(
        catalog_from_environment(),
        arguments.dataset,
        sys.stdout,
        length=arguments.seq_len,
        packing=arguments.packing,
        split=arguments.split,
        numbers=tuple(arguments.example or (0,)),
        ids=arguments.ids,
        page=arguments.html,
    )


def _ui(arguments: argparse.Namespace) -> int:
    from pipelines.ui import serve

    return serve(arguments.port)


if __name__ == "__main__":
    sys.exit(main())
