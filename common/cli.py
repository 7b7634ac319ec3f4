"""Command line: ``lipllm COMMAND [hydra overrides]``.

Only the standard library is imported here, so that help and completion answer at once; a
command's module is imported when it runs.
"""

import difflib
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("train.app:main", "train a model whose sensitivity is bounded by construction"),
    "certify": ("solvers.app:main_certify", "bound a model's sensitivity and store the proof"),
    "verify": ("solvers.app:main_verify", "re-prove a stored bound without trusting the solver"),
    "attack": ("solvers.app:main_attack", "search the largest sensitivity: a lower bound"),
    "campaign": ("solvers.campaign_app:main", "try to refute the bounds on small random models"),
    "solve": ("solvers.app:main_solve", "run a monotone-inclusion solver on a standard problem"),
    "compress": ("compress.app:main", "prune a model and certify how far its output moved"),
    "unlearn": ("compress.unlearn_app:main", "make a model forget a class, and measure how firmly"),
    "study": ("compress.study_app:main", "compare all pruning methods on one model in one table"),
    "calibrate": ("serve.app:main_calibrate", "collect the statistics that cache eviction needs"),
    "generate": ("serve.app:main_generate", "continue prompts under a key-value cache policy"),
    "bench": ("serve.bench_app:main", "compare cache policies and decoding speed in one table"),
    "export": ("serve.export_app:main", "write a model as a folder that transformers loads"),
    "report": ("common.report:main", "draw a run, a pipeline or a sweep as one HTML file"),
    "pipeline": ("common.pipeline:main", "text in; certified, pruned, served model and report out"),
    "doctor": ("common.doctor:main", "say what this machine can run"),
}

PACKAGES = ("common", "solvers", "train", "compress", "serve", "conf")

# Hydra's own; anything else with dashes is a slip for key=value.
FLAGS = {
    *("-h", "--help", "--hydra-help", "--version", "--resolve", "-r", "--run", "-m", "--multirun"),
    *("-sc", "--shell-completion"),
}
VALUED_OPTIONS = {
    *("-c", "--cfg", "-p", "--package", "-i", "--info", "-cp", "--config-path", "-cn"),
    *("--config-name", "-cd", "--config-dir", "--experimental-rerun"),
}

COMMAND_VARIABLE = "LIPLLM_COMMAND"
TRACE_VARIABLE = "LIPLLM_TRACE"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program's name; those of the process when omitted.

    Returns:
        Exit status: 0 done, 1 a defect, 2 the user can correct it, 130 interrupted, 141 nobody
        reads the output.
    """
    if argv is not None:
        # A real path: rank processes are started from it.
        sys.argv = [str(Path(sys.executable).with_name("lipllm")), *argv]
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell (>&-)
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    try:
        return _dispatch()
    except KeyboardInterrupt:
        sys.stderr.write("lipllm: interrupted; the same command continues where it stopped\n")
        return 130
    except BrokenPipeError:
        sys.stdout = None
        return 141
    except Exception as error:
        return _report(error)


def usage() -> str:
    """Return the text of ``lipllm --help``."""
    rows = "\n".join(f"  {name:<10} {about}" for name, (_, about) in COMMANDS.items())
    return (
        "usage: lipllm COMMAND [key=value ...] [-m] [--help]\n\n"
        "Train transformers that carry a machine-checkable Lipschitz proof, tighten it, prune\n"
        f"under it and serve under it.\n\ncommands:\n{rows}\n\n"
        "lipllm COMMAND --help shows a command's settings; -m sweeps comma-separated values.\n"
        'Completion: eval "$(lipllm -sc install=bash)". LIPLLM_TRACE=1 shows tracebacks.\n'
    )


def _dispatch() -> int:
    command = _take_command()
    if command is None:
        return _without_command(sys.argv[1:])
    sys.argv[1:] = _options_last(sys.argv[1:])
    _check_packages()
    # Rank processes are started without the command word and find it here.
    os.environ[COMMAND_VARIABLE] = command
    module, _, function = COMMANDS[command][0].partition(":")
    status = getattr(import_module(module), function)()
    return int(status or 0)


def _take_command() -> str | None:
    arguments = sys.argv[1:]
    if arguments and arguments[0] in COMMANDS:
        return sys.argv.pop(1)
    if "-sc" in arguments or "--shell-completion" in arguments:
        return _completed_command(arguments)
    if "LOCAL_RANK" in os.environ and not (arguments and arguments[0].isalpha()):
        return os.environ.get(COMMAND_VARIABLE)
    return None


def _completed_command(arguments: Sequence[str]) -> str | None:
    # Completion is registered for the program and sends the whole line: strip the command word.
    program, _, rest = os.environ.get("COMP_LINE", "").lstrip().partition(" ")
    word, has_more, rest = rest.lstrip().partition(" ")
    is_query = any(argument.startswith("query=") for argument in arguments)
    if is_query and (word not in COMMANDS or not has_more):
        sys.stdout.write(" ".join(name for name in COMMANDS if name.startswith(word)) + "\n")
        return None
    os.environ["COMP_LINE"] = f"{program} {rest}"
    return word if word in COMMANDS else "doctor"


def _without_command(arguments: Sequence[str]) -> int:
    if "-sc" in arguments or "--shell-completion" in arguments:
        return 0
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        sys.stdout.write(f"lipllm {metadata.version('lipllm')}\n")
        return 0
    near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else "lipllm --help describes them"
    sys.stderr.write(
        f"lipllm: error: unknown command {arguments[0]!r}: expected one of "
        f"{', '.join(COMMANDS)}; {hint}\n"
    )
    return 2


def _options_last(arguments: Sequence[str]) -> list[str]:
    """Return the arguments in the one order that Hydra's parser takes: overrides, then options.

    Raises:
        ConfigError: for an option that Hydra does not have.
    """
    from common.errors import ConfigError

    overrides: list[str] = []
    options: list[str] = []
    wants_value = False
    for argument in arguments:
        option, has_value, _ = argument.partition("=")
        if wants_value and not has_value:
            options.append(argument)
        elif not argument.startswith("-"):
            overrides.append(argument)
        elif option in FLAGS | VALUED_OPTIONS:
            options.append(argument)
        else:
            raise ConfigError(f"unknown option {option!r}: settings are written key=value")
        wants_value = argument in VALUED_OPTIONS
    return overrides + options


def _check_packages() -> None:
    """Raise ``ConfigError`` if another distribution shadows one of our top-level packages."""
    from common.errors import ConfigError

    root = Path(__file__).resolve().parents[1]
    for name in PACKAGES:
        spec = find_spec(name)
        origin = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
        if origin is None or origin.parents[1] != root:
            raise ConfigError(
                f"package {name!r} is found at {origin}, not in {root}: something shadows it; "
                "install lipllm in an environment of its own"
            )


def _report(error: Exception) -> int:
    from common.explain import explain

    line = explain(error)
    if line is None:
        traceback.print_exception(error)
        return 1
    if os.environ.get(TRACE_VARIABLE) == "1":
        traceback.print_exception(error)
    sys.stderr.write(f"lipllm: error: {line}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
