"""The command line: names the commands and turns mistakes into one sentence. What a command does lies in `commands/`.

Nothing heavy is imported before a command is chosen, so that `fieldmark --help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module, metadata

from fieldmark.errors import FieldmarkError

# command -> what it does; its module is fieldmark.commands.NAME (dashes become underscores) with `run(argv)`
COMMANDS = {
    "quickstart": "drawn birds and the embedded teacher: a control and SAGA, a table and a report",
    "inspect": "what a catalogue holds, what is wrong with it, and what it can be used for",
    "train": "train a student by one of the methods",
    "evaluate": "measure a student on a catalogue",
    "embed": "write a student's vectors of a catalogue to a Parquet or .npy file",
    "index": "embed a catalogue into a store that is searched",
    "search": "find items of a store by a photo, a text or both",
    "serve": "answer searches of a store over HTTP, with a page",
    "export": "write a student as ONNX, OpenVINO or a sentence-transformers folder, with a model card",
    "label": "ask a teacher about a catalogue once: alignment scores, comparative captions, attributes",
    "build-teacher": "make a small teacher for a catalogue with attributes",
    "compare": "runs side by side: mean and spread over seeds",
    "doctor": "versions, devices, memory, and what is misconfigured",
}
# method -> what it is; its module is fieldmark.methods.NAME with `train(config)`, its settings the class named here
METHODS = {
    "metric": ("MetricConfig", "a metric loss alone (the controls)"),
    "saga": ("SagaConfig", "metric loss, policy gradient and attention of a frozen multimodal LLM, arXiv 2606.15134"),
    "maple": ("MapleConfig", "preferences of a frozen multimodal LLM for image-text embeddings, arXiv 2506.06970"),
    "afmrl": ("AfmrlConfig", "attributes and product retrieval that improve each other, arXiv 2604.20135"),
    "generator": ("GeneratorConfig", "a stage of afmrl: the attribute generator's cold start from examples"),
    "agcl": ("AgclConfig", "a stage of afmrl: attributes weight the negatives of an embedder"),
    "rar": ("RarConfig", "a stage of afmrl: retrieval recall rewards the attribute generator"),
}
PROGRAM = "fieldmark"
SEARCH_PACKAGES = ("lancedb", "fastapi", "httpx2", "uvicorn", "prometheus_client", "multipart")  # the extra `search`


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        Exit code: 0, 2 after a user's mistake or a broken input, 130 after Ctrl-C. The sentence is on stderr.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _dispatch(arguments)
    except FieldmarkError as error:
        return _stop(one_sentence(error), 2)
    except ModuleNotFoundError as error:
        if error.name not in SEARCH_PACKAGES:
            raise
        return _stop(f'{error.name} is not installed; search needs `pip install "{PROGRAM}[search]"`.', 2)
    except OSError as error:
        return _stop(_file_trouble(error), 2)
    except KeyboardInterrupt as error:
        return _stop(str(error) or "Interrupted; run the same command again.", 130)
    return 0


def choose(name: str | None, names: Sequence[str], what: str, help_command: str) -> str:
    """The name itself if it is one of `names`.

    Raises:
        FieldmarkError: no name, or an unknown one; says the nearest.
    """
    if name in names:
        return str(name)
    listed = ", ".join(names)
    if name is None:
        raise FieldmarkError(f"No {what} was given; choose one of {listed} (see `{help_command}`).")
    from difflib import get_close_matches

    near = get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {listed}."
    raise FieldmarkError(f"Unknown {what} {name!r}; {hint}")


def one_sentence(error: BaseException) -> str:
    """An error's message on one line; of a worker process's traceback only what was wrong."""
    text = str(error)
    if text.startswith("Caught ") and "Error: " in text:
        text = text.rpartition("Error: ")[2]
    return " ".join(text.split())


def _file_trouble(error: OSError) -> str:
    """What a file's name and the system say; some libraries put both into the message alone."""
    if error.filename is None:
        return one_sentence(error)
    return f"{error.filename} cannot be read or written: {(error.strerror or 'unknown error').lower()}."


def _dispatch(arguments: list[str]) -> None:
    if arguments[:1] and arguments[0] in ("-h", "--help"):
        _top_parser().print_help()
    elif arguments[:1] == ["--version"]:
        print(f"{PROGRAM} {metadata.version(PROGRAM)}")
    else:
        command = choose(next(iter(arguments), None), list(COMMANDS), "command", f"{PROGRAM} --help")
        import_module(f"fieldmark.commands.{command.replace('-', '_')}").run(arguments[1:])


def _top_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Train retrieval embeddings that see field marks, supervised by a frozen multimodal LLM.",
        epilog=f"`{PROGRAM} COMMAND --help` says what a command takes.",
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)
    return parser


def _stop(sentence: str, code: int) -> int:
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # a progress bar that was cut short leaves the cursor hidden
    print(f"{PROGRAM}: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
